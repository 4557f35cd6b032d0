"""The name of a page's content: a chained 64-bit hash over the salt and all tokens up to the page's end.

Router and workers compute the same hashes, so that the router's prefix index and the workers' cache events
agree. Two prompts share a hash exactly when they share the salt and every token so far (up to a collision of
BLAKE2b truncated to 64 bits; a collision misplaces a request, it never mixes KV: workers match by tokens).
"""

from array import array
from collections.abc import Sequence
from hashlib import blake2b


def page_hashes(tokens: Sequence[int], page_size: int, salt: str = "") -> list[int]:
    """Hash of each whole page of `tokens`, in order; a partly filled last page has none."""
    ids = array("q", tokens)
    running = blake2b(salt.encode(), digest_size=8, person=b"kvasir-page")
    hashes = []
    for end in range(page_size, len(ids) + 1, page_size):
        running.update(ids[end - page_size : end].tobytes())
        hashes.append(int.from_bytes(running.digest(), "little"))
    return hashes

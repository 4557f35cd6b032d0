"""The hash of a page's content: 64 bits, chained over the salt and all tokens up to the page's end.

Router and workers compute the same hashes, so that the router's prefix index and the workers' cache events
agree. Two prompts share a hash exactly when they share the salt and every token so far, up to a collision of
BLAKE2b truncated to 64 bits; a collision misplaces a request, it never mixes KV: workers match by tokens.
"""

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

TOKEN_BYTES = 4


def token_bytes(tokens: Sequence[int]) -> bytes:
    """Tokens as big-endian 32-bit words, so that byte order is token order."""
    return np.asarray(tokens, dtype=">u4").tobytes()


def root_hash(salt: str) -> int:
    """The hash before the first page."""
    return int.from_bytes(blake2b(salt.encode(), digest_size=8, person=b"kvasir-salt").digest(), "little")


def next_hash(parent: int, page: bytes) -> int:
    """The hash of a page of `token_bytes` behind the prefix that `parent` names."""
    return int.from_bytes(blake2b(page, digest_size=8, key=parent.to_bytes(8, "little")).digest(), "little")


def page_hashes(tokens: Sequence[int], page_size: int, salt: str = "") -> list[int]:
    """Hash of each whole page of `tokens`, in order; a partly filled last page has none."""
    data, step = token_bytes(tokens), page_size * TOKEN_BYTES
    running, hashes = root_hash(salt), []
    for start in range(0, len(data) - step + 1, step):
        running = next_hash(running, data[start : start + step])
        hashes.append(running)
    return hashes

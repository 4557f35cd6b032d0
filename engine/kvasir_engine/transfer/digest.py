"""What a page's bytes hash to, so that a page that was written too late, twice or by another is never decoded from.

XXH3 with 64 bits (Collet, xxhash.com) reads faster than memory is copied, and lets other threads run meanwhile.
"""

import ctypes
from collections.abc import Iterable

import xxhash

NONE = "none"
XXH3 = "xxh3-64"


class Digester:
    """Digests of the pages of one pool in this process's memory."""

    def __init__(self, address: int, pages: int, page_bytes: int) -> None:
        self._page_bytes = page_bytes
        # A view, not a copy: the pool outlives its transfer thread.
        self._bytes = _view(address, pages * page_bytes)

    def __call__(self, pages: Iterable[int]) -> list[int]:
        """The digest of each page, over all its layers."""
        size, data = self._page_bytes, self._bytes
        return [xxhash.xxh3_64_intdigest(data[page * size : (page + 1) * size]) for page in pages]


def _view(address: int, size: int) -> memoryview:
    return memoryview((ctypes.c_char * size).from_address(address)).cast("B")

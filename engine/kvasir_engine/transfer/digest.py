"""What a page's bytes hash to, so that a page that was written too late, twice or by another is never decoded from.

Each write of some layers of a page has a digest of its own: it is computed while later layers are, and checked
while they move. XXH3 with 64 bits (Collet, xxhash.com) reads faster than memory is copied, and lets other threads
run meanwhile.
"""

import ctypes
from collections.abc import Iterable

import xxhash

NONE = "none"
XXH3 = "xxh3-64"


class Digester:
    """Digests of the pages of one pool in this process's memory, each of `layers` layers one after the other."""

    def __init__(self, address: int, pages: int, page_bytes: int, layers: int) -> None:
        self._page_bytes = page_bytes
        self._layer_bytes = page_bytes // layers
        # A view, not a copy: the pool outlives its transfer thread.
        self._bytes = _view(address, pages * page_bytes)

    def __call__(self, pages: Iterable[int], layers: range) -> list[int]:
        """The digest of each page, over these layers of it."""
        data, first, end = self._bytes, layers.start * self._layer_bytes, layers.stop * self._layer_bytes
        starts = (page * self._page_bytes for page in pages)
        return [xxhash.xxh3_64_intdigest(data[start + first : start + end]) for start in starts]


def _view(address: int, size: int) -> memoryview:
    return memoryview((ctypes.c_char * size).from_address(address)).cast("B")

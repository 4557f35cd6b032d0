"""What a page's bytes hash to, so that a page that was written too late, twice or by another is never decoded from.

Each write of some layers of a page has a digest of its own: it is computed while later layers are, and checked
while they move. XXH3 with 64 bits (Collet, xxhash.com) reads faster than memory is copied, and lets other threads
run meanwhile.
"""

import ctypes
from collections.abc import Callable, Iterable

import numpy as np
import xxhash

from kvasir_engine.transfer.layout import Cut

NONE = "none"
XXH3 = "xxh3-64"


Fetch = Callable[[int, range], np.ndarray[tuple[int, ...], np.dtype[np.uint8]]]
"""The bytes of some layers of a page, one after the other."""


class Digester:
    """Digests of the pages of one pool, each of `layers` layers one after the other.

    The pool is in this process's memory, or `fetch` brings its bytes from where it is.
    """

    def __init__(self, address: int, pages: int, page_bytes: int, layers: int, fetch: Fetch | None = None) -> None:
        self._page_bytes = page_bytes
        self._layer_bytes = page_bytes // layers
        if fetch is None:
            # A view, not a copy: the pool outlives its transfer thread.
            self._bytes = _view(address, pages * page_bytes)
            fetch = self._view
        self._fetch = fetch

    def __call__(self, blocks: Iterable[int], layers: range, cut: Cut | None = None) -> list[int]:
        """The digest of each block of `cut`, over these layers of it; without `cut` of each page, whole.

        It is over the rows in the order layer, K or V, head, token, so it is the same wherever they are.
        """
        if cut is not None and not cut.whole:
            return [xxhash.xxh3_64_intdigest(part.data) for part in self._parts(blocks, layers, cut)]
        return [xxhash.xxh3_64_intdigest(self._fetch(page, layers).data) for page in blocks]

    def _view(self, page: int, layers: range) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        start = page * self._page_bytes
        first, end = layers.start * self._layer_bytes, layers.stop * self._layer_bytes
        return self._bytes[start + first : start + end]

    def _parts(
        self, blocks: Iterable[int], layers: range, cut: Cut
    ) -> Iterable[np.ndarray[tuple[int, ...], np.dtype[np.uint8]]]:
        heads = slice(cut.first, cut.first + cut.count)
        for block in blocks:
            page, place = divmod(block, cut.blocks)
            rows = self._fetch(page, layers).reshape(len(layers), 2, cut.heads, cut.blocks, cut.block_bytes)
            yield np.ascontiguousarray(rows[:, :, heads, place])


def _view(address: int, size: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))

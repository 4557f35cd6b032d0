"""What a page's bytes hash to, so that a page that was written too late, twice or by another is never decoded from.

Each write of some layers of a page has a digest of its own: it is computed while later layers are, and checked
while they move. XXH3 with 64 bits (Collet, xxhash.com) reads faster than memory is copied, and lets other threads
run meanwhile.
"""

import ctypes
from collections.abc import Iterable

import numpy as np
import xxhash

from kvasir_engine.transfer.layout import Cut

NONE = "none"
XXH3 = "xxh3-64"


class Digester:
    """Digests of the pages of one pool in this process's memory, each of `layers` layers one after the other."""

    def __init__(self, address: int, pages: int, page_bytes: int, layers: int) -> None:
        self._page_bytes = page_bytes
        self._layer_bytes = page_bytes // layers
        # A view, not a copy: the pool outlives its transfer thread.
        self._bytes = _view(address, pages * page_bytes)

    def __call__(self, blocks: Iterable[int], layers: range, cut: Cut | None = None) -> list[int]:
        """The digest of each block of `cut`, over these layers of it; without `cut` of each page, whole.

        It is over the rows in the order layer, K or V, head, token, so it is the same wherever they are.
        """
        if cut is not None and not cut.whole:
            return [xxhash.xxh3_64_intdigest(part.data) for part in self._parts(blocks, layers, cut)]
        data, first, end = self._bytes, layers.start * self._layer_bytes, layers.stop * self._layer_bytes
        starts = (page * self._page_bytes for page in blocks)
        return [xxhash.xxh3_64_intdigest(data[start + first : start + end]) for start in starts]

    def _parts(
        self, blocks: Iterable[int], layers: range, cut: Cut
    ) -> Iterable[np.ndarray[tuple[int, ...], np.dtype[np.uint8]]]:
        pool = np.frombuffer(self._bytes, np.uint8)
        pool = pool.reshape(-1, cut.layers, 2, cut.heads, cut.blocks, cut.block_bytes)
        heads = slice(cut.first, cut.first + cut.count)
        for block in blocks:
            page, place = divmod(block, cut.blocks)
            yield np.ascontiguousarray(pool[page, layers.start : layers.stop, :, heads, place])


def _view(address: int, size: int) -> memoryview:
    return memoryview((ctypes.c_char * size).from_address(address)).cast("B")

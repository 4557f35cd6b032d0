"""Digests of KV, by which a page that was written too late, twice or by another worker is detected. Pure.

The unit is a *token's digest in a layer*: over its K and V, of all heads that a rank has or moves. The kernel that
writes a token's KV into a page can make its digest at the same time, in any order, and a partly filled page grows
token by token. Digests of pages combine these, whichever pages, layers and blocks are moved.

For a token in a layer let m be its 32-bit words, little-endian, in the order K or V, head, dimension, and k the
words of `keys_of`. Then, modulo 2^64,

    h1 = sum over even i of (m[i] + k[i] mod 2^32) (m[i+1] + k[i+1] mod 2^32)
    h2 = the same with k[i+16] and k[i+17]
    token digest = mix(h1) + FOLD h2, with 1 for 0
    page digest  = sum over its layers and tokens of mix(token digest xor the key of (layer, place in the page))

h1 and h2 are NH twice (Black, Halevi, Krawczyk, Krovetz, Rogaway, "UMAC", 1999): for random keys two different
tokens have the same sums with a probability of at most 2^-64. The keys are fixed, so this protects against errors,
not against an attacker who constructs a collision. `mix` is splitmix64's (Steele, Lea, Flood 2014), a bijection.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

NONE = "none"
TOKENS = "nh-tokens-64"
"""The digest's name in a fingerprint."""

Digests = np.ndarray[Any, np.dtype[np.uint64]]

STRIPE = 64
"""Rows that are a multiple of so many bytes have kernels."""
SHIFT_BYTES = 64
"""How far into the keys the second sum begins."""
MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))
"""A value is xored with itself shifted right, then multiplied, three times."""
FOLD = 0x9E3779B97F4A7C15


def mix(values: Digests) -> Digests:
    """Mix each bit of a value into all bits of the result. One to one."""
    for shift, factor in MIX:
        values = (values ^ (values >> np.uint64(shift))) * np.uint64(factor)
    return values


@lru_cache(maxsize=64)
def keys_of(size: int) -> Digests:
    """Keys for `size` bytes of a token and for the second sum."""
    count = (size + SHIFT_BYTES) // 8
    memory = np.empty(count + 7, np.uint64)
    begin = -memory.ctypes.data % 64 // 8  # so that a kernel's loads do not cross lines of the cache
    keys = memory[begin : begin + count]
    keys[:] = mix(np.arange(1, count + 1, dtype=np.uint64) * np.uint64(FOLD))
    return keys


@lru_cache(maxsize=64)
def keys_of_places(layers: int, tokens: int) -> Digests:
    """[layers, tokens]: the key of each token of a page, or block, in each layer."""
    layer, place = np.arange(1, layers + 1, dtype=np.uint64), np.arange(tokens, dtype=np.uint64)
    return mix(((layer[:, None] << np.uint64(32)) | place) * np.uint64(FOLD))


def token_digests(rows: np.ndarray[Any, np.dtype[np.uint8]]) -> Digests:
    """The digests of [..., 2, heads, tokens, bytes of a row]: [..., tokens]. Rows are many times 8 bytes."""
    words = np.ascontiguousarray(np.moveaxis(rows, -2, -4)).view(np.uint32)
    words = words.reshape(*words.shape[:-3], -1)
    keys, count = keys_of(words.shape[-1] * 4).view(np.uint32), words.shape[-1]
    sums = []
    for shift in (0, SHIFT_BYTES // 4):
        keyed = (words + keys[shift : shift + count]).astype(np.uint64)
        sums.append((keyed[..., ::2] * keyed[..., 1::2]).sum(-1, dtype=np.uint64))
    digests: Digests = np.maximum(mix(sums[0]) + sums[1] * np.uint64(FOLD), np.uint64(1))
    return digests


def page_digests(tokens: Digests, first: int) -> list[int]:
    """The digests of N pages, or blocks, of [N, layers, tokens]; the layers are those from `first` on."""
    _, layers, size = tokens.shape
    keys = keys_of_places(first + layers, size)[first:]
    digests: list[int] = mix(tokens ^ keys).sum((1, 2), dtype=np.uint64).tolist()
    return digests


class KeptDigests:
    """The digests of the tokens in a pool's memory, made when the memory was written; 0 means unknown.

    `table` is [pages, layers, page_size]. Every change of the memory changes the table: the kernel that stores KV
    writes its digests (`cpu_kernels/elementwise.py`), a copied page takes its digests along, and the digests of
    memory that another worker may write are forgotten until the received KV is verified. Digests that are measured
    from memory only fill unknown places: a digest from writing stays valid, whatever happens to the memory later.
    """

    def __init__(self, pages: int, layers: int, page_size: int) -> None:
        self.table: Digests = np.zeros((pages, layers, page_size), np.uint64)

    def copy(self, source: int, target: int) -> None:
        """Copy the digests of page `source` to page `target`."""
        self.table[target] = self.table[source]

    def forget(self, pages: Sequence[int]) -> None:
        """Forget the digests of pages that another worker may write, or has written."""
        self.table[list(pages)] = 0

    def of(self, pages: Sequence[int], layers: range, places: Sequence[int], tokens: int) -> Digests:
        """The known digests of the blocks of so many tokens at these places of N pages: [N, layers, tokens]."""
        digests: Digests = self._blocks(tokens)[self._at(pages, layers, places)]
        return digests

    def fill(
        self, pages: Sequence[int], layers: range, places: Sequence[int], tokens: int, measured: Digests
    ) -> None:
        """Fill unknown places with digests measured from memory: [N, layers, tokens]."""
        blocks, at = self._blocks(tokens), self._at(pages, layers, places)
        known = blocks[at]
        blocks[at] = np.where(known == 0, measured, known)

    def _blocks(self, tokens: int) -> Digests:
        """A view, [pages, places, layers, tokens]."""
        pages, layers, size = self.table.shape
        return self.table.reshape(pages, layers, size // tokens, tokens).swapaxes(1, 2)

    @staticmethod
    def _at(pages: Sequence[int], layers: range, places: Sequence[int]) -> Any:
        return np.asarray(pages, np.int64), np.asarray(places, np.int64), slice(layers.start, layers.stop)

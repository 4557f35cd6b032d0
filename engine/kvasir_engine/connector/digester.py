"""The digests (`kv/digests.py`) of what is written, lent and read: those that are kept, and of memory as it is now.

What goes out has the digests that were made when its KV was written, where they are known; what came in is always
digested from memory. So a byte that changed anywhere between the two is found.
"""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np

from kvasir_engine.connector.layout import Cut, Offsets
from kvasir_engine.kv.digests import STRIPE, Digests, KeptDigests, page_digests, token_digests
from kvasir_engine.kv.spec import KVSpec

Bytes = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]
Measure = Callable[[Sequence[int], range, Cut], Digests]
"""The digests [blocks, layers, tokens] of some layers of blocks, of memory as it is."""


@dataclass(frozen=True)
class Digested:
    """Digests of some blocks, and of those of them that were read from memory the digests of the tokens."""

    values: list[int]
    layers: range
    cut: Cut
    measured: dict[int, Digests]  # by block, [layers, tokens]


class Digester:
    """Digests of the pages of one rank's pool, which are as `spec` says.

    The pool is in this process's memory, or `measure` digests it where it is. `kept` are the digests of
    what was written; without, every digest is of memory as it is.
    """

    def __init__(
        self,
        address: int,
        pages: int,
        spec: KVSpec,
        kept: KeptDigests | None = None,
        measure: Measure | None = None,
    ) -> None:
        striped = all(layer.row_bytes % STRIPE == 0 for layer in spec.layers)
        self._kernels = _kernels() if striped else None
        self._address = address
        self._kept = kept
        self._elsewhere = measure
        self._whole = Cut.whole_pages(spec)
        # A view, not a copy: the pool outlives its transfer thread.
        self._bytes = _view(address, pages * spec.page_bytes) if measure is None else np.empty(0, np.uint8)

    def known(self, blocks: Sequence[int], layers: range, cut: Cut | None = None) -> Digested | None:
        """As `written`, if all of it is kept. Takes microseconds a block."""
        cut = cut or self._whole
        tokens = self._tokens(blocks, layers, cut)
        if tokens is None or not tokens.all():
            return None
        return Digested(self._page_digests(tokens, layers.start), layers, cut, {})

    def written(self, blocks: Sequence[int], layers: range, cut: Cut | None = None) -> Digested:
        """The digest of each block of `cut` over these layers, as it was written; without `cut` of each page.

        What is not kept is read from memory.
        """
        cut = cut or self._whole
        tokens = self._tokens(blocks, layers, cut)
        if tokens is None:
            return self.measured(blocks, layers, cut)
        measured: dict[int, Digests] = {}
        unknown = np.flatnonzero((tokens == 0).any((1, 2))).tolist()
        if unknown:
            found = self._measure([blocks[at] for at in unknown], layers, cut)
            tokens[unknown] = np.where(tokens[unknown] == 0, found, tokens[unknown])
            measured = {blocks[at]: digests for at, digests in zip(unknown, found, strict=True)}
        return Digested(self._page_digests(tokens, layers.start), layers, cut, measured)

    def _tokens(self, blocks: Sequence[int], layers: range, cut: Cut) -> Digests | None:
        """What is kept of these, 0 for unknown; None where nothing can be."""
        if self._kept is None or not cut.complete:
            return None
        return self._kept.of(*self._cells(blocks, layers, cut))

    def measured(self, blocks: Sequence[int], layers: range, cut: Cut | None = None) -> Digested:
        """As `written`, of memory as it is now."""
        cut = cut or self._whole
        tokens = self._measure(blocks, layers, cut)
        values = self._page_digests(tokens, layers.start)
        return Digested(values, layers, cut, dict(zip(blocks, tokens, strict=True)))

    def keep(self, digested: Digested, blocks: Sequence[int]) -> None:
        """What was measured of `blocks` is right, and nobody has written there since: it is known from now on."""
        blocks, cut = [block for block in blocks if block in digested.measured], digested.cut
        if self._kept is not None and blocks and cut.complete:
            tokens = np.stack([digested.measured[block] for block in blocks])
            self._kept.fill(*self._cells(blocks, digested.layers, cut), tokens)

    def differing(self, pages: Sequence[int], layers: range) -> list[int]:
        """Those of some pages whose memory is not what is kept of them. What is not known differs from nothing."""
        assert self._kept is not None
        kept = self._kept.of(*self._cells(pages, layers, self._whole))
        found = self._measure(pages, layers, self._whole)
        wrong = ((kept != found) & (kept != 0)).any((1, 2))
        return [page for page, differs in zip(pages, wrong.tolist(), strict=True) if differs]

    def forget(self, blocks: Sequence[int], cut: Cut | None) -> None:
        """Another worker may write these blocks, or we read into them."""
        if self._kept is not None:
            self._kept.forget([block // (cut or self._whole).blocks for block in blocks])

    def _cells(self, blocks: Sequence[int], layers: range, cut: Cut) -> tuple[list[int], range, list[int], int]:
        pages, places = [block // cut.blocks for block in blocks], [block % cut.blocks for block in blocks]
        return pages, layers, places, cut.tokens

    def _page_digests(self, tokens: Digests, first: int) -> list[int]:
        return page_digests(tokens, first) if self._kernels is None else self._kernels.page_digests(tokens, first)

    def _measure(self, blocks: Sequence[int], layers: range, cut: Cut) -> Digests:
        """[blocks, layers, tokens]"""
        if self._elsewhere is not None:
            return self._elsewhere(blocks, layers, cut)
        found = np.empty((len(blocks), len(layers), cut.tokens), np.uint64)
        for run, kind in cut.runs(layers):
            within = slice(run.start - layers.start, run.stop - layers.start)
            places, head_bytes = cut.places(blocks, run), cut.head_bytes(kind)
            sizes = kind.parts, kind.count, cut.tokens, kind.row_bytes, head_bytes, kind.heads * head_bytes
            if self._kernels is not None:
                digests = self._kernels.token_digests(places + self._address, *sizes)
            else:
                digests = token_digests(self._bytes[_bytes_of(places, *sizes)])
            found[:, within] = digests.reshape(len(blocks), len(run), cut.tokens)
        return found


def _bytes_of(
    places: Offsets, parts: int, heads: int, tokens: int, row: int, head_bytes: int, part_bytes: int
) -> Offsets:
    """[N, parts, heads, tokens, row]: where each byte of the pieces that begin at `places` is."""
    strides = [(parts, part_bytes), (heads, head_bytes), (tokens, row), (row, 1)]
    at = places
    for count, stride in strides:
        at = at[..., None] + np.arange(count, dtype=np.int64) * stride
    return at


def _kernels() -> ModuleType:
    """The kernels, compiled: a transfer thread that compiles them when it first needs one is taken for dead."""
    from kvasir_engine.cpu_kernels import digest

    return digest


def _view(address: int, size: int) -> Bytes:
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))

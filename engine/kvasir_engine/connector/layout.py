"""Which bytes of one worker's KV are which bytes of another's, when the two divide it differently. Pure.

A rank's page holds its layers one after another, each [parts, heads of the rank, page_size, row] (`kv/spec.py`).
What moves is counted in *blocks*: a block is as many tokens as the greatest common divisor of the two page sizes,
which is the smaller of them where the two can pair. Block `i` of page `p` has the number `p * blocks_a_page + i`;
where the page sizes are equal, blocks are pages. A *route* goes from one rank of the writer to one rank of the
holder and carries, in each layer, heads that both hold.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import accumulate

import numpy as np
from msgspec import UNSET

from kvasir_engine.kv.spec import KVSpec, LayerKV, runs_of
from kvasir_engine.protocol import Fingerprint

Offsets = np.ndarray[tuple[int], np.dtype[np.int64]]
"""Bytes from a pool's beginning."""


def spec_of(fingerprint: Fingerprint, page_bytes: int) -> KVSpec:
    """What a worker's KV is, whose ranks have pages of so many bytes. Raises ValueError when that cannot be."""
    spec = _rows_of(fingerprint)
    if fingerprint.kv is not UNSET:
        if page_bytes != spec.page_bytes:
            raise ValueError(f"page_bytes: {page_bytes}, the layers of kv take {spec.page_bytes}")
        return spec
    row_bytes, rest = divmod(page_bytes, spec.page_bytes)
    if rest or not row_bytes:
        raise ValueError(f"page_bytes: {page_bytes} is no multiple of the {spec.page_bytes} rows of a page")
    return replace(spec, layers=tuple(replace(layer, row_bytes=row_bytes) for layer in spec.layers))


def _rows_of(fingerprint: Fingerprint) -> KVSpec:
    """Its layers; rows are of one byte where they are all alike."""
    if fingerprint.kv is not UNSET:
        layers = [LayerKV(run.parts, run.heads, run.row_bytes) for run in fingerprint.kv for _ in range(run.layers)]
    else:
        layers = [LayerKV(2, fingerprint.kv_heads, 1)] * fingerprint.layers
    return KVSpec(tuple(layers), fingerprint.page_size, fingerprint.tensor_parallel)


@dataclass(frozen=True)
class LayerCut:
    """Of a layer that has `parts` times `heads` rows a token on its rank: heads `first` to `first + count`."""

    parts: int
    heads: int
    first: int
    count: int
    row_bytes: int


@dataclass(frozen=True)
class Cut:
    """The part of one rank's pages that a route carries. A page has `blocks` blocks of `tokens` tokens."""

    layers: tuple[LayerCut, ...]
    tokens: int
    blocks: int

    @classmethod
    def whole_pages(cls, spec: KVSpec) -> "Cut":
        """All of the pages of one of the ranks."""
        layers = (LayerCut(each.parts, each.heads, 0, each.heads, each.row_bytes) for each in spec.of_rank.layers)
        return cls(tuple(layers), spec.page_size, 1)

    @property
    def whole(self) -> bool:
        """Whether blocks are whole pages of the rank."""
        return self.blocks == 1 and self.complete

    @cached_property
    def complete(self) -> bool:
        """Whether all heads of the rank go, in every layer."""
        return all(layer.count == layer.heads for layer in self.layers)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Where each layer begins in a page of the rank, in bytes; last, the page's end."""
        page = self.tokens * self.blocks
        return tuple(
            accumulate((each.parts * each.heads * page * each.row_bytes for each in self.layers), initial=0)
        )

    @property
    def page_bytes(self) -> int:
        """Bytes of the rank's page."""
        return self.starts[-1]

    def moved_bytes(self, layers: range | None = None) -> int:
        """Bytes of a block that the route carries in these layers, or in all."""
        some = self.layers if layers is None else self.layers[layers.start : layers.stop]
        rows = (each.parts * each.count * each.row_bytes for each in some)
        return sum(rows) * self.tokens

    def head_bytes(self, layer: LayerCut) -> int:
        """Bytes of one head's rows in a page."""
        return self.blocks * self.tokens * layer.row_bytes

    def runs(self, layers: range) -> list[tuple[range, LayerCut]]:
        """Neighbours among these layers that are cut alike."""
        return runs_of(self.layers, layers)

    def places(self, blocks: Sequence[int], layers: range) -> Offsets:
        """Where the first of the carried rows of each layer of each block is: in order of block and layer.

        The layers are alike (`runs`).
        """
        page, place = np.divmod(np.asarray(blocks, np.int64), self.blocks)
        kind = self.layers[layers.start]
        begin = page * self.page_bytes + place * (self.tokens * kind.row_bytes) + kind.first * self.head_bytes(kind)
        starts = np.asarray(self.starts[layers.start : layers.stop], np.int64)
        offsets: Offsets = (begin[:, None] + starts).ravel()
        return offsets

    def pieces(self, blocks: Sequence[int], layers: range, by_head: bool) -> Offsets:
        """Where the pieces of these layers, which are alike, begin: in order of block, layer, part and head.

        A piece is a part's rows of all carried heads, or of one of them.
        """
        kind = self.layers[layers.start]
        heads = np.arange(kind.count if by_head else min(kind.count, 1), dtype=np.int64)
        parts = np.arange(kind.parts, dtype=np.int64)[:, None] * kind.heads
        within = ((parts + heads) * self.head_bytes(kind)).ravel()
        offsets: Offsets = (self.places(blocks, layers)[:, None] + within).ravel()
        return offsets


@dataclass(frozen=True)
class Route:
    """From rank `writer` to rank `holder`: what of each side's pages goes."""

    writer: int
    holder: int
    source: Cut
    target: Cut

    @property
    def whole(self) -> bool:
        """Whether a layer of a page is one run of bytes, on both sides."""
        return self.source.whole and self.target.whole

    @property
    def by_head(self) -> bool:
        """Whether each head is a run of bytes of its own, on one of the sides."""
        return not self.source.blocks == self.target.blocks == 1

    @cached_property
    def _layers(self) -> list[tuple[LayerCut, LayerCut]]:
        return list(zip(self.source.layers, self.target.layers, strict=True))

    def pieces(
        self, source: Sequence[int], target: Sequence[int], layers: range
    ) -> tuple[Offsets, Offsets, Offsets]:
        """What goes, in runs of bytes: where each begins in the writer's pool and in the holder's, and its size."""
        begins, ends, sizes = [], [], []
        for run, (kind, _) in runs_of(self._layers, layers):
            begins.append(self.source.pieces(source, run, self.by_head))
            ends.append(self.target.pieces(target, run, self.by_head))
            heads = 1 if self.by_head else kind.count
            sizes.append(np.full(len(begins[-1]), heads * self.source.tokens * kind.row_bytes, np.int64))
        return np.concatenate(begins), np.concatenate(ends), np.concatenate(sizes)


def block_tokens(ours: int, theirs: int) -> int:
    """Tokens of a block between two page sizes."""
    return math.gcd(ours, theirs)


def block_numbers(pages: Sequence[int], a_page: int, first: int, last: int) -> tuple[int, ...]:
    """Numbers of the blocks from place `first` to before `last`, counted from the beginning of `pages`."""
    if a_page == 1:
        return tuple(pages[first:last])
    return tuple(pages[place // a_page] * a_page + place % a_page for place in range(first, last))


def pages_of(blocks: Sequence[int], a_page: int) -> tuple[int, ...]:
    """The pages that `blocks` are in, each once."""
    return tuple(blocks) if a_page == 1 else tuple(dict.fromkeys(block // a_page for block in blocks))


@lru_cache(maxsize=256)
def routes(writer: KVSpec, holder: KVSpec) -> tuple[Route, ...]:
    """All that has to go for the holder to have what it lacks: each head of each of its ranks comes once.

    Where several ranks of the writer hold a head, the holder's ranks that want it take turns with them.
    """
    tokens = block_tokens(writer.page_size, holder.page_size)
    chosen: dict[tuple[int, int], list[list[int]]] = {}  # by (writer, holder): of each layer, the heads that go
    for layer, kind in enumerate(writer.layers):
        readers = [0] * kind.heads
        for to in range(holder.ranks):
            for head in holder.heads(layer, to):
                having = [rank for rank in range(writer.ranks) if head in writer.heads(layer, rank)]
                pair = having[readers[head] % len(having)], to
                chosen.setdefault(pair, [[] for _ in writer.layers])[layer].append(head)
                readers[head] += 1
    return tuple(
        Route(rank, to, _cut(writer, tokens, rank, heads), _cut(holder, tokens, to, heads))
        for (rank, to), heads in sorted(chosen.items(), key=lambda item: item[0][::-1])
    )


def pairs(writer: Fingerprint, holder: Fingerprint) -> tuple[tuple[int, int], ...]:
    """Which rank of `writer` writes to which of `holder`. Of two that cannot pair, 0 to 0, which will refuse it."""
    if writer.mismatch(holder) is not None:
        return ((0, 0),)
    return tuple((route.writer, route.holder) for route in routes(_rows_of(writer), _rows_of(holder)))


def _cut(spec: KVSpec, tokens: int, rank: int, heads: list[list[int]]) -> Cut:
    layers = []
    for at, (kind, chosen) in enumerate(zip(spec.layers, heads, strict=True)):
        held = spec.heads(at, rank)
        first = chosen[0] - held.start if chosen else 0
        layers.append(LayerCut(kind.parts, len(held), first, len(chosen), kind.row_bytes))
    return Cut(tuple(layers), tokens, spec.page_size // tokens)

"""Which bytes of one worker's KV are which bytes of another's, when the two divide it differently. Pure.

A rank's pool is [pages, layers, 2, kv_heads of the rank, page_size, head_dim]. What moves is counted in *blocks*: a
block is as many tokens as the greatest common divisor of the two page sizes, which is the smaller of them where the
two can pair. Block `i` of page `p` has the number `p * blocks_a_page + i`; where the page sizes are equal, blocks
are pages. A *route* goes from one rank of the writer to one rank of the holder and carries heads that both hold.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from kvasir_engine.protocol import Fingerprint

Offsets = np.ndarray[tuple[int], np.dtype[np.int64]]


@dataclass(frozen=True)
class Shape:
    """How a worker divides its KV. `kv_heads` in all; `row_bytes`: one head's K or V of a token."""

    layers: int
    kv_heads: int
    page_size: int
    row_bytes: int
    ranks: int = 1

    def heads(self, rank: int) -> range:
        """The KV heads of `rank`. With more ranks than heads, a head is on several ranks."""
        if self.ranks <= self.kv_heads:
            each = self.kv_heads // self.ranks
            return range(rank * each, (rank + 1) * each)
        head = rank * self.kv_heads // self.ranks
        return range(head, head + 1)

    @property
    def page_bytes(self) -> int:
        """Bytes of a page on each rank."""
        return self.layers * 2 * len(self.heads(0)) * self.page_size * self.row_bytes

    @classmethod
    def of(cls, fingerprint: Fingerprint) -> "Shape":
        """The shape of a worker, for rows of one byte."""
        return cls(fingerprint.layers, fingerprint.kv_heads, fingerprint.page_size, 1, fingerprint.tensor_parallel)

    def with_pages_of(self, page_bytes: int) -> "Shape":
        """The same for pages of so many bytes. Raises ValueError when that cannot be."""
        rows, rest = divmod(page_bytes, replace(self, row_bytes=1).page_bytes)
        if rest or not rows:
            raise ValueError(f"page_bytes: {page_bytes} does not fit {self}")
        return replace(self, row_bytes=rows)


@dataclass(frozen=True)
class Cut:
    """The part of one rank's pages that a route carries: heads `first` to `first + count` of the rank's `heads`.

    A page has `blocks` blocks; `block_bytes` are those of one head's K or V.
    """

    layers: int
    heads: int
    first: int
    count: int
    blocks: int
    block_bytes: int

    @property
    def whole(self) -> bool:
        """Whether blocks are whole pages of the rank."""
        return self.count == self.heads and self.blocks == 1

    @property
    def page_bytes(self) -> int:
        """Bytes of the rank's page."""
        return self.layers * 2 * self.heads * self.blocks * self.block_bytes

    @property
    def moved_bytes(self) -> int:
        """Bytes of a block that the route carries."""
        return self.layers * 2 * self.count * self.block_bytes

    def offsets(self, blocks: Sequence[int], layers: range, pieces: int) -> Offsets:
        """Where the pieces of these layers of `blocks` begin in the pool: in order of block, layer, head.

        `pieces` a layer of a block: 1 where K and V are one piece, 2, or one a head of each.
        """
        page, place = np.divmod(np.asarray(blocks, np.int64), self.blocks)
        head_bytes = self.blocks * self.block_bytes
        begin = page * self.page_bytes + place * self.block_bytes
        within = np.zeros(1, np.int64)
        if pieces > 1:
            heads = np.arange(pieces // 2, dtype=np.int64) + self.first
            within = (np.arange(2, dtype=np.int64)[:, None] * self.heads + heads).ravel() * head_bytes
        stride = 2 * self.heads * head_bytes
        offsets: Offsets = (
            begin[:, None, None] + (np.asarray(layers, np.int64) * stride)[:, None] + within
        ).ravel()
        return offsets


@dataclass(frozen=True)
class Route:
    """From rank `writer` to rank `holder`: what of each side's pages goes."""

    writer: int
    holder: int
    source: Cut
    target: Cut

    @property
    def pieces(self) -> int:
        """Runs of bytes that a layer of a block is on both sides."""
        if self.source.whole and self.target.whole:
            return 1
        if self.source.blocks == self.target.blocks == 1:
            return 2
        return 2 * self.source.count

    @property
    def piece_bytes(self) -> int:
        """Bytes of each of these."""
        return self.source.moved_bytes // self.source.layers // self.pieces

    def offsets(self, source: Sequence[int], target: Sequence[int], layers: range) -> tuple[Offsets, Offsets]:
        """Where each piece of the blocks begins in the writer's pool and in the holder's; equally many."""
        return self.source.offsets(source, layers, self.pieces), self.target.offsets(target, layers, self.pieces)


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
def routes(writer: Shape, holder: Shape) -> tuple[Route, ...]:
    """All that has to go for the holder to have what it lacks: each head of each of its ranks comes once.

    Where several ranks of the writer hold a head, the holder's ranks that want it take turns with them.
    """
    tokens = block_tokens(writer.page_size, holder.page_size)
    found, asked = [], [0] * writer.kv_heads
    for to in range(holder.ranks):
        wanted = holder.heads(to)
        chosen: dict[int, list[int]] = {}
        for head in wanted:
            having = [rank for rank in range(writer.ranks) if head in writer.heads(rank)]
            chosen.setdefault(having[asked[head] % len(having)], []).append(head)
            asked[head] += 1
        for rank, heads in chosen.items():
            theirs = writer.heads(rank)
            source = _cut(writer, tokens, theirs, heads)
            found.append(Route(rank, to, source, _cut(holder, tokens, wanted, heads)))
    return tuple(found)


def pairs(writer: Fingerprint, holder: Fingerprint) -> tuple[tuple[int, int], ...]:
    """Which rank of `writer` writes to which of `holder`. Of two that cannot pair, 0 to 0, which will refuse it."""
    if writer.mismatch(holder) is not None:
        return ((0, 0),)
    return tuple((route.writer, route.holder) for route in routes(Shape.of(writer), Shape.of(holder)))


def _cut(shape: Shape, tokens: int, held: range, heads: list[int]) -> Cut:
    return Cut(
        layers=shape.layers,
        heads=len(held),
        first=heads[0] - held.start,
        count=len(heads),
        blocks=shape.page_size // tokens,
        block_bytes=tokens * shape.row_bytes,
    )

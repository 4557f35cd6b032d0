"""What a worker's KV cache keeps of a token, layer by layer: pool, handoff and digests read it here. Pure.

Layers may differ: in heads and row (a window's layer that is smaller), in the bytes of an element (FP8), and in
parts: two where K and V are kept, one where a layer keeps a latent that all heads share (MLA).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, groupby
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class LayerKV:
    """Of one layer: `parts` times `heads` rows a token, each of `row_bytes` bytes."""

    parts: int
    heads: int
    row_bytes: int

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in this layer, all heads together."""
        return self.parts * self.heads * self.row_bytes


@dataclass(frozen=True)
class KVSpec:
    """The layers of a whole model, pages of `page_size` tokens, divided by heads among `ranks` ranks.

    A rank's page is contiguous: its layers one after another, each [parts, heads of the rank, page_size, row].
    """

    layers: tuple[LayerKV, ...]
    page_size: int
    ranks: int = 1

    @classmethod
    def uniform(cls, layers: int, kv_heads: int, page_size: int, row_bytes: int, ranks: int = 1) -> "KVSpec":
        """Layers that are all alike, with K and V."""
        return cls((LayerKV(2, kv_heads, row_bytes),) * layers, page_size, ranks)

    def heads(self, layer: int, rank: int) -> range:
        """The heads of `layer` that `rank` has. With more ranks than heads, a head is on several ranks."""
        heads = self.layers[layer].heads
        if self.ranks <= heads:
            each = heads // self.ranks
            return range(rank * each, (rank + 1) * each)
        head = rank * heads // self.ranks
        return range(head, head + 1)

    @cached_property
    def of_rank(self) -> "KVSpec":
        """What one rank keeps: as much as any other."""
        layers = (replace(layer, heads=len(self.heads(at, 0))) for at, layer in enumerate(self.layers))
        return KVSpec(tuple(layers), self.page_size)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Where each layer of one rank's page begins, in bytes from the page's beginning; last, the page's end."""
        sizes = (layer.token_bytes * self.page_size for layer in self.of_rank.layers)
        return tuple(accumulate(sizes, initial=0))

    @property
    def page_bytes(self) -> int:
        """Bytes of a page on each rank."""
        return self.starts[-1]


def runs_of(layers: Sequence[T], chosen: range) -> list[tuple[range, T]]:
    """The neighbours among `chosen` that are alike, each with what they are."""
    found = []
    for kind, places in groupby(chosen, key=lambda at: layers[at]):
        members = list(places)
        found.append((range(members[0], members[-1] + 1), kind))
    return found

"""The interface between the model and attention: plan once a step, then run each layer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from kvasir_engine.forward_batch import ForwardBatch
from kvasir_engine.kv.pool import KVPool


@dataclass(frozen=True)
class AttentionSpec:
    """The properties of a model that a backend needs, for one rank; the pool's shape has the rest.

    `windows` has one entry a layer: the number of tokens that a query attends to, its own included; None: all
    before it. (A window of W is FlashInfer's `window_left` W - 1, and None its -1.) The values are few, so plan
    once for each.
    """

    heads: int
    scale: float  # of the scores
    windows: tuple[int | None, ...]


class AttentionBackend(Protocol):
    """Writes each layer's new KV into the pool and attends over it, causally, for one batch at a time."""

    pool: KVPool

    def plan(self, batch: ForwardBatch) -> None:
        """Compute what the layers of this step share. The batch's pages must be in the pool."""
        ...

    def run(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Attention of the planned batch's T new tokens in `layer`, within its window.

        q is [T, heads, head_dim], k and v are [T, kv_heads, head_dim], in the batch's order, k and q with their
        positions applied, q unscaled. Returns [T, heads * head_dim].
        """
        ...


@runtime_checkable
class SeparateStore(AttentionBackend, Protocol):
    """A backend that lets another kernel store the new KV: `run` is that store followed by `attend`."""

    def new_rows(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Where the planned batch's new KV of `layer` goes: the pool as rows of head_dim elements, and of each new
        token the row of its first head of K, int64 [T].

        The other heads', K's and then V's, follow a page size apart.
        """
        ...

    def attend(self, layer: int, q: torch.Tensor) -> torch.Tensor:
        """As `run`, but the new KV is already in the pool."""
        ...


@runtime_checkable
class GraphedAttention(AttentionBackend, Protocol):
    """A backend whose `run` can be captured in CUDA graphs: it only queues kernels, with shapes known on the host.

    After `plan_graph`, `run` reads and writes only the pool, its arguments and memory that the backend keeps for
    graphs, so a captured graph stays valid after any later `plan_graph` of the same size.
    """

    def prepare_graphs(self, sizes: Sequence[int], longest: int) -> None:
        """Allocate the memory for batches of `sizes` sequences with at most `longest` pages each."""
        ...

    def plan_graph(self, batch: ForwardBatch) -> None:
        """As `plan`, for a batch of one of these sizes with one new token a sequence."""
        ...

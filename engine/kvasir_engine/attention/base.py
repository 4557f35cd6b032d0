"""What the model asks of attention: plan once a step, then run each layer."""

from dataclasses import dataclass
from typing import Protocol

import torch

from kvasir_engine.attention.pool import KVPool
from kvasir_engine.model.batch import ForwardBatch


@dataclass(frozen=True)
class AttentionSpec:
    """What a backend has to know of a model, as far as a rank holds it; the pool's shape says the rest.

    `windows` gives for each layer how many tokens a query attends to, its own included; None: all before it. (A
    window of W is FlashInfer's `window_left` W - 1, and None its -1.) Few values occur, so plan once for each.
    """

    heads: int
    scale: float  # of the scores
    windows: tuple[int | None, ...]


class AttentionBackend(Protocol):
    """Writes each layer's new KV into the pool and attends over it, causally, for one batch at a time."""

    pool: KVPool

    def plan(self, batch: ForwardBatch) -> None:
        """Compute all that the layers of this step share. The batch's pages must be in the pool."""
        ...

    def run(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Attention of the planned batch's T new tokens in `layer`, within its window.

        q is [T, heads, head_dim], k and v are [T, kv_heads, head_dim], in the batch's order, k and q with their
        positions applied, q unscaled. Returns [T, heads * head_dim].
        """
        ...

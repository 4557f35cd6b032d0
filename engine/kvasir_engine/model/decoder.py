"""The decoder of all supported architectures: grouped-query attention with rotary positions, gated MLPs.

What differs between architectures is in ModelConfig (`models/`): biases, norms, windows, experts.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from kvasir_engine import gpu_kernels
from kvasir_engine.attention.base import AttentionBackend, SeparateStore
from kvasir_engine.model.block import Block
from kvasir_engine.model.block_loader import BlockLoader
from kvasir_engine.model.config import ModelConfig
from kvasir_engine.model.layers.basic import Head, RMSNorm
from kvasir_engine.model.layers.moe import MixtureOfExperts
from kvasir_engine.model.layers.residual import Residual
from kvasir_engine.model.loading.weight_loader import Weights
from kvasir_engine.model.step_graph import Graphs
from kvasir_engine.model.tensor_parallel import ProcessGroup, Shard


@dataclass(frozen=True)
class OtherRows:
    """Places [R] among a step's tokens, and a callback that takes their logits [at most `most`,
    vocab], in order.
    """

    places: torch.Tensor
    most: int
    take: Callable[[torch.Tensor], None]


Attending = Callable[[int, Block, torch.Tensor], torch.Tensor]
"""Maps a layer's number, its block and its product of Q, K and V to its attention output [T, heads * head_dim]."""


class Decoder:
    """A rank's weights on one device, and the forward pass over a planned attention backend."""

    def __init__(self, config: ModelConfig, weights: Weights, shard: Shard, group: ProcessGroup) -> None:
        self._shard = shard
        self._head_dim = config.head_dim
        self._embedding = weights.tensor("model.embed_tokens.weight", config.vocab, config.hidden)
        # Rounded as the embedding is: it was in training.
        self._scale = torch.tensor(config.embedding_scale, dtype=weights.dtype).item()
        self._blocks, self._rotaries = BlockLoader(config, weights, shard, group).load()
        self._graphs = Graphs(self._blocks, len(shard.heads))
        final = weights.tensor("model.norm.weight", config.hidden)
        self._norm = RMSNorm(final, config.norm_eps, torch.float32, config.norm_offset)
        if config.tied_embeddings:
            head = self._embedding[shard.vocab.start : shard.vocab.stop]
        else:
            head = weights.tensor("lm_head.weight", config.vocab, config.hidden, rows=shard.vocab)
        self._head = Head(head, group)

    @property
    def waits(self) -> bool:
        """Whether a layer waits for results of the device."""
        return any(isinstance(block.mlp, MixtureOfExperts) and block.mlp.waits for block in self._blocks)

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        last: torch.Tensor,
        attention: AttentionBackend,
        on_layer: Callable[[int], None] | None = None,
        out: torch.Tensor | None = None,
        others: OtherRows | None = None,
    ) -> torch.Tensor:
        """Logits [S, vocab], float32, after the tokens at the S places `last`, of `tokens` and `positions` [T].

        `others` are more places whose logits are wanted; they are given away a slice at a time.

        `attention` is planned for these tokens. `on_layer` is called with each layer once its KV is in the pool.
        The logits are written to `out` if it is given. This is captured in CUDA graphs (`cuda_graphs.py`): on a GPU
        it must wait for nothing, and read nothing of a step but its arguments.
        """
        chosen = last if others is None else torch.cat((last, others.places))
        x = F.embedding(tokens, self._embedding).float()
        if self._scale != 1.0:
            x *= self._scale
        graph = self._graphs.graph(attention, len(tokens))
        if graph is not None:
            turns = {rotary: rotary.at(positions) for rotary in self._rotaries}
            return self._logits(self._norm(graph.run(x, turns, on_layer)[chosen]), len(last), out, others)
        stream, attend = Residual(x), self._attending(positions, attention)
        for index, block in enumerate(self._blocks):
            attended = attend(index, block, block.qkv(stream.normed(block.attention_norm)))
            if on_layer is not None:
                on_layer(index)
            stream.add(block.output, attended, block.after_attention)
            stream.add(block.mlp, stream.normed(block.mlp_norm), block.after_mlp)
        return self._logits(stream.normed_at(self._norm, chosen), len(last), out, others)

    def _logits(
        self, states: torch.Tensor, count: int, out: torch.Tensor | None, others: OtherRows | None
    ) -> torch.Tensor:
        """The logits of the first `count` of the `states`; the others' go to their callback."""
        if others is None:
            return self._head(states, out)
        for start in range(count, len(states), others.most):
            others.take(self._head(states[start : start + others.most]))
        return self._head(states[:count], out)

    def _attending(self, positions: torch.Tensor, attention: AttentionBackend) -> Attending:
        """The function that splits a layer's product into Q, K and V, stores the new KV and attends, for tokens at
        `positions`.
        """
        heads, kv_heads = len(self._shard.heads), len(self._shard.kv_heads)
        sizes = -1, heads + 2 * kv_heads, self._head_dim
        if gpu_kernels.takes(positions) and isinstance(attention, SeparateStore):
            from kvasir_engine.gpu_kernels.rotary_store import rotary_store

            def fused(index: int, block: Block, product: torch.Tensor) -> torch.Tensor:
                norm, tables = block.head_norm, (block.rotary.cos, block.rotary.sin)
                weights = None if norm is None else (norm.weight, norm.eps)
                pool, first = attention.new_rows(index)
                qkv, size = product.view(sizes), attention.pool.page_size
                return attention.attend(
                    index, rotary_store(qkv, positions, tables, weights, first, pool, heads, size)
                )

            return fused
        turns = {rotary: rotary.at(positions) for rotary in self._rotaries}

        def plain(index: int, block: Block, product: torch.Tensor) -> torch.Tensor:
            qkv = product.view(sizes)
            if block.head_norm is not None:
                block.head_norm(qkv)
            block.rotary.rotate(qkv[:, : heads + kv_heads], turns[block.rotary])
            q, k, v = torch.split(qkv, [heads, kv_heads, kv_heads], 1)
            return attention.run(index, q, k, v)

        return plain

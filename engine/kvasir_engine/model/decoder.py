"""The decoder that all supported architectures are: grouped-query attention with rotary positions, gated MLPs.

What an architecture has of its own is in its ModelConfig (`models/`): biases, norms, windows, experts.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from kvasir_engine import gpu_kernels
from kvasir_engine.attention.base import AttentionBackend, SeparateStore
from kvasir_engine.model.config import Experts, ModelConfig
from kvasir_engine.model.layers.basic import Head, HeadNorm, Linear, RMSNorm, Rotary, RowParallel
from kvasir_engine.model.layers.mlp import ACTIVATIONS, MLP
from kvasir_engine.model.layers.moe import MixtureOfExperts, experts_of
from kvasir_engine.model.layers.residual import Residual
from kvasir_engine.model.loading.weight_loader import Rows, Weights
from kvasir_engine.model.step_graph import Graphs
from kvasir_engine.model.tensor_parallel import ProcessGroup, Shard


@dataclass(frozen=True)
class Block:
    """One layer. Q, K and V are one matrix. Not all models norm the heads, or what attention and MLP add."""

    attention_norm: RMSNorm
    qkv: Linear
    head_norm: HeadNorm | None
    rotary: Rotary
    output: RowParallel
    after_attention: RMSNorm | None
    mlp_norm: RMSNorm
    mlp: MLP | MixtureOfExperts
    after_mlp: RMSNorm | None


@dataclass(frozen=True)
class OtherRows:
    """Places [R] among a step's tokens, and who takes the logits [at most `most`, vocab] behind them, in order."""

    places: torch.Tensor
    most: int
    take: Callable[[torch.Tensor], None]


Attending = Callable[[int, Block, torch.Tensor], torch.Tensor]
"""From a layer's number, its block and its product of Q, K and V to what it attended to [T, heads * head_dim]."""


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
        """Whether a layer waits for what the device has computed."""
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
        """The logits of the first `count` of the `states`; the others' are given away."""
        if others is None:
            return self._head(states, out)
        for start in range(count, len(states), others.most):
            others.take(self._head(states[start : start + others.most]))
        return self._head(states[:count], out)

    def _attending(self, positions: torch.Tensor, attention: AttentionBackend) -> Attending:
        """What makes Q, K and V of a layer's product, stores the new KV and attends, for tokens at `positions`."""
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


class BlockLoader:
    """Makes the blocks of what a rank holds of the weights."""

    def __init__(self, config: ModelConfig, weights: Weights, shard: Shard, group: ProcessGroup) -> None:
        self._config = config
        self._weights = weights
        self._shard = shard
        self._group = group
        dim, kept = config.head_dim, (shard.heads, shard.kv_heads)
        self._q, self._kv = (range(heads.start * dim, heads.stop * dim) for heads in kept)

    def load(self) -> tuple[list[Block], list[Rotary]]:
        """All blocks, and the rotary embeddings that they turn by. Raises ModelError."""
        config, weights = self._config, self._weights
        ropes = [
            config.rope if config.local_rope is None or not window else config.local_rope
            for window in config.windows
        ]
        rotaries = {
            rope: Rotary(rope, config.head_dim, config.max_positions, weights.dtype, weights.device)
            for rope in set(ropes)
        }
        return [self._block(i, rotaries[rope]) for i, rope in enumerate(ropes)], list(rotaries.values())

    def _block(self, index: int, rotary: Rotary) -> Block:
        config = self._config
        layer = f"model.layers.{index}."
        attention = layer + "self_attn."
        # With norms after attention and MLP too, "post attention" is the one after, and the MLP's has another name.
        mlp_norm = "pre_feedforward_layernorm" if config.post_norms else "post_attention_layernorm"
        experts = config.experts if config.experts and index in config.experts.layers else None
        return Block(
            attention_norm=self._norm(layer + "input_layernorm"),
            qkv=self._qkv(attention),
            head_norm=self._head_norm(attention) if config.qk_norm else None,
            rotary=rotary,
            output=RowParallel(
                self._weights.tensor(
                    attention + "o_proj.weight", config.hidden, config.heads * config.head_dim, columns=self._q
                ),
                self._group,
            ),
            after_attention=self._after(layer + "post_attention_layernorm"),
            mlp_norm=self._norm(layer + mlp_norm),
            mlp=self._mixture(layer + "mlp.", experts) if experts else self._mlp(layer + "mlp."),
            after_mlp=self._after(layer + "post_feedforward_layernorm"),
        )

    def _norm(self, name: str, dtype: torch.dtype | None = None) -> RMSNorm:
        config = self._config
        weight = self._weights.tensor(f"{name}.weight", config.hidden)
        return RMSNorm(weight, config.norm_eps, dtype, config.norm_offset)

    def _after(self, name: str) -> RMSNorm | None:
        return self._norm(name, torch.float32) if self._config.post_norms else None

    def _qkv(self, attention: str) -> Linear:
        config = self._config
        q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim

        def stacked(kind: str, *columns: int) -> torch.Tensor:
            parts = (("q", q, self._q), ("k", kv, self._kv), ("v", kv, self._kv))
            return self._weights.stacked(
                [Rows(f"{attention}{name}_proj.{kind}", count, kept) for name, count, kept in parts], *columns
            )

        return Linear(stacked("weight", config.hidden), stacked("bias") if config.qkv_bias else None)

    def _head_norm(self, attention: str) -> HeadNorm:
        config, shard = self._config, self._shard
        q, k = (self._weights.tensor(f"{attention}{name}_norm.weight", config.head_dim) for name in ("q", "k"))
        return HeadNorm(q, k, len(shard.heads), len(shard.kv_heads), config.norm_eps, config.norm_offset)

    def _gate_up(self, mlp: str, count: int, columns: range) -> torch.Tensor:
        names = ("gate_proj.weight", "up_proj.weight")
        return self._weights.stacked([Rows(mlp + name, count, columns) for name in names], self._config.hidden)

    def _down(self, mlp: str, count: int, columns: range) -> torch.Tensor:
        return self._weights.tensor(mlp + "down_proj.weight", self._config.hidden, count, columns=columns)

    def _mlp(self, mlp: str) -> MLP:
        config, columns = self._config, self._shard.intermediate
        return MLP(
            Linear(self._gate_up(mlp, config.intermediate, columns)),
            RowParallel(self._down(mlp, config.intermediate, columns), self._group),
            ACTIVATIONS[config.activation],
        )

    def _mixture(self, mlp: str, experts: Experts) -> MixtureOfExperts:
        config, columns = self._config, self._shard.experts
        names = [f"{mlp}experts.{i}." for i in range(experts.count)]
        weights = (  # one at a time: where they are packed, their memory is needed twice until then
            (self._gate_up(name, experts.intermediate, columns), self._down(name, experts.intermediate, columns))
            for name in names
        )
        router = self._weights.tensor(mlp + "gate.weight", experts.count, config.hidden)
        device, dtype = self._weights.device, self._weights.dtype
        answers = experts_of(weights, device, dtype, ACTIVATIONS[config.activation])
        return MixtureOfExperts(router, answers, experts, self._group)

"""Loads a rank's part of a decoder's layers from a checkpoint."""

import torch

from kvasir_engine.model.block import Block
from kvasir_engine.model.config import Experts, ModelConfig
from kvasir_engine.model.layers.basic import HeadNorm, Linear, RMSNorm, Rotary, RowParallel
from kvasir_engine.model.layers.mlp import ACTIVATIONS, MLP
from kvasir_engine.model.layers.moe import MixtureOfExperts, experts_of
from kvasir_engine.model.loading.weight_loader import Rows, Weights
from kvasir_engine.model.tensor_parallel import ProcessGroup, Shard


class BlockLoader:
    """Makes blocks from a rank's part of the weights."""

    def __init__(self, config: ModelConfig, weights: Weights, shard: Shard, group: ProcessGroup) -> None:
        self._config = config
        self._weights = weights
        self._shard = shard
        self._group = group
        dim, kept = config.head_dim, (shard.heads, shard.kv_heads)
        self._q, self._kv = (range(heads.start * dim, heads.stop * dim) for heads in kept)

    def load(self) -> tuple[list[Block], list[Rotary]]:
        """All blocks, and their rotary embeddings. Raises ModelError."""
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

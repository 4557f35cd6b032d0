"""The Llama architecture (Llama 1 to 3, Mistral, SmolLM2): grouped-query attention, rotary positions, SwiGLU."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from kvasir_engine.attention.base import AttentionBackend
from kvasir_engine.model.config import ModelConfig
from kvasir_engine.model.layers import Head, Linear, RMSNorm, Rotary, RowParallel
from kvasir_engine.model.loader import Rows, Weights
from kvasir_engine.model.parallel import Group, Shard


@dataclass(frozen=True)
class LlamaLayer:
    """One block. Q, K and V are one matrix, gate and up another."""

    input_norm: RMSNorm
    qkv: Linear
    output: RowParallel
    mlp_norm: RMSNorm
    gate_up: Linear
    down: RowParallel


class Llama:
    """Weights on one device, and the forward pass over a planned attention backend."""

    def __init__(self, config: ModelConfig, weights: Weights, shard: Shard, group: Group) -> None:
        self.config = config
        self._shard = shard
        self._embedding = weights.tensor("model.embed_tokens.weight", config.vocab, config.hidden)
        self._layers = [self._load_layer(weights, f"model.layers.{i}.", group) for i in range(config.layers)]
        self._norm = RMSNorm(weights.tensor("model.norm.weight", config.hidden), config.norm_eps, torch.float32)
        if config.tied_embeddings:
            head = self._embedding[shard.vocab.start : shard.vocab.stop]
        else:
            head = weights.tensor("lm_head.weight", config.vocab, config.hidden, rows=shard.vocab)
        self._head = Head(head, group)
        self._rotary = Rotary(config.rope, config.head_dim, config.max_positions, weights.dtype, weights.device)

    def _load_layer(self, weights: Weights, prefix: str, group: Group) -> LlamaLayer:
        config, dim, columns = self.config, self.config.head_dim, self._shard.intermediate
        q, kv = _rows_of(self._shard.heads, dim), _rows_of(self._shard.kv_heads, dim)
        attention, mlp = prefix + "self_attn.", prefix + "mlp."
        return LlamaLayer(
            RMSNorm(weights.tensor(prefix + "input_layernorm.weight", config.hidden), config.norm_eps),
            Linear(
                weights.stacked(
                    [
                        Rows(attention + "q_proj.weight", config.heads * dim, q),
                        Rows(attention + "k_proj.weight", config.kv_heads * dim, kv),
                        Rows(attention + "v_proj.weight", config.kv_heads * dim, kv),
                    ],
                    config.hidden,
                )
            ),
            RowParallel(
                weights.tensor(attention + "o_proj.weight", config.hidden, config.heads * dim, columns=q), group
            ),
            RMSNorm(weights.tensor(prefix + "post_attention_layernorm.weight", config.hidden), config.norm_eps),
            Linear(
                weights.stacked(
                    [
                        Rows(mlp + "gate_proj.weight", config.intermediate, columns),
                        Rows(mlp + "up_proj.weight", config.intermediate, columns),
                    ],
                    config.hidden,
                )
            ),
            RowParallel(
                weights.tensor(mlp + "down_proj.weight", config.hidden, config.intermediate, columns=columns), group
            ),
        )

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        last: torch.Tensor,
        attention: AttentionBackend,
        on_layer: Callable[[int], None] | None = None,
    ) -> torch.Tensor:
        """Logits [S, vocab], float32, after the tokens at the S places `last`, of `tokens` and `positions` [T].

        `attention` is planned for these tokens. `on_layer` is called with each layer once its KV is in the pool.
        """
        heads, kv_heads, head_dim = len(self._shard.heads), len(self._shard.kv_heads), self.config.head_dim
        factors = self._rotary.at(positions)
        # The residual stream is float32: bfloat16 would round away the small contributions of the later layers.
        x = F.embedding(tokens, self._embedding).float()
        for index, layer in enumerate(self._layers):
            qkv = layer.qkv(layer.input_norm(x)).view(-1, heads + 2 * kv_heads, head_dim)
            self._rotary.rotate(qkv[:, : heads + kv_heads], factors)
            q, k, v = torch.split(qkv, [heads, kv_heads, kv_heads], 1)
            x += layer.output(attention.run(index, q, k, v))
            if on_layer is not None:
                on_layer(index)
            gate, up = layer.gate_up(layer.mlp_norm(x)).chunk(2, -1)
            x += layer.down(F.silu(gate).mul_(up))
        return self._head(self._norm(x[last]))


def _rows_of(heads: range, head_dim: int) -> range:
    return range(heads.start * head_dim, heads.stop * head_dim)

"""The Llama architecture (Llama 1 to 3, Mistral, SmolLM2): grouped-query attention, rotary positions, SwiGLU."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from kvasir_engine.attention.base import AttentionBackend
from kvasir_engine.model.config import ModelConfig
from kvasir_engine.model.layers import Head, Linear, RMSNorm, Rotary
from kvasir_engine.model.loader import Weights


@dataclass(frozen=True)
class LlamaLayer:
    """One block. Q, K and V are one matrix, gate and up another."""

    input_norm: RMSNorm
    qkv: Linear
    output: Linear
    mlp_norm: RMSNorm
    gate_up: Linear
    down: Linear


class Llama:
    """Weights on one device, and the forward pass over a planned attention backend."""

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        self.config = config
        self._embedding = weights.tensor("model.embed_tokens.weight", config.vocab, config.hidden)
        self._layers = [self._load_layer(weights, f"model.layers.{i}.") for i in range(config.layers)]
        self._norm = RMSNorm(weights.tensor("model.norm.weight", config.hidden), config.norm_eps, torch.float32)
        head = (
            self._embedding
            if config.tied_embeddings
            else weights.tensor("lm_head.weight", config.vocab, config.hidden)
        )
        self._head = Head(head)
        self._rotary = Rotary(config.rope, config.head_dim, config.max_positions, weights.dtype, weights.device)

    def _load_layer(self, weights: Weights, prefix: str) -> LlamaLayer:
        config = self.config
        q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
        attention, mlp = prefix + "self_attn.", prefix + "mlp."
        return LlamaLayer(
            RMSNorm(weights.tensor(prefix + "input_layernorm.weight", config.hidden), config.norm_eps),
            Linear(
                weights.stacked(
                    {
                        attention + "q_proj.weight": q,
                        attention + "k_proj.weight": kv,
                        attention + "v_proj.weight": kv,
                    },
                    config.hidden,
                )
            ),
            Linear(weights.tensor(attention + "o_proj.weight", config.hidden, q)),
            RMSNorm(weights.tensor(prefix + "post_attention_layernorm.weight", config.hidden), config.norm_eps),
            Linear(
                weights.stacked(
                    {mlp + "gate_proj.weight": config.intermediate, mlp + "up_proj.weight": config.intermediate},
                    config.hidden,
                )
            ),
            Linear(weights.tensor(mlp + "down_proj.weight", config.hidden, config.intermediate)),
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
        heads, kv_heads, head_dim = self.config.heads, self.config.kv_heads, self.config.head_dim
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

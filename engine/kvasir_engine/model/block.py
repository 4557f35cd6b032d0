"""One layer of a decoder: the parts that its forward pass calls."""

from dataclasses import dataclass

from kvasir_engine.model.layers.basic import HeadNorm, Linear, RMSNorm, Rotary, RowParallel
from kvasir_engine.model.layers.mlp import MLP
from kvasir_engine.model.layers.moe import MixtureOfExperts


@dataclass(frozen=True)
class Block:
    """One layer. Q, K and V are one matrix. Some models have no norms of the heads, or of the outputs of attention
    and MLP.
    """

    attention_norm: RMSNorm
    qkv: Linear
    head_norm: HeadNorm | None
    rotary: Rotary
    output: RowParallel
    after_attention: RMSNorm | None
    mlp_norm: RMSNorm
    mlp: MLP | MixtureOfExperts
    after_mlp: RMSNorm | None

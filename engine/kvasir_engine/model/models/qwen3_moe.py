"""Qwen3 with a mixture of experts."""

from dataclasses import replace

from kvasir_engine.errors import ModelError
from kvasir_engine.model.config import Experts, ModelConfig
from kvasir_engine.model.models.fields import Values, integer, refuse, with_windows


def configure(values: Values, config: ModelConfig) -> ModelConfig:
    """Qwen3MoeForCausalLM."""
    refuse(values, "attention_bias")
    # transformers 5 knows num_experts as num_local_experts.
    count = integer(values, "num_experts" if "num_experts" in values else "num_local_experts", 128)
    chosen, step = integer(values, "num_experts_per_tok", 8), integer(values, "decoder_sparse_step", 1)
    if chosen > count:
        raise ModelError(f"config.json: num_experts_per_tok {chosen} is more than the {count} experts")
    dense = set(values.get("mlp_only_layers") or [])
    experts = Experts(
        count=count,
        chosen=chosen,
        intermediate=integer(values, "moe_intermediate_size", 768),
        normalized=bool(values.get("norm_topk_prob", False)),
        layers=frozenset(i for i in range(config.layers) if (i + 1) % step == 0 and i not in dense),
    )
    if values.get("use_sliding_window"):
        config = with_windows(values, config, [True] * config.layers)
    return replace(config, qk_norm=True, experts=experts)

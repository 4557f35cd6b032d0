"""Qwen2: biases on Q, K and V, and windows on the upper layers."""

from dataclasses import replace

from kvasir_engine.model.config import ModelConfig
from kvasir_engine.model.models.fields import Values, integer, local_layers, with_windows


def configure(values: Values, config: ModelConfig) -> ModelConfig:
    """Qwen2ForCausalLM."""
    return replace(with_qwen_windows(values, config), qkv_bias=True)


def with_qwen_windows(values: Values, config: ModelConfig) -> ModelConfig:
    """With windows where use_sliding_window is set, as Qwen2 and Qwen3 write it."""
    if not values.get("use_sliding_window"):
        return config
    first = integer(values, "max_window_layers", 28, least=0)
    return with_windows(values, config, local_layers(values, config, lambda i: i >= first))

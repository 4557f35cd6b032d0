"""Qwen3: each head of Q and K is normalized."""

from dataclasses import replace

from kvasir_engine.model.config import ModelConfig
from kvasir_engine.model.models.fields import Values, refuse
from kvasir_engine.model.models.qwen2 import with_qwen_windows


def configure(values: Values, config: ModelConfig) -> ModelConfig:
    """Qwen3ForCausalLM."""
    refuse(values, "attention_bias")
    return replace(with_qwen_windows(values, config), qk_norm=True)

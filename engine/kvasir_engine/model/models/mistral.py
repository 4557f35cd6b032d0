"""Mistral: a Llama whose layers may have windows."""

from kvasir_engine.model.config import ModelConfig
from kvasir_engine.model.models.fields import Values, with_windows


def configure(values: Values, config: ModelConfig) -> ModelConfig:
    """MistralForCausalLM."""
    if values.get("sliding_window", 4096) is None:
        return config
    return with_windows(values, config, [True] * config.layers)

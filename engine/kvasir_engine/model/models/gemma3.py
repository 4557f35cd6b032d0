"""Gemma 3: local and global layers with rotary positions of their own, and norms behind attention and MLP."""

from dataclasses import replace

from kvasir_engine.model.config import ModelConfig
from kvasir_engine.model.models.fields import Values, integer, local_layers, refuse, rope, with_windows


def configure(values: Values, config: ModelConfig) -> ModelConfig:
    """Gemma3ForCausalLM."""
    refuse(
        values, "attention_bias", "attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention"
    )
    pattern = integer(values, "sliding_window_pattern", 6)
    ropes = values.get("rope_parameters") or {}
    return replace(
        with_windows(values, config, local_layers(values, config, lambda i: (i + 1) % pattern != 0)),
        # transformers 5 has both under rope_parameters; before it, rope_scaling was the global one's.
        rope=rope(
            ropes.get("full_attention") or values.get("rope_scaling") or {}, values.get("rope_theta", 1_000_000.0)
        ),
        local_rope=rope(ropes.get("sliding_attention") or {}, values.get("rope_local_base_freq")),
        tied_embeddings=bool(values.get("tie_word_embeddings", True)),
        attention_scale=integer(values, "query_pre_attn_scalar", 256) ** -0.5,
        embedding_scale=config.hidden**0.5,
        activation=config.activation if values.get("hidden_activation") else "gelu_tanh",
        qk_norm=True,
        post_norms=True,
        norm_offset=1.0,
    )

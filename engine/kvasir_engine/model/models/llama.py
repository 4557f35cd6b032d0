"""Llama, and what all other decoders here have in common with it."""

from typing import Literal

from kvasir_engine.errors import ModelError
from kvasir_engine.model.config import ModelConfig
from kvasir_engine.model.models.fields import Values, integer, refuse, rope

_ACTIVATIONS: dict[str, Literal["silu", "gelu_tanh"]] = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


def decoder(architecture: str, values: Values, eos: int | list[int] | None) -> ModelConfig:
    """What all decoders have, read where all have it: a Llama. Raises ModelError."""
    heads, hidden = integer(values, "num_attention_heads"), integer(values, "hidden_size")
    kv_heads = integer(values, "num_key_value_heads", heads)
    if heads % kv_heads:
        raise ModelError(f"config.json: {heads} attention heads cannot share {kv_heads} KV heads evenly")
    if values.get("head_dim") is None and hidden % heads:
        raise ModelError(
            f"config.json: hidden_size {hidden} is no multiple of {heads} heads and head_dim is missing"
        )
    head_dim, layers = integer(values, "head_dim", hidden // heads), integer(values, "num_hidden_layers")
    activation = values.get("hidden_activation") or values.get("hidden_act") or "silu"
    if activation not in _ACTIVATIONS:
        raise ModelError(
            f"config.json: activation {activation} is not supported; supported: {', '.join(_ACTIVATIONS)}"
        )
    return ModelConfig(
        architecture=architecture,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=integer(values, "intermediate_size"),
        vocab=integer(values, "vocab_size"),
        max_positions=integer(values, "max_position_embeddings"),
        # transformers 5 writes rope_parameters; before it, rope_theta stood alone and the rest in rope_scaling.
        rope=rope(values.get("rope_parameters") or values.get("rope_scaling") or {}, values.get("rope_theta")),
        norm_eps=float(values.get("rms_norm_eps", 1e-6)),
        tied_embeddings=bool(values.get("tie_word_embeddings", False)),
        eos_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (int(eos),),
        dtype=str(values.get("dtype") or values.get("torch_dtype") or "float32"),
        activation=_ACTIVATIONS[activation],
        windows=(None,) * layers,
        attention_scale=head_dim**-0.5,
    )


def configure(values: Values, config: ModelConfig) -> ModelConfig:
    """LlamaForCausalLM."""
    refuse(values, "attention_bias", "mlp_bias")
    return config

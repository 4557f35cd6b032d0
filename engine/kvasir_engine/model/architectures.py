"""From a Hugging Face folder's `config.json` to a ModelConfig: what each architecture has of its own, and what is
refused. Imports no torch.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from kvasir_engine.errors import ModelError
from kvasir_engine.model.config import Experts, ModelConfig, Rope, read_json

Values = Mapping[str, Any]

ACTIVATIONS: dict[str, Literal["silu", "gelu_tanh"]] = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
LAYER_TYPES = {"full_attention": False, "sliding_attention": True}


def load_config(folder: Path) -> ModelConfig:
    """The configuration of the model in `folder`. Raises ModelError."""
    values = read_json(folder / "config.json")
    generation = folder / "generation_config.json"
    eos = read_json(generation).get("eos_token_id") if generation.exists() else None
    return parse_config(values, eos)


def parse_config(values: Values, generation_eos: int | list[int] | None = None) -> ModelConfig:
    """The content of a `config.json` as a ModelConfig. Raises ModelError.

    `generation_eos`, from `generation_config.json`, goes before the one in `config.json`.
    """
    names = values.get("architectures") or []
    architecture = next((name for name in names if name in ARCHITECTURES), None)
    if architecture is None:
        raise ModelError(
            f"architecture {', '.join(names) or 'none'} is not supported; supported: {', '.join(ARCHITECTURES)}"
        )
    if values.get("quantization_config"):
        method = values["quantization_config"].get("quant_method", "unknown")
        raise ModelError(f"config.json: weights quantized by {method} are not supported")
    eos = generation_eos if generation_eos is not None else values.get("eos_token_id")
    return ARCHITECTURES[architecture](values, _decoder(architecture, values, eos))


def _decoder(architecture: str, values: Values, eos: int | list[int] | None) -> ModelConfig:
    """What all decoders have, read where all have it: a Llama."""
    heads, hidden = _integer(values, "num_attention_heads"), _integer(values, "hidden_size")
    kv_heads = _integer(values, "num_key_value_heads", heads)
    if heads % kv_heads:
        raise ModelError(f"config.json: {heads} attention heads cannot share {kv_heads} KV heads evenly")
    if values.get("head_dim") is None and hidden % heads:
        raise ModelError(
            f"config.json: hidden_size {hidden} is no multiple of {heads} heads and head_dim is missing"
        )
    head_dim, layers = _integer(values, "head_dim", hidden // heads), _integer(values, "num_hidden_layers")
    activation = values.get("hidden_activation") or values.get("hidden_act") or "silu"
    if activation not in ACTIVATIONS:
        raise ModelError(
            f"config.json: activation {activation} is not supported; supported: {', '.join(ACTIVATIONS)}"
        )
    return ModelConfig(
        architecture=architecture,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=_integer(values, "intermediate_size"),
        vocab=_integer(values, "vocab_size"),
        max_positions=_integer(values, "max_position_embeddings"),
        # transformers 5 writes rope_parameters; before it, rope_theta stood alone and the rest in rope_scaling.
        rope=_rope(values.get("rope_parameters") or values.get("rope_scaling") or {}, values.get("rope_theta")),
        norm_eps=float(values.get("rms_norm_eps", 1e-6)),
        tied_embeddings=bool(values.get("tie_word_embeddings", False)),
        eos_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (int(eos),),
        dtype=str(values.get("dtype") or values.get("torch_dtype") or "float32"),
        activation=ACTIVATIONS[activation],
        windows=(None,) * layers,
        attention_scale=head_dim**-0.5,
    )


def _llama(values: Values, config: ModelConfig) -> ModelConfig:
    _refuse(values, "attention_bias", "mlp_bias")
    return config


def _mistral(values: Values, config: ModelConfig) -> ModelConfig:
    if values.get("sliding_window", 4096) is None:
        return config
    return _with_windows(values, config, [True] * config.layers)


def _qwen2(values: Values, config: ModelConfig) -> ModelConfig:
    return replace(_qwen_windows(values, config), qkv_bias=True)


def _qwen3(values: Values, config: ModelConfig) -> ModelConfig:
    _refuse(values, "attention_bias")
    return replace(_qwen_windows(values, config), qk_norm=True)


def _qwen3_moe(values: Values, config: ModelConfig) -> ModelConfig:
    _refuse(values, "attention_bias")
    # transformers 5 knows num_experts as num_local_experts.
    count = _integer(values, "num_experts" if "num_experts" in values else "num_local_experts", 128)
    chosen, step = _integer(values, "num_experts_per_tok", 8), _integer(values, "decoder_sparse_step", 1)
    if chosen > count:
        raise ModelError(f"config.json: num_experts_per_tok {chosen} is more than the {count} experts")
    dense = set(values.get("mlp_only_layers") or [])
    experts = Experts(
        count=count,
        chosen=chosen,
        intermediate=_integer(values, "moe_intermediate_size", 768),
        normalized=bool(values.get("norm_topk_prob", False)),
        layers=frozenset(i for i in range(config.layers) if (i + 1) % step == 0 and i not in dense),
    )
    if values.get("use_sliding_window"):
        config = _with_windows(values, config, [True] * config.layers)
    return replace(config, qk_norm=True, experts=experts)


def _gemma3(values: Values, config: ModelConfig) -> ModelConfig:
    _refuse(
        values, "attention_bias", "attn_logit_softcapping", "final_logit_softcapping", "use_bidirectional_attention"
    )
    pattern = _integer(values, "sliding_window_pattern", 6)
    ropes = values.get("rope_parameters") or {}
    return replace(
        _with_windows(values, config, _local_layers(values, config, lambda i: (i + 1) % pattern != 0)),
        # transformers 5 has both under rope_parameters; before it, rope_scaling was the global one's.
        rope=_rope(
            ropes.get("full_attention") or values.get("rope_scaling") or {}, values.get("rope_theta", 1_000_000.0)
        ),
        local_rope=_rope(ropes.get("sliding_attention") or {}, values.get("rope_local_base_freq")),
        tied_embeddings=bool(values.get("tie_word_embeddings", True)),
        attention_scale=_integer(values, "query_pre_attn_scalar", 256) ** -0.5,
        embedding_scale=config.hidden**0.5,
        activation=config.activation if values.get("hidden_activation") else "gelu_tanh",
        qk_norm=True,
        post_norms=True,
        norm_offset=1.0,
    )


ARCHITECTURES: dict[str, Callable[[Values, ModelConfig], ModelConfig]] = {
    "LlamaForCausalLM": _llama,
    "MistralForCausalLM": _mistral,
    "Qwen2ForCausalLM": _qwen2,
    "Qwen3ForCausalLM": _qwen3,
    "Qwen3MoeForCausalLM": _qwen3_moe,
    "Gemma3ForCausalLM": _gemma3,
}
"""By the names that Hugging Face gives them: what each changes of a Llama."""


def _qwen_windows(values: Values, config: ModelConfig) -> ModelConfig:
    if not values.get("use_sliding_window"):
        return config
    first = _integer(values, "max_window_layers", 28, least=0)
    return _with_windows(values, config, _local_layers(values, config, lambda i: i >= first))


def _local_layers(values: Values, config: ModelConfig, default: Callable[[int], bool]) -> list[bool]:
    """Which layers have a window: as `layer_types` says, or by the architecture's rule."""
    kinds = values.get("layer_types")
    if kinds is None:
        return [default(i) for i in range(config.layers)]
    if len(kinds) != config.layers:
        raise ModelError(f"config.json: {len(kinds)} layer_types for {config.layers} layers")
    if unknown := set(kinds) - set(LAYER_TYPES):
        raise ModelError(
            f"config.json: layer type {', '.join(sorted(unknown))} is not supported; "
            f"supported: {', '.join(LAYER_TYPES)}"
        )
    return [LAYER_TYPES[kind] for kind in kinds]


def _with_windows(values: Values, config: ModelConfig, local: list[bool]) -> ModelConfig:
    window = _integer(values, "sliding_window", 4096)
    return replace(config, windows=tuple(window if inside else None for inside in local))


def _refuse(values: Values, *keys: str) -> None:
    for key in keys:
        if values.get(key):
            raise ModelError(f"config.json: {key} is not supported")


def _integer(values: Values, key: str, default: int | None = None, least: int = 1) -> int:
    value = values.get(key)
    if value is None:
        value = default
    if not isinstance(value, int) or value < least:
        kind = "a positive" if least else "a non-negative"
        raise ModelError(f"config.json: {key} must be {kind} integer, not {value!r}")
    return value


def _rope(scaling: Values, theta: float | None) -> Rope:
    """`theta` is the base where `scaling` gives none."""
    base = float(scaling.get("rope_theta") or theta or 10000.0)
    if scaling.get("partial_rotary_factor", 1.0) != 1.0:
        raise ModelError("config.json: rotary positions on a part of the head are not supported")
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    try:
        if kind == "default":
            return Rope(base)
        if kind == "linear":
            return Rope(base, "linear", float(scaling["factor"]))
        if kind == "llama3":
            low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
            original = int(scaling["original_max_position_embeddings"])
            return Rope(base, "llama3", float(scaling["factor"]), low, high, original)
    except KeyError as error:
        raise ModelError(f"config.json: rope scaling {kind} lacks {error}") from None
    raise ModelError(f"config.json: rope scaling {kind} is not supported; supported: default, linear, llama3")

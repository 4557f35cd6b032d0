"""A model's shape, read from the `config.json` of its Hugging Face folder. Imports no torch."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kvasir_engine.model.errors import ModelError

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")
"""The Hugging Face names of what `loader.MODELS` can build."""


@dataclass(frozen=True)
class Rope:
    """Rotary positions: base `theta`, and how lengths beyond training are scaled.

    `linear` divides positions by `factor`. `llama3` divides the frequencies of wavelengths longer than
    `original / low` by `factor`, keeps those shorter than `original / high`, and blends between (Llama 3.1).
    """

    theta: float = 10000.0
    scaling: Literal["none", "linear", "llama3"] = "none"
    factor: float = 1.0
    low: float = 1.0
    high: float = 1.0
    original: int = 0

    def __str__(self) -> str:
        if self.scaling == "none":
            return f"rope theta={self.theta:g}"
        if self.scaling == "linear":
            return f"rope theta={self.theta:g} linear={self.factor:g}"
        return f"rope theta={self.theta:g} llama3={self.factor:g},{self.low:g},{self.high:g},{self.original}"


@dataclass(frozen=True)
class ModelConfig:
    """The numbers that a decoder's code needs. `dtype` is the one the weights were published in."""

    architecture: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    max_positions: int
    rope: Rope
    norm_eps: float
    tied_embeddings: bool
    eos_ids: tuple[int, ...]
    dtype: str
    sliding_window: int | None = None

    @property
    def positions(self) -> str:
        """How positions enter the KV, for its fingerprint: KV of models that differ here is not exchangeable."""
        return f"{self.rope} dim={self.head_dim}"

    def kv_bytes_per_token(self, element_size: int) -> int:
        """Bytes of KV a token takes over all layers."""
        return self.layers * 2 * self.kv_heads * self.head_dim * element_size

    def max_length(self, asked: int = 0) -> int:
        """Most tokens a sequence may have, given the user's limit (0: the model's own). Raises ModelError.

        Attention is computed over the whole sequence, which is what a sliding-window model does up to its window.
        """
        own = self.max_positions if self.sliding_window is None else min(self.max_positions, self.sliding_window)
        if asked <= own:
            return asked or own
        if asked <= self.max_positions:
            raise ModelError(
                f"maximum length {asked} is beyond the model's sliding window of {own} tokens, "
                "and attention in windows is not supported"
            )
        raise ModelError(f"maximum length {asked} is more than the model's {self.max_positions} positions")


def load_config(folder: Path) -> ModelConfig:
    """The configuration of the model in `folder`. Raises ModelError."""
    values = read_json(folder / "config.json")
    generation = folder / "generation_config.json"
    eos = read_json(generation).get("eos_token_id") if generation.exists() else None
    return parse_config(values, eos)


def parse_config(values: Mapping[str, Any], generation_eos: int | list[int] | None = None) -> ModelConfig:
    """The content of a `config.json` as a ModelConfig. Raises ModelError.

    `generation_eos`, from `generation_config.json`, goes before the one in `config.json`.
    """
    names = values.get("architectures") or []
    architecture = next((name for name in names if name in ARCHITECTURES), None)
    if architecture is None:
        raise ModelError(
            f"architecture {', '.join(names) or 'none'} is not supported; supported: {', '.join(ARCHITECTURES)}"
        )
    _refuse_unsupported(values)
    heads, hidden = _positive(values, "num_attention_heads"), _positive(values, "hidden_size")
    kv_heads = _positive(values, "num_key_value_heads", heads)
    if heads % kv_heads:
        raise ModelError(f"config.json: {heads} attention heads cannot share {kv_heads} KV heads evenly")
    if values.get("head_dim") is None and hidden % heads:
        raise ModelError(
            f"config.json: hidden_size {hidden} is no multiple of {heads} heads and head_dim is missing"
        )
    eos = generation_eos if generation_eos is not None else values.get("eos_token_id")
    return ModelConfig(
        architecture=architecture,
        layers=_positive(values, "num_hidden_layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=_positive(values, "head_dim", hidden // heads),
        intermediate=_positive(values, "intermediate_size"),
        vocab=_positive(values, "vocab_size"),
        max_positions=_positive(values, "max_position_embeddings"),
        rope=_rope(values),
        norm_eps=float(values.get("rms_norm_eps", 1e-6)),
        tied_embeddings=bool(values.get("tie_word_embeddings", False)),
        eos_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (int(eos),),
        dtype=str(values.get("dtype") or values.get("torch_dtype") or "float32"),
        sliding_window=values.get("sliding_window") if architecture == "MistralForCausalLM" else None,
    )


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ModelError."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ModelError(f"{path} does not exist") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds a {type(value).__name__}, not an object")
    return value


def _refuse_unsupported(values: Mapping[str, Any]) -> None:
    if values.get("quantization_config"):
        method = values["quantization_config"].get("quant_method", "unknown")
        raise ModelError(f"config.json: weights quantized by {method} are not supported")
    if (activation := values.get("hidden_act", "silu")) != "silu":
        raise ModelError(f"config.json: activation {activation} is not supported; supported: silu")
    for bias in ("attention_bias", "mlp_bias"):
        if values.get(bias):
            raise ModelError(f"config.json: {bias} is not supported")


def _positive(values: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = values.get(key)
    if value is None:
        value = default
    if not isinstance(value, int) or value <= 0:
        raise ModelError(f"config.json: {key} must be a positive integer, not {value!r}")
    return value


def _rope(values: Mapping[str, Any]) -> Rope:
    # transformers 5 writes rope_parameters; before it, rope_theta stood alone and the rest in rope_scaling.
    scaling = values.get("rope_parameters") or values.get("rope_scaling") or {}
    theta = float(scaling.get("rope_theta") or values.get("rope_theta") or 10000.0)
    if scaling.get("partial_rotary_factor", 1.0) != 1.0:
        raise ModelError("config.json: rotary positions on a part of the head are not supported")
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    try:
        if kind == "default":
            return Rope(theta)
        if kind == "linear":
            return Rope(theta, "linear", float(scaling["factor"]))
        if kind == "llama3":
            low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
            original = int(scaling["original_max_position_embeddings"])
            return Rope(theta, "llama3", float(scaling["factor"]), low, high, original)
    except KeyError as error:
        raise ModelError(f"config.json: rope scaling {kind} lacks {error}") from None
    raise ModelError(f"config.json: rope scaling {kind} is not supported; supported: default, linear, llama3")

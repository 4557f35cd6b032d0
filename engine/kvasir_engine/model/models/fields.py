"""Reading a `config.json`: values with their checks, and what several architectures share. Imports no torch."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from kvasir_engine.errors import ModelError
from kvasir_engine.model.config import ModelConfig, Rope

Values = Mapping[str, Any]
"""The content of a `config.json`."""

_WINDOWED = {"full_attention": False, "sliding_attention": True}  # by the names of layer_types


def integer(values: Values, key: str, default: int | None = None, least: int = 1) -> int:
    """The integer `key`, or `default`. Raises ModelError when there is none, or it is below `least`."""
    value = values.get(key)
    if value is None:
        value = default
    if not isinstance(value, int) or value < least:
        kind = "a positive" if least else "a non-negative"
        raise ModelError(f"config.json: {key} must be {kind} integer, not {value!r}")
    return value


def refuse(values: Values, *keys: str) -> None:
    """Raises ModelError where one of `keys` is set: nothing computes what it asks for."""
    for key in keys:
        if values.get(key):
            raise ModelError(f"config.json: {key} is not supported")


def rope(scaling: Values, theta: float | None) -> Rope:
    """Rotary positions; `theta` is the base where `scaling` gives none. Raises ModelError."""
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


def with_windows(values: Values, config: ModelConfig, local: list[bool]) -> ModelConfig:
    """With sliding_window on the layers that are `local`."""
    window = integer(values, "sliding_window", 4096)
    return replace(config, windows=tuple(window if inside else None for inside in local))


def local_layers(values: Values, config: ModelConfig, default: Callable[[int], bool]) -> list[bool]:
    """Which layers have a window: as layer_types says, else by `default` of a layer's number. Raises ModelError."""
    kinds = values.get("layer_types")
    if kinds is None:
        return [default(i) for i in range(config.layers)]
    if len(kinds) != config.layers:
        raise ModelError(f"config.json: {len(kinds)} layer_types for {config.layers} layers")
    if unknown := set(kinds) - set(_WINDOWED):
        raise ModelError(
            f"config.json: layer type {', '.join(sorted(unknown))} is not supported; "
            f"supported: {', '.join(_WINDOWED)}"
        )
    return [_WINDOWED[kind] for kind in kinds]

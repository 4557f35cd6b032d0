"""A model's shape as its code needs it; `models/` reads it from Hugging Face's files. Imports no torch."""

import json
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from kvasir_engine.errors import ModelError


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
class Experts:
    """A mixture of experts instead of the MLP in `layers`: `chosen` of `count` experts process each token.

    `normalized`: the weights of the chosen ones sum to one.
    """

    count: int
    chosen: int
    intermediate: int
    normalized: bool
    layers: frozenset[int]


@dataclass(frozen=True)
class ModelConfig:
    """The sizes of a decoder. `dtype` is the one that the weights were published in.

    `windows` has one entry a layer: the number of tokens that a query attends to, its own included; None: all
    before it. Layers with a window use `local_rope` if it is set.
    """

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
    activation: Literal["silu", "gelu_tanh"]
    windows: tuple[int | None, ...]
    attention_scale: float  # of the scores
    embedding_scale: float = 1.0
    local_rope: Rope | None = None
    qkv_bias: bool = False
    qk_norm: bool = False  # each head of Q and K is normalized
    post_norms: bool = False  # what attention and MLP add is normalized too
    norm_offset: float = 0.0  # added to each norm's weight
    experts: Experts | None = None

    @property
    def positions(self) -> str:
        """How positions affect the KV, for its fingerprint: models that differ here cannot exchange KV."""
        said = [str(self.rope), f"dim={self.head_dim}"]
        if self.local_rope is not None:
            said.append(f"local {self.local_rope}")
        if any(self.windows):
            runs = ((window or "all", len(list(run))) for window, run in groupby(self.windows))
            said.append("windows=" + ",".join(f"{window}*{count}" for window, count in runs))
        return " ".join(said)

    def max_length(self, max_length: int = 0) -> int:
        """The maximum number of tokens of a sequence, given the user's limit (0: the model's own). Raises
        ModelError.
        """
        if max_length > self.max_positions:
            raise ModelError(f"maximum length {max_length} is more than the model's {self.max_positions} positions")
        return max_length or self.max_positions


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ModelError."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ModelError(f"{path} does not exist") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds a {type(value).__name__}, not an object")
    return value

"""The layers that decoders are made of, for inference only."""

import math

import torch
import torch.nn.functional as F

from kvasir_engine.model.config import Rope


class Linear:
    """y = x W^T, with W [out, in] laid out for the device it is on.

    On CPUs, bfloat16 weights are kept in oneDNN's blocked layout: reading them in order makes a step at small
    batches 1.4 to 2 times as fast. `weight` must not be used by others afterwards unless they keep it themselves.
    """

    __slots__ = ("_packed", "_weight")

    def __init__(self, weight: torch.Tensor) -> None:
        self._packed = (
            weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        )
        self._weight: torch.Tensor = (
            torch.ops.mkldnn._reorder_linear_weight(weight, None) if self._packed else weight
        )

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] to [..., out]."""
        if self._packed:
            out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, None, "none", [], "")
            return out
        return F.linear(x, self._weight)


class RMSNorm:
    """Root mean square normalisation over the last dimension, in float32 inside."""

    __slots__ = ("_eps", "_weight")

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        self._weight = weight
        self._eps = eps

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[..., hidden] to the same."""
        return F.rms_norm(x, self._weight.shape, self._weight, self._eps)


class Rotary:
    """Rotary position embedding of the halves layout (Hugging Face's), tables for `max_positions` ready."""

    def __init__(
        self, rope: Rope, head_dim: int, max_positions: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        angles = torch.outer(torch.arange(max_positions, dtype=torch.float32), rotary_frequencies(rope, head_dim))
        cos, sin = angles.cos(), angles.sin()
        self._cos = torch.cat((cos, cos), -1).to(device, dtype)
        self._sin = torch.cat((-sin, sin), -1).to(device, dtype)
        self._half = head_dim // 2

    def at(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The factors at `positions` [T], for `rotate`."""
        return self._cos[positions].unsqueeze(1), self._sin[positions].unsqueeze(1)

    def rotate(self, x: torch.Tensor, factors: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Turn `x` [T, heads, head_dim] in place."""
        swapped = torch.roll(x, self._half, -1)
        x.mul_(factors[0]).addcmul_(swapped, factors[1])


def rotary_frequencies(rope: Rope, head_dim: int) -> torch.Tensor:
    """Radians a position of each of the head_dim / 2 pairs, float32.

    `llama3` is the scaling of Llama 3.1 (llama-models, `apply_scaling`).
    """
    frequencies = 1.0 / rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    if rope.scaling == "linear":
        return frequencies / rope.factor
    if rope.scaling == "llama3":
        turns = rope.original * frequencies / (2 * math.pi)  # within the original length
        kept = ((turns - rope.low) / (rope.high - rope.low)).clamp(0, 1)
        return kept * frequencies + (1 - kept) * frequencies / rope.factor
    return frequencies

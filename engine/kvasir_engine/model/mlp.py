"""The second half of a decoder's block: a gated MLP."""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from kvasir_engine.model import cpu
from kvasir_engine.model.layers import Linear, RowParallel

Activation = Callable[[torch.Tensor], torch.Tensor]
"""From [T, 2 * n], gate first, to activation(gate) * up [T, n]."""


def silu(gate_up: torch.Tensor) -> torch.Tensor:
    """The sigmoid linear unit."""
    fused = cpu.silu_mul(gate_up)
    if fused is not None:
        return fused(gate_up)
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate).mul_(up)


def gelu_tanh(gate_up: torch.Tensor) -> torch.Tensor:
    """The Gaussian error linear unit by its tanh approximation."""
    fused = cpu.gelu_mul(gate_up)
    if fused is not None:
        return fused(gate_up)
    gate, up = gate_up.chunk(2, -1)
    return F.gelu(gate, approximate="tanh").mul_(up)


ACTIVATIONS: dict[str, Activation] = {"silu": silu, "gelu_tanh": gelu_tanh}
"""The code of each of ModelConfig's activations."""


class MLP:
    """down(activation(gate) * up), gate and up being one matrix."""

    def __init__(self, gate_up: Linear, down: Linear | RowParallel, activation: Activation) -> None:
        self._gate_up = gate_up
        self._down = down
        self._activation = activation

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[T, hidden] to the same."""
        return self._down(self._activation(self._gate_up(x)))

    def add_to(self, y: torch.Tensor, x: torch.Tensor) -> None:
        """Add to y [T, hidden], float32 and contiguous, what x gives."""
        self._down.add_to(y, self._activation(self._gate_up(x)))

"""The second half of a decoder's block: a gated MLP."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F

from kvasir_engine import gpu_kernels
from kvasir_engine.model.layers import cpu
from kvasir_engine.model.layers.basic import Linear, RowParallel


@dataclass(frozen=True)
class Activation:
    """From [T, 2 * n], gate first, to activation(gate) * up [T, n]."""

    name: Literal["silu", "gelu_tanh"]
    plain: Callable[[torch.Tensor], torch.Tensor]

    def __call__(self, gate_up: torch.Tensor) -> torch.Tensor:
        if cpu.takes(gate_up):
            return cpu.gate(self.name)(gate_up)
        if gpu_kernels.takes(gate_up):
            from kvasir_engine.gpu_kernels.gate import gated

            return gated(gate_up, self.name)
        gate, up = gate_up.chunk(2, -1)
        return self.plain(gate).mul_(up)


ACTIVATIONS: dict[str, Activation] = {
    "silu": Activation("silu", F.silu),  # the sigmoid linear unit
    "gelu_tanh": Activation("gelu_tanh", partial(F.gelu, approximate="tanh")),
}
"""The code of each of ModelConfig's activations."""


class MLP:
    """down(activation(gate) * up), gate and up being one matrix."""

    def __init__(self, gate_up: Linear, down: Linear | RowParallel, activation: Activation) -> None:
        self.gate_up = gate_up
        self.down = down
        self.activation = activation

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[T, hidden] to the same."""
        return self.down(self.activation(self.gate_up(x)))

    def add_to(self, y: torch.Tensor, x: torch.Tensor) -> None:
        """Add to y [T, hidden], float32 and contiguous, what x gives."""
        self.down.add_to(y, self.activation(self.gate_up(x)))

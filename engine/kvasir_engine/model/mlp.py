"""The second half of a decoder's block: a gated MLP, or a mixture of them."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from kvasir_engine.model import cpu
from kvasir_engine.model.config import Experts
from kvasir_engine.model.layers import Linear, RowParallel
from kvasir_engine.model.parallel import Group

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


class MixtureOfExperts:
    """Each token's sum of its likeliest experts' answers, by the router's weights (Shazeer et al. 2017).

    A rank's `experts` have their part of the columns; the ranks' sums are added. A token's experts are added up in
    float32 in the order of their numbers, so its result does not depend on the tokens beside it.
    """

    def __init__(self, router: torch.Tensor, experts: Sequence[MLP], config: Experts, group: Group) -> None:
        self._router = router.float()  # in bfloat16 experts would often be equally likely
        self._experts = experts
        self._config = config
        self._group = group

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[T, hidden] to the same."""
        chosen = self._config.chosen
        weights, experts = F.linear(x.float(), self._router).softmax(-1).topk(chosen)
        if self._config.normalized:
            weights /= weights.sum(-1, keepdim=True)
        order = experts.flatten().argsort(stable=True)
        weights, tokens = weights.flatten()[order, None], order // chosen
        out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        start = 0
        for expert, count in enumerate(torch.bincount(experts.flatten(), minlength=len(self._experts)).tolist()):
            if count:
                own = slice(start, start + count)
                out.index_add_(0, tokens[own], self._experts[expert](x[tokens[own]]) * weights[own])
                start += count
        summed = out.to(x.dtype)
        self._group.all_reduce(summed)
        return summed

    def add_to(self, y: torch.Tensor, x: torch.Tensor) -> None:
        """Add to y [T, hidden], float32, what x gives."""
        y += self(x)

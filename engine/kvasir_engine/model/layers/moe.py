"""A mixture of experts instead of the MLP: each token is processed by a few of many MLPs."""

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F

from kvasir_engine.model.config import Experts
from kvasir_engine.model.layers import cpu
from kvasir_engine.model.layers.basic import Linear
from kvasir_engine.model.layers.mlp import MLP, Activation
from kvasir_engine.model.tensor_parallel import ProcessGroup


class ExpertOutputs(Protocol):
    """The outputs of the experts."""

    def __call__(self, x: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """[T, hidden] and the numbers of the experts of each, [T, n], to their answers [T, n, hidden]."""
        ...


class ExpertLoop:
    """Runs the experts one after another, each on its tokens: for CPUs, with packed weights."""

    def __init__(self, experts: Sequence[MLP]) -> None:
        self._experts = experts

    def __call__(self, x: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """See ExpertOutputs."""
        order = chosen.flatten().argsort(stable=True)
        tokens = order // chosen.shape[1]
        answers = x.new_empty(chosen.numel(), x.shape[1])
        start = 0
        for expert, count in enumerate(torch.bincount(chosen.flatten(), minlength=len(self._experts)).tolist()):
            if count:
                own = slice(start, start + count)
                answers[order[own]] = self._experts[expert](x[tokens[own]])
                start += count
        return answers.view(*chosen.shape, -1)


class GroupedExperts:
    """All experts in two grouped matrix products: for GPUs, where a loop would wait for the host in each layer.

    `gate_up` is [experts, 2 * columns, hidden], `down` [experts, hidden, columns].
    """

    def __init__(self, gate_up: torch.Tensor, down: torch.Tensor, activation: Activation) -> None:
        self._gate_up = gate_up.transpose(1, 2)
        self._down = down.transpose(1, 2)
        self._activation = activation
        self._numbers = torch.arange(len(gate_up), device=gate_up.device)

    def __call__(self, x: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """See ExpertOutputs."""
        by_expert, order = chosen.flatten().sort(stable=True)
        # Where each expert's rows end. bincount would wait for the device.
        ends = torch.searchsorted(by_expert, self._numbers, right=True, out_int32=True)
        inner = self._activation(F.grouped_mm(x[order // chosen.shape[1]], self._gate_up, offs=ends))
        answers = x.new_empty(chosen.numel(), x.shape[1])
        answers[order] = F.grouped_mm(inner, self._down, offs=ends)
        return answers.view(*chosen.shape, -1)


class MixtureOfExperts:
    """Each token's sum of its likeliest experts' answers, by the router's weights (Shazeer et al. 2017).

    Each rank has a part of the columns of every expert; the ranks' sums are added.
    """

    def __init__(self, router: torch.Tensor, experts: ExpertOutputs, config: Experts, group: ProcessGroup) -> None:
        # In float32: rounded to bfloat16, experts would often be equally likely.
        self._packed = cpu.pack(router, None, exact=True)
        self._router = router.float() if self._packed is None else router.new_empty(0)
        self._invariant = cpu.batch_invariant()
        self._experts = experts
        self._config = config
        self._group = group

    @property
    def waits(self) -> bool:
        """Whether the host must know which experts were chosen."""
        return isinstance(self._experts, ExpertLoop)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[T, hidden] to the same."""
        weights, chosen = self._router_logits(x).softmax(-1).topk(self._config.chosen)
        if self._config.normalized:
            weights /= weights.sum(-1, keepdim=True)
        summed = self._weighted(weights.to(x.dtype), self._experts(x, chosen))
        self._group.all_reduce(summed)
        return summed

    def _router_logits(self, x: torch.Tensor) -> torch.Tensor:
        """The router's logits [T, experts], float32, for [T, hidden]."""
        if self._packed is None:
            return F.linear(x.float(), self._router)
        return self._packed.multiply(x, torch.empty(len(x), self._packed.rows))

    def _weighted(self, weights: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
        """The sums [T, hidden] of `answers` [T, n, hidden] by `weights` [T, n]."""
        if not self._invariant:
            return torch.bmm(weights.unsqueeze(1), answers).squeeze(1)
        # One after the other, each rounded by itself: a library's product may order them by the batch.
        summed = weights[:, :1].float() * answers[:, 0]
        for i in range(1, weights.shape[1]):
            summed += weights[:, i : i + 1].float() * answers[:, i]
        return summed.to(answers.dtype)

    def add_to(self, y: torch.Tensor, x: torch.Tensor) -> None:
        """Add to y [T, hidden], float32, what x gives."""
        y += self(x)


def experts_of(
    weights: Iterable[tuple[torch.Tensor, torch.Tensor]],
    device: torch.device,
    dtype: torch.dtype,
    activation: Activation,
) -> ExpertOutputs:
    """The code for experts of these weights: of each gate and up [2 * columns, hidden], down [hidden, columns].

    PyTorch has the grouped product in bfloat16 for GPUs that have bfloat16.
    """
    if device.type == "cuda" and dtype == torch.bfloat16:
        gate_ups, downs = zip(*weights, strict=True)
        return GroupedExperts(torch.stack(gate_ups), torch.stack(downs), activation)
    return ExpertLoop([MLP(Linear(gate_up), Linear(down), activation) for gate_up, down in weights])

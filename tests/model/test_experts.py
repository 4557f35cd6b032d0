"""Experts in one grouped product, as GPUs have them, against expert after expert."""

import pytest
import torch

from kvasir_engine.model.layers.basic import Linear
from kvasir_engine.model.layers.mlp import ACTIVATIONS, MLP
from kvasir_engine.model.layers.moe import ExpertLoop, GroupedExperts

torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 2, 50])
def test_grouped_experts_answer_as_one_after_the_other(tokens: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(tokens)
    gate_up = torch.randn(7, 2 * 16, 32, generator=generator).to(dtype)
    down = torch.randn(7, 32, 16, generator=generator).to(dtype)
    x = torch.randn(tokens, 32, generator=generator).to(dtype)
    # Three different experts for each token; nobody chooses 0 and 4.
    chosen = torch.stack([torch.tensor([1, 2, 3, 5, 6])[torch.randperm(5, generator=generator)[:3]] for _ in x])
    activation = ACTIVATIONS["silu"]
    loop = ExpertLoop([MLP(Linear(gate_up[i]), Linear(down[i]), activation) for i in range(7)])
    expected = torch.stack(
        [
            torch.stack([one_expert(x[t].double(), gate_up[e].double(), down[e].double()) for e in chosen[t]])
            for t in range(tokens)
        ]
    )
    bound = {"atol": 1e-4, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 3.0, "rtol": 0.03}
    for answers in (loop(x, chosen), GroupedExperts(gate_up, down, activation)(x, chosen)):
        assert answers.dtype == dtype
        torch.testing.assert_close(answers.double(), expected, **bound)
    assert expected.std() > 30


def one_expert(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    gate, up = (gate_up @ x).chunk(2)
    return down @ (gate * gate.sigmoid() * up)

"""Layers whose numbers a whole model's parity would not pin down."""

import pytest
import torch
import torch.nn.functional as F

from kvasir_engine.model.layers.basic import Head, Linear, RMSNorm

torch.set_num_threads(1)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("rows", [1, 2, 17, 300])
def test_a_packed_linear_is_the_plain_product(generator: torch.Generator, rows: int) -> None:
    weight = torch.randn(96, 64, generator=generator).bfloat16()
    x = torch.randn(rows, 64, generator=generator).bfloat16()
    torch.testing.assert_close(Linear(weight)(x), F.linear(x, weight), atol=0.2, rtol=0.02)
    exact = F.linear(x.float(), weight.float())
    assert (Linear(weight)(x).float() - exact).norm() < 0.004 * exact.norm()


def test_the_head_tells_apart_what_bfloat16_makes_equal(generator: torch.Generator) -> None:
    weight = torch.randn(5000, 64, generator=generator).bfloat16()
    x = torch.randn(400, 64, generator=generator) * 4
    exact = F.linear(x, weight.float())
    plain = F.linear(x.bfloat16(), weight).float()
    wrong = int((plain.argmax(-1) != exact.argmax(-1)).sum())
    logits = Head(weight)(x)
    assert logits.dtype == torch.float32
    assert wrong > 4
    assert int((logits.argmax(-1) != exact.argmax(-1)).sum()) < wrong / 4
    torch.testing.assert_close(logits, exact, atol=0.5, rtol=0.02)


def test_a_row_of_the_head_does_not_depend_on_the_others(generator: torch.Generator) -> None:
    weight = torch.randn(500, 64, generator=generator).bfloat16()
    x = torch.randn(9, 64, generator=generator) * 4
    x[3] = 0  # every token is equal there
    head = Head(weight)
    together = head(x)
    assert not together[3].any()
    for row in range(9):
        assert int(head(x[row : row + 1]).argmax()) == int(together[row].argmax())


def test_the_head_survives_what_is_no_number(generator: torch.Generator) -> None:
    weight = torch.randn(50, 8, generator=generator).bfloat16()
    x = torch.full((2, 8), float("nan"))
    assert Head(weight)(x).shape == (2, 50)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rms_norm_divides_by_the_root_of_the_mean_square(generator: torch.Generator, dtype: torch.dtype) -> None:
    x = torch.randn(4, 64, generator=generator) * 100
    weight = torch.rand(64, generator=generator).to(dtype)
    expected = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.float()
    norm = RMSNorm(weight, 1e-5)
    assert norm(x).dtype == dtype
    torch.testing.assert_close(
        norm(x).float(), expected, atol=1e-5, rtol=0.005 if dtype == torch.bfloat16 else 1e-5
    )

"""Products with int8 weights: those of the rounded weights, and close to those of the weights."""

import pytest
import torch

from kvasir_engine.cpu_kernels import unavailable_reason

if (reason := unavailable_reason()) is not None:
    pytest.skip(f"CPU kernels cannot run here: {reason}", allow_module_level=True)

from kvasir_engine.cpu_kernels.int8 import QuantizedWeight, Scratch
from kvasir_engine.cpu_kernels.linear import PackedWeight


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request: pytest.FixtureRequest):  # type: ignore[no-untyped-def]
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    torch.manual_seed(3)
    yield
    torch.set_num_threads(before)


def rounded(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The integers [out, in] and scales [out] that a weight should become."""
    scales = weight.float().abs().amax(1) / 127
    scales[scales == 0] = 1.0
    return (weight.float() / scales[:, None]).round(), scales


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(("rows", "columns"), [(16, 2), (48, 64), (176, 96), (320, 34)])
def test_products_of_any_number_of_tokens(rows: int, columns: int) -> None:
    weight = (torch.randn(rows, columns) * torch.rand(rows, 1).exp2()).bfloat16()
    weight[rows // 2] = 0.0
    bias, scratch = torch.randn(rows), Scratch()
    plain, biased = QuantizedWeight(weight, None, scratch), QuantizedWeight(weight, bias, scratch)
    integers, scales = rounded(weight)
    exact = PackedWeight(integers.bfloat16())  # bfloat16 has them all
    for tokens in [*range(1, 18), 67]:
        x = torch.randn(tokens, columns + 6).bfloat16()[:, :columns]  # rows that are apart
        right = exact.multiply(x, torch.empty(tokens, rows)) * scales
        out = plain.multiply(x, torch.full((tokens, rows), 7.0))
        assert torch.equal(out, right)
        assert torch.equal(plain.multiply(x, x.new_empty(tokens, rows)), out.bfloat16())
        torch.testing.assert_close(plain.multiply(x, torch.full((tokens, rows), 3.0), add=True), out + 3.0)
        torch.testing.assert_close(biased.multiply(x, torch.empty(tokens, rows)), out + bias)
        # Half a step of 1 / 127 of the largest, in each of the inputs at most.
        bound = x.float().abs().sum(1, keepdim=True) * scales / 2
        assert ((out - x.float() @ weight.float().T).abs() <= bound + 1e-3).all()

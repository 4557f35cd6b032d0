"""The residual stream's step in one kernel, a program a row: what a layer gave is added, and the sum is normed.

Unfused these are five kernels: the layer's output is cast and added, and the sum is squared, scaled and cast.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import torch
import triton
import triton.language as tl


@triton.jit
def _inverse_rms(x, HIDDEN: tl.constexpr, EPS: tl.constexpr):
    return 1.0 / tl.sqrt(tl.sum(x * x, 0) / HIDDEN + EPS)


@triton.jit
def _add_norm(
    x, part, after, weight, out,
    HIDDEN: tl.constexpr, BLOCK: tl.constexpr, EPS: tl.constexpr, AFTER_EPS: tl.constexpr,
    PART: tl.constexpr, AFTER: tl.constexpr,
):  # fmt: skip
    at = tl.arange(0, BLOCK)
    inside = at < HIDDEN
    row = tl.program_id(0).to(tl.int64) * HIDDEN
    value = tl.load(x + row + at, mask=inside, other=0.0)
    if PART:
        added = tl.load(part + row + at, mask=inside, other=0.0).to(tl.float32)
        if AFTER:
            scale = tl.load(after + at, mask=inside, other=0.0)
            added = added * _inverse_rms(added, HIDDEN, AFTER_EPS) * scale
        value += added
        tl.store(x + row + at, value, mask=inside)
    scale = tl.load(weight + at, mask=inside, other=0.0)
    normed = value * _inverse_rms(value, HIDDEN, EPS) * scale
    tl.store(out + row + at, normed.to(out.dtype.element_ty), mask=inside)


def shape_of(hidden: int) -> tuple[int, int]:
    """Elements that a program takes, and its warps.

    No fewer elements than threads: then each is one thread's alone, which a row that is changed in place needs.
    """
    block = max(128, triton.next_power_of_2(hidden))
    return block, min(max(block // 512, 1), 16)


def add_norm(
    x: torch.Tensor,
    part: torch.Tensor | None,
    after: tuple[torch.Tensor, float] | None,
    weight: torch.Tensor,
    eps: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The norm of x [T, hidden], float32, as `dtype`, once `part` [T, hidden] is added to x, in place.

    `after` is the weight and the epsilon of the norm that `part` goes through first. Weights are float32.
    """
    tokens, hidden = x.shape
    assert x.is_contiguous()
    assert part is None or part.is_contiguous()
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    block, warps = shape_of(hidden)
    after_weight, after_eps = after if after is not None else (weight, 0.0)
    if tokens:
        _add_norm[(tokens,)](
            x, x if part is None else part, after_weight, weight, out,
            HIDDEN=hidden, BLOCK=block, EPS=eps, AFTER_EPS=after_eps,
            PART=part is not None, AFTER=after is not None, num_warps=warps,
        )  # fmt: skip
    return out

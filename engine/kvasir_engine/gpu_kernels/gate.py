"""activation(gate) * up in one kernel; unfused it is two, and what lies between is written and read again."""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from typing import Literal

import torch
import triton
import triton.language as tl

BLOCK = 1024
WARPS = 4
ROOT = 0.7978845608028654  # of 2 / pi
CUBE = 0.044715


@triton.jit
def _gated(
    gate_up, out,
    COLUMNS: tl.constexpr, GELU: tl.constexpr, ROOT: tl.constexpr, CUBE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < COLUMNS
    row = tl.program_id(0).to(tl.int64)
    begin = gate_up + row * COLUMNS * 2
    gate = tl.load(begin + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(begin + COLUMNS + at, mask=inside, other=0.0).to(tl.float32)
    # gelu by tanh, as (1 + tanh(u)) / 2 is the sigmoid of 2 u
    steepness = gate * (2.0 * ROOT) * (1.0 + CUBE * gate * gate) if GELU else gate
    active = gate / (1.0 + tl.exp(-steepness))
    # Rounded before it is multiplied, as the plain form has it.
    active = active.to(out.dtype.element_ty).to(tl.float32)
    tl.store(out + row * COLUMNS + at, (active * up).to(out.dtype.element_ty), mask=inside)


def gated(gate_up: torch.Tensor, activation: Literal["silu", "gelu_tanh"]) -> torch.Tensor:
    """From [T, 2 * n], gate first, to activation(gate) * up [T, n]."""
    tokens, columns = gate_up.shape[0], gate_up.shape[1] // 2
    assert gate_up.is_contiguous()
    out = gate_up.new_empty(tokens, columns)
    if tokens:
        _gated[(tokens, triton.cdiv(columns, BLOCK))](
            gate_up, out,
            COLUMNS=columns, GELU=activation == "gelu_tanh", ROOT=ROOT, CUBE=CUBE, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return out

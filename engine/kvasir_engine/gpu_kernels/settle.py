"""The head's likeliest tokens told apart as in float32, in one kernel, a program a row.

It reads the rounded logits twice, the first time with their cast, and a row of the head's weight for each rival;
most rows have none. Unfused: a cast, the 17 largest of the vocabulary by a radix sort, and all of their weights.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import torch
import triton
import triton.language as tl

BLOCK = 4096
WARPS = 8


@triton.jit
def _exact(state, weight, HIDDEN: tl.constexpr, BLOCK: tl.constexpr):
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, HIDDEN, BLOCK):
        at = start + tl.arange(0, BLOCK)
        own = tl.load(weight + at, mask=at < HIDDEN, other=0.0).to(tl.float32)
        sums += tl.load(state + at, mask=at < HIDDEN, other=0.0) * own
    return tl.sum(sums, 0)


@triton.jit
def _settle(
    rounded, states, weight, out,
    VOCAB: tl.constexpr, ROUNDING: tl.constexpr, MOST: tl.constexpr,
    HIDDEN: tl.constexpr, BLOCK: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    number = tl.program_id(0).to(tl.int64)
    row, target = rounded + number * VOCAB, out + number * VOCAB
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, VOCAB, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(row + at, mask=at < VOCAB, other=float("-inf")).to(tl.float32)
        tl.store(target + at, value, mask=at < VOCAB)
        largest = tl.maximum(largest, value)
    top = tl.max(largest, 0)
    least = top - tl.abs(top) * ROUNDING
    counts = tl.zeros([BLOCK], tl.int32)
    for start in range(0, VOCAB, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(row + at, mask=at < VOCAB, other=float("-inf")).to(tl.float32)
        counts += ((value >= least) & (at < VOCAB)).to(tl.int32)
    rivals = tl.sum(counts, 0)
    if (rivals > 1) & (rivals <= MOST):
        # What is stored now must come after the casts of other threads.
        tl.debug_barrier()
        for start in range(0, VOCAB, BLOCK):
            at = start + tl.arange(0, BLOCK)
            value = tl.load(row + at, mask=at < VOCAB, other=float("-inf")).to(tl.float32)
            close = (value >= least) & (at < VOCAB)
            left = tl.sum(close.to(tl.int32), 0)
            done = start - 1
            for _ in range(left):
                done = tl.min(tl.where(close & (at > done), at, VOCAB), 0)
                exact = _exact(states + number * HIDDEN, weight + done.to(tl.int64) * HIDDEN, HIDDEN, PART)
                tl.store(target + done, exact)


def settle(
    rounded: torch.Tensor,
    states: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor | None,
    rounding: float,
    most: int,
) -> torch.Tensor:
    """`rounded` [S, vocab] in float32, in `out` if it is given, the largest of a row exactly (see `Head`).

    `states` [S, hidden], float32, times `weight` [vocab, hidden] gave `rounded`. Exact are those that are within
    `rounding` of the largest, if they are 2 to `most`.
    """
    rows, vocab = rounded.shape
    if out is None:
        out = torch.empty(rounded.shape, dtype=torch.float32, device=rounded.device)
    assert rounded.is_contiguous()
    assert states.is_contiguous()
    assert weight.is_contiguous()
    assert out.is_contiguous()
    if rows:
        _settle[(rows,)](
            rounded, states, weight, out, VOCAB=vocab, ROUNDING=rounding, MOST=most,
            **constants(states.shape[1]), num_warps=WARPS,
        )  # fmt: skip
    return out


def constants(hidden: int) -> dict[str, int]:
    """What `_settle` is compiled for of a model."""
    return {"HIDDEN": hidden, "BLOCK": BLOCK, "PART": min(triton.next_power_of_2(hidden), 1024)}

"""`draw.draw` as one kernel, one program a row: it writes nothing of a row's size and waits for nothing.

It finds each cut in the order of the weights' bits, four bits a pass over the row, which stays in the cache: a pass
sums what lies above each of 15 thresholds. Masses are integers, so the order of their sums does not matter.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import torch
import triton
import triton.language as tl

from kvasir_engine.sampling.masses import UNIT_BITS

BLOCK = 512
WARPS = 8


@triton.jit
def _weights(row, at, vocab, top, temperature, min_p):
    """The weights of the tokens `at`, and their bits; 0 beyond the vocabulary and for NaN."""
    logit = tl.load(row + at, mask=at < vocab, other=float("-inf"))
    weight = tl.exp((logit - top) / temperature)
    weight = tl.where((weight >= min_p) & (weight > 0) & (at < vocab), weight, 0.0)
    return weight, weight.to(tl.int32, bitcast=True)


@triton.jit
def _masses(weight, UNIT: tl.constexpr):
    return (weight * UNIT).to(tl.int64)


@triton.jit
def _total(row, vocab, top, temperature, min_p, cut, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    sums = tl.zeros([BLOCK], tl.int64)
    for start in range(0, vocab, BLOCK):
        weight, bits = _weights(row, start + tl.arange(0, BLOCK), vocab, top, temperature, min_p)
        sums += tl.where(bits >= cut, _masses(weight, UNIT), 0)
    return tl.sum(sums, 0)


@triton.jit
def _cut(
    row, vocab, top, temperature, min_p, least, wanted, COUNT: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr
):
    """The largest bits such that what has these or more, and `least`, is `wanted`: tokens with COUNT, else mass."""
    low = tl.full([], 0, tl.int32)
    for digit in range(8):
        shift = tl.maximum(26 - 4 * digit, 0)
        steps = tl.arange(0, 16)
        thresholds = low + (steps << shift)
        sums = tl.zeros([BLOCK, 16], tl.int64)
        for start in range(0, vocab, BLOCK):
            at = start + tl.arange(0, BLOCK)
            weight, bits = _weights(row, at, vocab, top, temperature, min_p)
            if COUNT:  # noqa: SIM108
                amount = (at < vocab).to(tl.int64)
            else:
                amount = tl.where(bits >= least, _masses(weight, UNIT), 0)
            sums += tl.where(bits[:, None] >= thresholds[None, :], amount[:, None], 0)
        enough = (tl.sum(sums, 0) >= wanted) & (steps > 0)
        low += tl.sum(enough.to(tl.int32), 0) << shift
    return low


@triton.jit
def _draw(logits, stride, vocab, table, out, UNIT: tl.constexpr, BLOCK: tl.constexpr):
    number = tl.program_id(0).to(tl.int64)
    row = logits + number * stride
    temperature = tl.load(table + number * 5).to(tl.float32)
    min_p = tl.load(table + number * 5 + 1).to(tl.float32)
    top_k = tl.load(table + number * 5 + 2).to(tl.int64)
    top_p = tl.load(table + number * 5 + 3)
    uniform = tl.load(table + number * 5 + 4)

    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, vocab, BLOCK):
        at = start + tl.arange(0, BLOCK)
        largest = tl.maximum(largest, tl.load(row + at, mask=at < vocab, other=float("-inf")))
    top = tl.max(largest, 0)

    cut = tl.full([], 0, tl.int32)
    if top_k > 0:
        cut = _cut(row, vocab, top, temperature, min_p, cut, top_k, True, UNIT, BLOCK)
    total = _total(row, vocab, top, temperature, min_p, cut, UNIT, BLOCK)
    if top_p < 1:
        wanted = tl.ceil(total.to(tl.float64) * top_p).to(tl.int64)
        wanted = tl.minimum(tl.maximum(wanted, 1), total)
        nucleus = _cut(row, vocab, top, temperature, min_p, cut, wanted, False, UNIT, BLOCK)
        cut = tl.maximum(cut, nucleus)
        total = _total(row, vocab, top, temperature, min_p, cut, UNIT, BLOCK)

    target = tl.minimum((uniform * total.to(tl.float64)).to(tl.int64), total - 1)
    before = tl.full([], 0, tl.int64)
    token = tl.full([], -1, tl.int64)
    for start in range(0, vocab, BLOCK):
        weight, bits = _weights(row, start + tl.arange(0, BLOCK), vocab, top, temperature, min_p)
        mass = tl.where(bits >= cut, _masses(weight, UNIT), 0)
        after = before + tl.sum(mass, 0)
        if (after > target) & (token < 0):
            token = start + tl.sum((before + tl.cumsum(mass, 0) <= target).to(tl.int64), 0)
        before = after
    tl.store(out + number, tl.maximum(token, 0))


def draw_rows(logits: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """As `draw.draw`, with `table` on the device of `logits`."""
    rows, vocab = logits.shape
    out = torch.empty(rows, dtype=torch.int64, device=logits.device)
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    _draw[(rows,)](
        logits, logits.stride(0), vocab, table, out, UNIT=float(1 << UNIT_BITS), BLOCK=BLOCK, num_warps=WARPS
    )
    return out

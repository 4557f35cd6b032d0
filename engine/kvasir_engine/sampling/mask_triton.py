"""Applies grammar masks to all rows of logits in one kernel: bits in, a masked copy out, no large intermediate.

The plain form looks bytes up in a table, adds the result to the masked rows and joins all rows: five kernels.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from kvasir_engine.pinned_memory import staged

BLOCK = 1024
WARPS = 4


@triton.jit
def _mask(logits, stride, places, words, out, vocab, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < vocab
    logit = tl.load(logits + row * stride + at, mask=inside, other=0.0)
    place = tl.load(places + row).to(tl.int64)
    # Of a row without a mask no word is read, and all may come.
    word = tl.load(words + place * width + at // 32, mask=inside & (place >= 0), other=-1)
    allowed = ((word >> (at % 32)) & 1) != 0
    # Added, as the plain form does, so that what is no number stays none.
    tl.store(out + row * vocab + at, logit + tl.where(allowed, 0.0, float("-inf")), mask=inside)


def masked(logits: torch.Tensor, words: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """A copy of `logits` [S, vocab], float32, with the masks of `rows`: `words` [R, ceil(vocab / 32)], int32."""
    count, vocab = logits.shape
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    places = torch.full((count,), -1, dtype=torch.int32)
    places[list(rows)] = torch.arange(len(rows), dtype=torch.int32)
    out = torch.empty(count, vocab, dtype=logits.dtype, device=logits.device)
    _mask[(count, triton.cdiv(vocab, BLOCK))](
        logits, logits.stride(0), staged(places, logits.device), words, out, vocab, words.shape[1],
        BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return out

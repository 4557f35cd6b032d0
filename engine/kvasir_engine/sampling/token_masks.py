"""Grammar masks on rows of logits: tokens that the grammar does not allow become impossible, on the device.

A mask has 32 tokens a word; another thread fills it while the device computes. It is applied after all other
processors, so what is left is allowed by all; a row with nothing left gets `NO_TOKEN`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from kvasir_engine import gpu_kernels
from kvasir_engine.pinned_memory import staged

NO_TOKEN = -1
"""The sampled value where no token is allowed."""
MINUS_INFINITY = float("-inf")


class TokenMask(Protocol):
    """The tokens that may come next in one row."""

    def words(self) -> NDArray[np.int32]:
        """`ceil(vocab / 32)` words: bit `token % 32` of word `token // 32`. Waits until they are filled."""
        ...


@dataclass(frozen=True)
class MaskedRows:
    """The numbers of the rows that have masks, int64 [R], on the device."""

    rows: torch.Tensor

    def without(self, tokens: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """A copy of `tokens` [S], chosen from the masked `logits`, with NO_TOKEN where the chosen token is
        impossible.

        A choice from a row with nothing possible is an impossible token.
        """
        chosen = tokens.index_select(0, self.rows)
        left = logits.flatten().index_select(0, self.rows * logits.shape[1] + chosen)
        return tokens.index_copy(0, self.rows, chosen.masked_fill_(left == MINUS_INFINITY, NO_TOKEN))


def restrict(
    logits: torch.Tensor, masks: Sequence[tuple[int, TokenMask]]
) -> tuple[torch.Tensor, MaskedRows | None]:
    """`logits` [S, vocab], float32, or a copy with the masks of some rows, by row number, applied."""
    if not masks:
        return logits, None
    words = torch.from_numpy(np.stack([mask.words() for _, mask in masks]))
    rows = staged(torch.tensor([row for row, _ in masks]), logits.device)
    if gpu_kernels.takes(logits):
        from kvasir_engine.sampling.mask_triton import masked

        return masked(logits, staged(words, logits.device), [row for row, _ in masks]), MaskedRows(rows)
    whole = len(masks) == len(logits)
    kept = logits if whole else logits.index_select(0, rows)
    kept = kept + penalties(staged(words, logits.device), logits.shape[1])
    return kept if whole else logits.index_copy(0, rows, kept), MaskedRows(rows)


def penalties(words: torch.Tensor, vocab: int) -> torch.Tensor:
    """Float32 [R, vocab] from int32 [R, ceil(vocab / 32)]: 0 where a token is allowed, else minus infinity.

    A table of bytes makes this without a branch a token, which costs a CPU more than the rest of sampling.
    """
    bytes_ = words.view(torch.uint8)
    found = _of_bytes(words.device).index_select(0, bytes_.flatten().int()).view(len(words), -1)
    return found if found.shape[1] == vocab else found[:, :vocab]


@cache
def _of_bytes(device: torch.device) -> torch.Tensor:
    """[256, 8]: what each value of a mask's byte adds to the logits of its 8 tokens."""
    bits = torch.arange(256).unsqueeze(1).bitwise_right_shift(torch.arange(8)).bitwise_and(1)
    return torch.zeros(256, 8).masked_fill(bits == 0, MINUS_INFINITY).to(device)

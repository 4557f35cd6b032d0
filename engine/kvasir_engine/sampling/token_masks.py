"""Rows of logits of which a grammar lets some tokens come: the others become impossible, on the logits' device.

A mask is bits, 32 tokens a word, filled by another thread while the device computes. It comes after all other
processors, so that what is left is what all of them allow; where that is nothing, the row's token is `NO_TOKEN`.
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
"""What is sampled where nothing is allowed."""
MINUS_INFINITY = float("-inf")


class TokenMask(Protocol):
    """Which tokens may come next in one row."""

    def words(self) -> NDArray[np.int32]:
        """`ceil(vocab / 32)` words: bit `token % 32` of word `token // 32`. Waits until they are there."""
        ...


@dataclass(frozen=True)
class MaskedRows:
    """The numbers of the rows that have masks, int64 [R], on the device."""

    rows: torch.Tensor

    def without(self, tokens: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """`tokens` [S], chosen of the masked `logits`, with NO_TOKEN where those are impossible too, as a copy.

        Whoever finds nothing that is possible chooses something that is not.
        """
        chosen = tokens.index_select(0, self.rows)
        left = logits.flatten().index_select(0, self.rows * logits.shape[1] + chosen)
        return tokens.index_copy(0, self.rows, chosen.masked_fill_(left == MINUS_INFINITY, NO_TOKEN))


def restrict(
    logits: torch.Tensor, masks: Sequence[tuple[int, TokenMask]]
) -> tuple[torch.Tensor, MaskedRows | None]:
    """`logits` [S, vocab], float32, or a copy with the masks of some rows, by number, where there are any."""
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
    """Float32 [R, vocab] of int32 [R, ceil(vocab / 32)]: 0 where a token is allowed, else minus infinity.

    By whole bytes, from a table: nothing is decided a token, which costs a CPU more than the rest of sampling.
    """
    bytes_ = words.view(torch.uint8)
    found = _of_bytes(words.device).index_select(0, bytes_.flatten().int()).view(len(words), -1)
    return found if found.shape[1] == vocab else found[:, :vocab]


@cache
def _of_bytes(device: torch.device) -> torch.Tensor:
    """[256, 8]: what a byte of a mask adds to the logits of its tokens."""
    bits = torch.arange(256).unsqueeze(1).bitwise_right_shift(torch.arange(8)).bitwise_and(1)
    return torch.zeros(256, 8).masked_fill(bits == 0, MINUS_INFINITY).to(device)

"""Rows of logits of which a grammar lets some tokens come: the others become impossible, on the logits' device.

A mask is bits, 32 tokens a word, filled by another thread while the device computes. It comes after all other
processors, so that what is left is what all of them allow; where that is nothing, the row's token is `NO_TOKEN`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

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
    """The numbers of the rows that have masks, int64 [R], and whether nothing is left of each, on the device."""

    rows: torch.Tensor
    empty: torch.Tensor

    def without(self, tokens: torch.Tensor) -> torch.Tensor:
        """`tokens` [S] with NO_TOKEN where nothing was left, as a copy."""
        chosen = tokens.index_select(0, self.rows)
        return tokens.index_copy(0, self.rows, chosen.masked_fill_(self.empty, NO_TOKEN))


def restrict(
    logits: torch.Tensor, masks: Sequence[tuple[int, TokenMask]]
) -> tuple[torch.Tensor, MaskedRows | None]:
    """`logits` [S, vocab], float32, or a copy with the masks of some rows, by number, where there are any."""
    if not masks:
        return logits, None
    vocab = logits.shape[1]
    words = torch.from_numpy(np.stack([mask.words() for _, mask in masks]))
    rows = staged(torch.tensor([row for row, _ in masks]), logits.device)
    kept = logits if len(masks) == len(logits) else logits.index_select(0, rows)
    kept = kept.masked_fill(~_bits(staged(words, logits.device), vocab), MINUS_INFINITY)
    found = MaskedRows(rows, kept.amax(-1) == MINUS_INFINITY)
    return kept if len(masks) == len(logits) else logits.index_copy(0, rows, kept), found


def _bits(words: torch.Tensor, vocab: int) -> torch.Tensor:
    """Bool [R, vocab] of int32 [R, ceil(vocab / 32)]."""
    if words.device.type == "cpu":
        bytes_ = words.numpy().view(np.uint8)
        bits = np.unpackbits(bytes_, axis=1, count=vocab, bitorder="little")
        return torch.from_numpy(bits.view(np.bool_))
    return unpacked(words, vocab)


def unpacked(words: torch.Tensor, vocab: int) -> torch.Tensor:
    """The bits on a device. By bytes: an eighth of the memory that whole words would take on their way."""
    places = torch.arange(8, device=words.device, dtype=torch.uint8)
    bits = words.view(torch.uint8).unsqueeze(-1).bitwise_right_shift(places).bitwise_and_(1)
    return (bits != 0).flatten(1)[:, :vocab]

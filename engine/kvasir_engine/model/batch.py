"""One step's work as the model sees it."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ForwardBatch:
    """`S` sequences with `T` new tokens in all, sequence after sequence. CPU tensors; the runner moves them.

    Decode is a sequence with one new token; a prefill chunk has more. Sequence i's new tokens are the last
    `query_lens[i]` of its `context_lens[i]` tokens; the KV of the earlier ones is in the pool already.
    Token j of a sequence lives in slot `j % page_size` of page `page_table[i, j // page_size]`.
    """

    tokens: torch.Tensor  # int64 [T]
    positions: torch.Tensor  # int64 [T]
    query_lens: list[int]  # [S]
    context_lens: list[int]  # [S], new tokens included
    page_table: torch.Tensor  # int64 [S, most pages of any sequence], padded with 0
    awaited: tuple[tuple[int, int], ...] = ()
    """Places in `tokens` (which have 0 there) of what the step before samples, with the row in which it does."""

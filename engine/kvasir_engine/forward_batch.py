"""One step's work as the model sees it."""

from dataclasses import dataclass, replace

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
    scored: tuple[tuple[int, int, int], ...] = ()
    """Places in `tokens` behind which the log-probability of a prompt's next token is wanted: (place, that token,
    how many alternatives)."""


def decodes_only(batch: ForwardBatch) -> bool:
    """Whether every sequence has one new token."""
    return all(count == 1 for count in batch.query_lens)


def padded(batch: ForwardBatch, size: int, scratch: int) -> ForwardBatch:
    """`batch`, of one new token a sequence, with others added up to `size`: first tokens, all in page `scratch`."""
    more = size - len(batch.query_lens)
    if not more:
        return batch
    zeros = batch.tokens.new_zeros(more)
    pages = batch.page_table.new_full((more, batch.page_table.shape[1]), scratch)
    return replace(
        batch,
        tokens=torch.cat((batch.tokens, zeros)),
        positions=torch.cat((batch.positions, zeros)),
        query_lens=[*batch.query_lens, *[1] * more],
        context_lens=[*batch.context_lens, *[1] * more],
        page_table=torch.cat((batch.page_table, pages)),
    )

"""Penalties, biases and bans on the rows of logits that want them, on the logits' device.

The order is vLLM's: `allowed_token_ids`, `bad_words`, `logit_bias`, then the penalties, repetition (Keskar et al.,
CTRL, 2019) before frequency and presence. Only the logits that change are read and written, row by row, so a row's
result does not depend on its batch.
"""

from collections.abc import Sequence

import numpy as np
import torch

from kvasir_engine.pinned_memory import staged
from kvasir_engine.sampling.token_history import LogitsWork

MINUS_INFINITY = float("-inf")
Rows = Sequence[tuple[int, LogitsWork]]


def process(logits: torch.Tensor, rows: Rows, sampled: torch.Tensor | None) -> torch.Tensor:
    """A copy of `logits` [S, vocab], float32, with the work of each of `rows`, by row number, applied.

    `sampled`, int64, are the tokens of the previous step, which the host may not know yet. Waits for nothing.
    """
    vocab = logits.shape[1]
    flat = logits.flatten().clone()
    if any(work.allowed is not None for _, work in rows):
        _allow(flat.view_as(logits), rows)
    _ban(flat, rows, vocab, sampled)
    biased = [(row, work) for row, work in rows if len(work.bias_ids)]
    if biased:
        places = _places([(row, work.bias_ids) for row, work in biased], vocab)
        biases = torch.from_numpy(np.concatenate([work.biases for _, work in biased]))
        flat.index_add_(0, _on(places, flat), staged(biases, flat.device))
    penalized = [(row, work) for row, work in rows if work.penalizes]
    if penalized:
        _penalize(flat, penalized, vocab, sampled)
    return flat.view_as(logits)


def _on(numbers: np.ndarray, like: torch.Tensor) -> torch.Tensor:
    return staged(torch.from_numpy(numbers), like.device)


def _places(ids: Sequence[tuple[int, np.ndarray]], vocab: int) -> np.ndarray:
    """The places of the rows' tokens in the flattened logits."""
    return np.concatenate([row * vocab + some for row, some in ids])


def _allow(logits: torch.Tensor, rows: Rows) -> None:
    allowed = [(row, work.allowed) for row, work in rows if work.allowed is not None]
    flat = logits.view(-1)
    places = _on(_places(allowed, logits.shape[1]), flat)
    kept = flat.index_select(0, places)
    logits.index_fill_(0, _on(np.array([row for row, _ in allowed]), flat), MINUS_INFINITY)
    flat.index_copy_(0, places, kept)


def _ban(flat: torch.Tensor, rows: Rows, vocab: int, sampled: torch.Tensor | None) -> None:
    banned = [(row, work.banned) for row, work in rows if len(work.banned)]
    if banned:
        flat.index_fill_(0, _on(_places(banned, vocab), flat), MINUS_INFINITY)
    waiting = [(row, work) for row, work in rows if len(work.then[0])]
    if waiting:
        before = np.repeat([work.awaited for _, work in waiting], [len(work.then[0]) for _, work in waiting])
        first = _on(np.concatenate([work.then[0] for _, work in waiting]), flat)
        follows = _known(sampled).index_select(0, _on(before.astype(np.int64), flat)) == first
        # One token may end several words, and be impossible by one of them.
        less = torch.zeros(len(first), device=flat.device).masked_fill_(follows, MINUS_INFINITY)
        flat.index_add_(0, _on(_places([(row, work.then[1]) for row, work in waiting], vocab), flat), less)


def _known(sampled: torch.Tensor | None) -> torch.Tensor:
    assert sampled is not None, "nothing was sampled before"
    return sampled


def _penalize(flat: torch.Tensor, rows: Rows, vocab: int, sampled: torch.Tensor | None) -> None:
    sizes = [len(work.ids) for _, work in rows]
    places = _on(_places([(row, work.ids) for row, work in rows], vocab), flat)
    counts = _on(np.concatenate([work.counts for _, work in rows]), flat)
    factors = np.array([[work.repetition, work.frequency, work.presence] for _, work in rows], np.float32)
    how = np.repeat(factors, sizes, 0)
    waiting = [index for index, (_, work) in enumerate(rows) if work.awaited is not None]
    if waiting:
        # The awaited token is one more entry; where it is among the known ones, both come to the same logit.
        which = _on(np.array([rows[index][1].awaited for index in waiting]), flat)
        starts = _on(np.array([rows[index][0] * vocab for index in waiting]), flat)
        last = _known(sampled).index_select(0, which) + starts
        owner = np.full(len(rows), -1)
        owner[waiting] = np.arange(len(waiting))
        owners = _on(np.repeat(owner, sizes), flat)
        same = (owners >= 0) & (places == last.index_select(0, owners.clamp(min=0)))
        before = torch.zeros(len(waiting), dtype=counts.dtype, device=flat.device)
        before.index_add_(0, owners.clamp(min=0), torch.where(same, counts, 0))
        counts = torch.cat([counts + same.to(counts.dtype), before + 1])
        places = torch.cat([places, last])
        how = np.concatenate([how, factors[waiting]])
    repetition, frequency, presence = _on(np.ascontiguousarray(how.T), flat)
    values = flat.index_select(0, places)
    values = torch.where(values > 0, values / repetition, values * repetition)
    values -= frequency * counts
    values -= presence * (counts > 0)
    flat.index_copy_(0, places, values)

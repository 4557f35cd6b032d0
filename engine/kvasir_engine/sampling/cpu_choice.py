"""Chooses tokens from rows of logits with the CPU kernels: one pass over a greedy row, with or without a mask."""

from collections.abc import Mapping, Sequence

import torch

from kvasir_engine.cpu_kernels.masked_rows import forbid, largest
from kvasir_engine.sampling.draw import Draws, draw
from kvasir_engine.sampling.token_masks import MINUS_INFINITY, NO_TOKEN, TokenMask


def choose(
    logits: torch.Tensor, masks: Mapping[int, TokenMask], drawn: Sequence[int], how: Draws | None
) -> torch.Tensor:
    """Tokens, int64 [S], for `logits` [S, vocab], float32, left unchanged: the likeliest, or in the rows `drawn`
    one drawn by `how`. `masks` are by row; NO_TOKEN where a mask leaves nothing. Waits for the masks.
    """
    logits = logits.contiguous()
    tokens = torch.empty(len(logits), dtype=torch.int64)
    greedy = sorted(set(range(len(logits))) - set(drawn))
    if greedy:
        found = largest(logits, [(row, masks[row].words() if row in masks else None) for row in greedy])
        free = torch.tensor([row not in masks for row in greedy])
        tokens[greedy] = torch.where(free, found.clamp(min=0), found)
    if how is not None:
        restricted = [(place, masks[row].words()) for place, row in enumerate(drawn) if row in masks]
        rows = logits if len(drawn) == len(logits) and not restricted else logits[list(drawn)]
        forbid(rows, restricted)
        chosen = draw(rows, how)
        for place, _ in restricted:
            if rows[place, chosen[place]] == MINUS_INFINITY:
                chosen[place] = NO_TOKEN
        tokens[list(drawn)] = chosen
    return tokens

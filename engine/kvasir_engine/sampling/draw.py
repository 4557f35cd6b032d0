"""Draws a token from each row's distribution in integers: the same for any order of sums, on any device.

A token's weight is exp((logit - the row's largest) / temperature), in float32, so the likeliest has 1; its *mass*
is the weight in units of 2^-44, an integer. `min_p`, `top_k` and `top_p` each keep a part of what the one before
kept, in vLLM's order; ties with the last kept token are kept. The request's uniform number goes through the inverse
of the cumulative distribution of the rest, over token ids. Sums of masses are exact (below 2^63 for fewer than 2^19
tokens), so a token is a function of its row, seed and position, however a device divides its work.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kvasir_engine.protocol import Sampling
from kvasir_engine.sampling.masses import masses_of
from kvasir_engine.sampling.uniform import uniforms

LARGEST_VOCAB = (1 << 19) - 1
_LEVEL = 19
"""The first histogram of weights ignores this many low bits."""
_BINS = (0x3F80_0000 >> _LEVEL) + 1
_FEW = 2048
_BLOCK = 512
"""Masses are summed in blocks of this size to find where the uniform number falls."""


@dataclass(frozen=True)
class Draws:
    """The parameters of drawn rows. `table` is float64 [R, 5] on the host: temperature, min_p, top_k (0: all),
    top_p, uniform.
    """

    table: torch.Tensor

    @staticmethod
    def of(params: Sequence[Sampling], positions: Sequence[int], vocab: int) -> "Draws":
        limits = [p.top_k if 0 < p.top_k < vocab else 0 for p in params]
        seeds = np.array([p.seed & 0xFFFF_FFFF_FFFF_FFFF for p in params], dtype=np.uint64)
        chances = uniforms(seeds, np.array(positions, dtype=np.uint64))
        rows = zip(params, limits, chances.tolist(), strict=True)
        return Draws(
            torch.tensor(
                [[p.temperature, p.min_p, limit, p.top_p, chance] for p, limit, chance in rows],
                dtype=torch.float64,
            )
        )


def draw(logits: torch.Tensor, draws: Draws) -> torch.Tensor:
    """Tokens, int64 [R], for `logits` [R, vocab], float32, on their device; does not wait for a GPU."""
    if logits.shape[1] > LARGEST_VOCAB:
        raise ValueError(f"a vocabulary of {logits.shape[1]} tokens; at most {LARGEST_VOCAB} can be sampled from")
    if logits.device.type == "cuda":
        from kvasir_engine.pinned_memory import staged
        from kvasir_engine.sampling.draw_triton import draw_rows

        return draw_rows(logits, staged(draws.table, logits.device))
    return _draw(logits, draws.table)


def _draw(logits: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    temperature, min_p, top_k, top_p, uniform = table.unsqueeze(2).unbind(1)
    top = logits.amax(-1, keepdim=True)
    weights = logits - top
    if (temperature != 1).any():
        weights /= temperature.float()
    weights.exp_()
    if not top.isfinite().all():
        weights.nan_to_num_(0.0)  # what is no number weighs nothing
    if (min_p > 0).any():
        weights.masked_fill_(weights < min_p.float(), 0.0)
    limited = torch.nonzero(top_k[:, 0] > 0).flatten()
    if len(limited):
        _keep(weights, limited, _last_of(weights, limited, top_k[limited].long()))
    nuclear = torch.nonzero(top_p[:, 0] < 1).flatten()
    masses = masses_of(weights)
    if len(nuclear):
        for row in nuclear.tolist():
            few = 0 < top_k[row, 0] <= _FEW
            cut = nucleus_cut(weights[row], masses[row], float(top_p[row, 0]), bool(few))
            masses[row].masked_fill_(weights[row] < cut, 0)
    return pick(masses, uniform)


def _last_of(weights: torch.Tensor, rows: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    largest = (weights if len(rows) == len(weights) else weights[rows]).topk(int(counts.max()), -1).values
    return largest.gather(1, counts - 1)


def _keep(weights: torch.Tensor, rows: torch.Tensor, least: torch.Tensor) -> None:
    """Set all weights of `rows` below `least` to 0."""
    if len(rows) == len(weights):
        weights.masked_fill_(weights < least, 0.0)
    else:
        kept = weights[rows]
        weights[rows] = kept.masked_fill_(kept < least, 0.0)


def wanted_of(total: int, share: float) -> int:
    """The mass that is at least `share` of `total`; at least one if there is any."""
    return min(max(int(np.ceil(float(total) * share)), 1), total)


def nucleus_cut(weights: torch.Tensor, masses: torch.Tensor, share: float, few: bool = False) -> float:
    """The smallest weight in the nucleus: the fewest likeliest of `weights` [vocab] with `share` of all masses.

    `few`: most weights are 0, so the others are sorted at once.
    """
    wanted = wanted_of(int(masses.sum()), share)
    if not wanted:
        return 0.0
    if few:
        inside, before = torch.nonzero(masses).flatten(), 0
    else:
        # Non-negative floats are ordered as their bits are.
        places = weights.view(torch.int32) >> _LEVEL
        above = torch.zeros(_BINS, dtype=torch.int64).scatter_add_(0, places.long(), masses).flip(0).cumsum_(0)
        # The bin in which the sum from above reaches what is wanted; what is in it is put in order.
        at = int(torch.searchsorted(above, wanted))
        inside, before = torch.nonzero(places == _BINS - 1 - at).flatten(), int(above[at - 1]) if at else 0
    order = weights[inside].sort(descending=True)
    reached = masses[inside][order.indices].cumsum(0) + before
    place = min(int(torch.searchsorted(reached, wanted)), len(inside) - 1)
    return float(order.values[place])


def pick(masses: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """For each row of `masses` [R, vocab] the token at `uniform` [R, 1], float64, of the sum of all; int64 [R]."""
    rows, vocab = masses.shape
    blocks = -(-vocab // _BLOCK)
    padded = masses if vocab % _BLOCK == 0 else torch.nn.functional.pad(masses, (0, blocks * _BLOCK - vocab))
    padded = padded.view(rows, blocks, _BLOCK)
    cumulative = padded.sum(-1).cumsum_(-1)
    total = cumulative[:, -1:]
    target = (uniform * total).long().minimum(total - 1)
    # The first whose sum is beyond the target: its own mass is never zero.
    block = torch.searchsorted(cumulative, target, right=True).clamp_(max=blocks - 1)
    before = torch.where(block > 0, cumulative.gather(1, (block - 1).clamp_(min=0)), 0)
    inside = padded[torch.arange(rows), block[:, 0]].cumsum_(-1)
    place = torch.searchsorted(inside, target - before, right=True)
    return (block * _BLOCK + place).squeeze(1).clamp_(max=vocab - 1)

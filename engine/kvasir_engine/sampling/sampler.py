"""From logits to tokens. A row's result depends on that row alone, never on what it is batched with."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kvasir_engine.protocol import Sampling, TokenLogprobs
from kvasir_engine.sampling.uniform import uniforms

GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy: dividing by them leaves one token anyway, or overflows."""

_NUCLEUS = (256, 4096)
"""Tokens sorted to find `top_p`'s cut, the larger number and then all only for rows that the smaller left short."""


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """How the next token of one sequence is chosen.

    `position` is the place that the token will have in its sequence, prompt included, from 0; `generated` is how
    many tokens were generated before it.
    """

    sampling: Sampling
    position: int
    generated: int = 0


@dataclass(frozen=True, slots=True)
class Sampled:
    """A token for each row, and its log-probabilities where they were asked for."""

    tokens: list[int]
    logprobs: list[TokenLogprobs | None]


@torch.inference_mode()
def sample(logits: torch.Tensor, requests: Sequence[SampleRequest]) -> Sampled:
    """The next token for each row of `logits` [S, vocab], float32, left unchanged.

    Temperature 0 takes the likeliest token, the first of equals. Otherwise the logits are divided by the
    temperature; `min_p`, `top_k` and `top_p` each keep a part of what the one before kept, in vLLM's order, with
    tokens as likely as the last one kept; and the uniform of (seed, position) goes through the inverse of the
    distribution function over token ids. Until `min_tokens` tokens are generated, stop tokens are impossible.
    Log-probabilities are those of the model's own distribution, before all of this, as vLLM and OpenAI report them.
    """
    masked = _without_early_stops(logits, requests)
    tokens = masked.argmax(-1)
    drawn = [row for row, request in enumerate(requests) if request.sampling.temperature >= GREEDY_BELOW]
    if drawn:
        tokens[drawn] = _draw(masked[drawn], [requests[row] for row in drawn])
    return Sampled(tokens.tolist(), _logprobs(logits, tokens, requests))


def _without_early_stops(logits: torch.Tensor, requests: Sequence[SampleRequest]) -> torch.Tensor:
    """`logits`, or a changed copy where a stop token could come before `min_tokens`."""
    masked = logits
    for row, request in enumerate(requests):
        if request.generated < request.sampling.min_tokens and request.sampling.stop_token_ids:
            if masked is logits:
                masked = logits.clone()
            masked[row, request.sampling.stop_token_ids] = float("-inf")
    return masked


def _draw(logits: torch.Tensor, requests: Sequence[SampleRequest]) -> torch.Tensor:
    """Tokens [R] for `logits` [R, vocab] of requests that all have a temperature."""
    params = [request.sampling for request in requests]
    temperature = _column([p.temperature for p in params], logits)
    # Relative to the likeliest token, which weighs 1.
    weights = ((logits - logits.amax(-1, keepdim=True)) / temperature).exp_()
    if any(p.min_p > 0 for p in params):
        weights.masked_fill_(weights < _column([p.min_p for p in params], logits), 0.0)
    limited = [row for row, p in enumerate(params) if 0 < p.top_k < logits.shape[1]]
    if limited:
        weights[limited] = _keep_top_k(weights[limited], [params[row].top_k for row in limited])
    nuclear = [row for row, p in enumerate(params) if p.top_p < 1]
    if nuclear:
        weights[nuclear] = keep_top_p(weights[nuclear], [params[row].top_p for row in nuclear])

    seeds = np.array([p.seed & 0xFFFF_FFFF_FFFF_FFFF for p in params], dtype=np.uint64)
    positions = np.array([request.position for request in requests], dtype=np.uint64)
    return pick(weights, torch.from_numpy(uniforms(seeds, positions)).to(logits.device).unsqueeze(1))


def pick(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """For each row of `weights` [R, vocab] the token at `uniform` [R, 1], float64, of the sum of all."""
    # float64: the sum of a large vocabulary's small weights would drown in float32.
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    target = uniform * total
    target = target.minimum(torch.nextafter(total, torch.zeros_like(total)))
    # The first token whose sum is beyond the target: its own weight is never zero.
    return torch.searchsorted(cumulative, target, right=True).squeeze(1).clamp_(max=weights.shape[1] - 1)


def _keep_top_k(weights: torch.Tensor, counts: list[int]) -> torch.Tensor:
    largest = weights.topk(max(counts), -1).values
    last_kept = largest.gather(1, torch.tensor(counts, device=weights.device).unsqueeze(1) - 1)
    return weights.masked_fill(weights < last_kept, 0.0)


def keep_top_p(weights: torch.Tensor, shares: list[float]) -> torch.Tensor:
    """The fewest likeliest tokens whose share of the sum reaches `shares`."""
    wanted = weights.sum(-1, keepdim=True, dtype=torch.float64)
    wanted *= torch.tensor(shares, dtype=torch.float64, device=weights.device).unsqueeze(1)
    cuts = torch.empty_like(weights[:, :1])
    rows = torch.arange(weights.shape[0], device=weights.device)
    for count in [*(count for count in _NUCLEUS if count < weights.shape[1]), weights.shape[1]]:
        likeliest = weights[rows].topk(count, -1).values
        reached = likeliest.cumsum(-1, dtype=torch.float64) >= wanted[rows]
        # Rounding may leave even the whole sum short of a share near 1: then all are kept.
        place = torch.where(reached.any(-1), reached.int().argmax(-1), count - 1)
        cuts[rows] = likeliest.gather(1, place.unsqueeze(1))
        rows = rows[~reached.any(-1)]
        if not len(rows):
            break
    return weights.masked_fill(weights < cuts, 0.0)


def _logprobs(
    logits: torch.Tensor, tokens: torch.Tensor, requests: Sequence[SampleRequest]
) -> list[TokenLogprobs | None]:
    entries: list[TokenLogprobs | None] = [None] * len(requests)
    asked = {row: n for row, request in enumerate(requests) if (n := request.sampling.logprobs) is not None}
    if not asked:
        return entries
    rows = list(asked)
    scores = logits[rows].log_softmax(-1)
    chosen = scores.gather(1, tokens[rows].unsqueeze(1)).squeeze(1).tolist()
    top = scores.topk(min(max(asked.values()), scores.shape[1]), -1)
    for row, logprob, ids, values in zip(rows, chosen, top.indices.tolist(), top.values.tolist(), strict=True):
        count = asked[row]
        entries[row] = TokenLogprobs(logprob, list(zip(ids[:count], values[:count], strict=True)))
    return entries


def _column(values: list[float], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).unsqueeze(1)

"""Sampling that waits for nothing: work for a device's queue, and results when the queue has come so far.

The tokens are those of `sampler.sample`: what is drawn is a function of the row's logits, its seed and the token's
position. Only `top_p`'s cut is found in another way, as sorted prefixes of unknown length would have to be waited
for: by bisection over the bits of the weights, whose order is that of the weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kvasir_engine.protocol import TokenLogprobs
from kvasir_engine.sampling.sampler import GREEDY_BELOW, Sampled, SampleRequest, pick
from kvasir_engine.sampling.uniform import uniforms
from kvasir_engine.staging import fetched, staged

_ONE = 0x3F80_0000
"""The bits of 1.0, the largest weight."""


@dataclass(frozen=True)
class _Logprobs:
    """Of the rows that asked for them. On the host, once the queue has come so far."""

    rows: list[int]
    counts: list[int]
    chosen: torch.Tensor
    ids: torch.Tensor
    values: torch.Tensor


@dataclass(frozen=True)
class QueuedSample:
    """`tokens` int64 [S] are on the device, for the next step; the host has its copy when the queue has ended."""

    tokens: torch.Tensor
    _host: torch.Tensor
    _logprobs: _Logprobs | None

    def collect(self) -> Sampled:
        """What was sampled. Only when the device has ended what was queued."""
        entries: list[TokenLogprobs | None] = [None] * len(self._host)
        if self._logprobs is not None:
            asked = self._logprobs
            columns = (asked.chosen.tolist(), asked.ids.tolist(), asked.values.tolist())
            for row, count, logprob, ids, values in zip(asked.rows, asked.counts, *columns, strict=True):
                entries[row] = TokenLogprobs(logprob, list(zip(ids[:count], values[:count], strict=True)))
        return Sampled(self._host.tolist(), entries)


@torch.inference_mode()
def queue_sample(logits: torch.Tensor, requests: Sequence[SampleRequest]) -> QueuedSample:
    """As `sampler.sample` for `logits` [S, vocab], float32, left unchanged."""
    masked = _without_early_stops(logits, requests)
    tokens = masked.argmax(-1)
    drawn = [row for row, request in enumerate(requests) if request.sampling.temperature >= GREEDY_BELOW]
    if drawn:
        rows = staged(torch.tensor(drawn), logits.device)
        chosen = _draw(masked.index_select(0, rows), [requests[row] for row in drawn])
        tokens.index_copy_(0, rows, chosen)
    return QueuedSample(tokens, fetched(tokens), _logprobs(logits, tokens, requests))


def _without_early_stops(logits: torch.Tensor, requests: Sequence[SampleRequest]) -> torch.Tensor:
    vocab = logits.shape[1]
    stops = [
        row * vocab + token
        for row, request in enumerate(requests)
        if request.generated < request.sampling.min_tokens
        for token in request.sampling.stop_token_ids
    ]
    if not stops:
        return logits
    flat = logits.flatten().clone()
    return flat.index_fill_(0, staged(torch.tensor(stops), logits.device), float("-inf")).view_as(logits)


def _draw(logits: torch.Tensor, requests: Sequence[SampleRequest]) -> torch.Tensor:
    params, vocab = [request.sampling for request in requests], logits.shape[1]
    limits = [p.top_k if 0 < p.top_k < vocab else 0 for p in params]
    seeds = np.array([p.seed & 0xFFFF_FFFF_FFFF_FFFF for p in params], dtype=np.uint64)
    positions = np.array([request.position for request in requests], dtype=np.uint64)
    host = torch.tensor(
        [[p.temperature, p.min_p, p.top_p, limit] for p, limit in zip(params, limits, strict=True)],
        dtype=torch.float64,
    )
    host = torch.cat((host, torch.from_numpy(uniforms(seeds, positions))[:, None]), 1)
    temperature, min_p, top_p, top_k, uniform = staged(host, logits.device).unsqueeze(2).unbind(1)
    weights = ((logits - logits.amax(-1, keepdim=True)) / temperature.float()).exp_()
    if any(p.min_p > 0 for p in params):
        weights.masked_fill_(weights < min_p.float(), 0.0)
    if any(limits):
        largest = weights.topk(max(limits), -1).values
        last_kept = largest.gather(1, (top_k.long() - 1).clamp_(min=0))
        weights.masked_fill_((weights < last_kept) & (top_k > 0), 0.0)
    if any(p.top_p < 1 for p in params):
        cut = nucleus_cut(weights, top_p)
        weights.masked_fill_((weights.view(torch.int32) < cut) & (top_p < 1), 0.0)
    return pick(weights, uniform)


def nucleus_cut(weights: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """Bits [R, 1] of the least of the fewest likeliest weights whose share of the row's sum is `shares` [R, 1]."""
    bits = weights.view(torch.int32)
    wanted = weights.sum(-1, keepdim=True, dtype=torch.float64) * shares
    low = torch.zeros_like(bits[:, :1])  # enough is at least as large as this
    high = torch.full_like(low, _ONE + 1)  # too little is
    for _ in range(31):
        middle = (low + high) // 2
        enough = torch.where(bits >= middle, weights, 0.0).sum(-1, keepdim=True, dtype=torch.float64) >= wanted
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return low


def _logprobs(logits: torch.Tensor, tokens: torch.Tensor, requests: Sequence[SampleRequest]) -> _Logprobs | None:
    asked = {row: n for row, request in enumerate(requests) if (n := request.sampling.logprobs) is not None}
    if not asked:
        return None
    rows = staged(torch.tensor(list(asked)), logits.device)
    scores = logits.index_select(0, rows).log_softmax(-1)
    chosen = scores.gather(1, tokens.index_select(0, rows).unsqueeze(1)).squeeze(1)
    top = scores.topk(min(max(asked.values()), scores.shape[1]), -1)
    return _Logprobs(list(asked), list(asked.values()), fetched(chosen), fetched(top.indices), fetched(top.values))

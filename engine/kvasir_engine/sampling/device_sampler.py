"""Sampling without waiting: the work goes into the device's queue, and the results are read later.

The tokens are those of `sampler.sample`: a drawn token is a function of the row's logits, its seed and its
position.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvasir_engine.pinned_memory import fetched, staged
from kvasir_engine.protocol import TokenLogprobs
from kvasir_engine.sampling.draw import Draws, draw
from kvasir_engine.sampling.sampler import GREEDY_BELOW, Sampled, SampleRequest, masks_of, processed
from kvasir_engine.sampling.token_masks import restrict


@dataclass(frozen=True)
class _Logprobs:
    """The log-probabilities of the rows that want them. On the host, once the queue has reached them."""

    rows: list[int]
    counts: list[int]
    chosen: torch.Tensor
    ids: torch.Tensor
    values: torch.Tensor


@dataclass(frozen=True)
class QueuedSample:
    """`tokens`, int64 [S], are on the device, for the next step; the host has a copy when the queue
    has finished.
    """

    tokens: torch.Tensor
    _host: torch.Tensor
    _logprobs: _Logprobs | None

    def collect(self) -> Sampled:
        """The sampled tokens. Call it only when the device has finished what was queued."""
        entries: list[TokenLogprobs | None] = [None] * len(self._host)
        if self._logprobs is not None:
            requested = self._logprobs
            columns = (requested.chosen.tolist(), requested.ids.tolist(), requested.values.tolist())
            for row, count, logprob, ids, values in zip(requested.rows, requested.counts, *columns, strict=True):
                entries[row] = TokenLogprobs(logprob, list(zip(ids[:count], values[:count], strict=True)))
        return Sampled(self._host.tolist(), entries)


@torch.inference_mode()
def queue_sample(
    logits: torch.Tensor, requests: Sequence[SampleRequest], before: torch.Tensor | None = None
) -> QueuedSample:
    """As `sampler.sample` for `logits` [S, vocab], float32, left unchanged; `before` is on the same device.

    Waits for the masks, while the device computes what was queued earlier.
    """
    masked = _without_early_stops(processed(logits, requests, before), requests)
    masked, restricted = restrict(masked, masks_of(requests))
    tokens = masked.argmax(-1)
    drawn = [row for row, request in enumerate(requests) if request.sampling.temperature >= GREEDY_BELOW]
    if drawn:
        rows = staged(torch.tensor(drawn), logits.device)
        params, positions = [requests[row].sampling for row in drawn], [requests[row].position for row in drawn]
        chosen = draw(masked.index_select(0, rows), Draws.of(params, positions, logits.shape[1]))
        tokens.index_copy_(0, rows, chosen)
    # The device's own stay tokens of the vocabulary, whatever the next step reads of them.
    shown = tokens if restricted is None else restricted.without(tokens, masked)
    return QueuedSample(tokens, fetched(shown), _logprobs(logits, tokens, requests))


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


def _logprobs(logits: torch.Tensor, tokens: torch.Tensor, requests: Sequence[SampleRequest]) -> _Logprobs | None:
    counts = {row: n for row, request in enumerate(requests) if (n := request.sampling.logprobs) is not None}
    if not counts:
        return None
    rows = staged(torch.tensor(list(counts)), logits.device)
    scores = logits.index_select(0, rows).log_softmax(-1)
    chosen = scores.gather(1, tokens.index_select(0, rows).unsqueeze(1)).squeeze(1)
    top = scores.topk(min(max(counts.values()), scores.shape[1]), -1)
    return _Logprobs(
        list(counts), list(counts.values()), fetched(chosen), fetched(top.indices), fetched(top.values)
    )

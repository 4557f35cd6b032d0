"""From logits to tokens. A row's result depends on that row alone, never on what it is batched with."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvasir_engine.cpu_kernels import unavailable_reason
from kvasir_engine.protocol import PromptLogprobs, Sampling, TokenLogprobs
from kvasir_engine.sampling.draw import Draws, draw
from kvasir_engine.sampling.logits_processors import process
from kvasir_engine.sampling.token_history import LogitsWork
from kvasir_engine.sampling.token_masks import TokenMask, restrict

GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy: dividing by them leaves one token, or overflows."""


@dataclass(frozen=True, slots=True)
class SampleRequest:
    """The parameters of one sequence's next token.

    `position` is the token's place in its sequence, prompt included, from 0; `generated` is the number of tokens
    generated before it. `work` is set where the sampling has processors, `mask` where it has a grammar.
    """

    sampling: Sampling
    position: int
    generated: int = 0
    work: LogitsWork | None = None
    mask: TokenMask | None = None

    def __post_init__(self) -> None:
        if self.work is None and self.sampling.processors is not None:
            raise ValueError("the sampling has processors, but the request has no work for them")
        if self.mask is None and self.sampling.grammar is not None:
            raise ValueError("the sampling has a grammar, but the request has no mask")


@dataclass(frozen=True, slots=True)
class Sampled:
    """A token for each row, NO_TOKEN where a row's request allows none, and its log-probabilities where they are
    wanted. `prompts` are those of the batch's `scored` rows.
    """

    tokens: list[int]
    logprobs: list[TokenLogprobs | None]
    prompts: Sequence[PromptLogprobs] = ()


@torch.inference_mode()
def sample(logits: torch.Tensor, requests: Sequence[SampleRequest], before: Sequence[int] | None = None) -> Sampled:
    """The next token for each row of `logits` [S, vocab], float32, left unchanged.

    Temperature 0 takes the likeliest token, the first of equals; otherwise one is drawn, as `draw.py` says, with
    the uniform of (seed, position). Until `min_tokens` tokens are generated, stop tokens are impossible; so are
    always those that a row's `mask` lacks. `before` are the tokens of the step before, where a row's `work` awaits
    one of them.
    Log-probabilities are those of the model's own distribution, before all of this, as vLLM and OpenAI report them.
    """
    masked = _without_early_stops(processed(logits, requests, before), requests)
    chosen = _chosen(masked, requests)
    return Sampled(chosen.tolist(), _logprobs(logits, chosen.clamp(min=0), requests))


def _chosen(logits: torch.Tensor, requests: Sequence[SampleRequest]) -> torch.Tensor:
    """A token for each row of processed logits, NO_TOKEN where a mask leaves nothing."""
    drawn = [row for row, request in enumerate(requests) if request.sampling.temperature >= GREEDY_BELOW]
    params, positions = [requests[row].sampling for row in drawn], [requests[row].position for row in drawn]
    how = Draws.of(params, positions, logits.shape[1]) if drawn else None
    masks = masks_of(requests)
    if logits.device.type == "cpu" and unavailable_reason() is None:
        from kvasir_engine.sampling.cpu_choice import choose

        return choose(logits, dict(masks), drawn, how)
    logits, restricted = restrict(logits, masks)
    tokens = logits.argmax(-1)
    if how is not None:
        tokens[drawn] = draw(logits if len(drawn) == len(requests) else logits[drawn], how)
    return tokens if restricted is None else restricted.without(tokens, logits)


def masks_of(requests: Sequence[SampleRequest]) -> list[tuple[int, TokenMask]]:
    """The masks by row number, of the rows that have one."""
    return [(row, request.mask) for row, request in enumerate(requests) if request.mask is not None]


def processed(
    logits: torch.Tensor, requests: Sequence[SampleRequest], before: torch.Tensor | Sequence[int] | None
) -> torch.Tensor:
    """`logits`, or a changed copy where a request has processors."""
    rows = [(row, request.work) for row, request in enumerate(requests) if request.work is not None]
    if not rows:
        return logits
    if before is not None and not isinstance(before, torch.Tensor):
        before = torch.tensor(before, dtype=torch.int64)
    return process(logits, rows, before)


def _without_early_stops(logits: torch.Tensor, requests: Sequence[SampleRequest]) -> torch.Tensor:
    """`logits`, or a copy without stop tokens in the rows that have not generated `min_tokens`."""
    masked = logits
    for row, request in enumerate(requests):
        if request.generated < request.sampling.min_tokens and request.sampling.stop_token_ids:
            if masked is logits:
                masked = logits.clone()
            masked[row, request.sampling.stop_token_ids] = float("-inf")
    return masked


def _logprobs(
    logits: torch.Tensor, tokens: torch.Tensor, requests: Sequence[SampleRequest]
) -> list[TokenLogprobs | None]:
    entries: list[TokenLogprobs | None] = [None] * len(requests)
    counts = {row: n for row, request in enumerate(requests) if (n := request.sampling.logprobs) is not None}
    if not counts:
        return entries
    rows = list(counts)
    scores = logits[rows].log_softmax(-1)
    chosen = scores.gather(1, tokens[rows].unsqueeze(1)).squeeze(1).tolist()
    top = scores.topk(min(max(counts.values()), scores.shape[1]), -1)
    for row, logprob, ids, values in zip(rows, chosen, top.indices.tolist(), top.values.tolist(), strict=True):
        count = counts[row]
        entries[row] = TokenLogprobs(logprob, list(zip(ids[:count], values[:count], strict=True)))
    return entries

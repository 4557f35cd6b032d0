"""What all bodies and chunks of one answer share."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from msgspec import UNSET, UnsetType

from kvasir_engine.api.detokenizer import Piece
from kvasir_engine.api.generation import UsageCounter
from kvasir_engine.api.prompt_report import EchoedToken
from kvasir_engine.api.schemas import CompletionTokensDetails, PromptLogprobs, PromptTokensDetails, Usage

MOST_AT_ONCE = 2048
"""The event loop formats the log-probabilities of at most so many tokens; a thread formats more."""

T = TypeVar("T")


async def _off_loop(tokens: int, work: Callable[[], T]) -> T:
    """The result of `work` on so many tokens; a thread does it where they are many."""
    return work() if tokens <= MOST_AT_ONCE else await asyncio.to_thread(work)


@dataclass(frozen=True)
class Answer:
    """`created` is in seconds since 1970; `choices` is how many there will be.

    `include_usage` and `continuous_usage` are of streams. `prompts` are the prompts' tokens, if they are asked for,
    and `echo` their texts. `reasons`: reasoning is separated from the answer's text. `prompt_logprobs` and
    `echo_logprobs`: how many alternatives are shown of the prompts' tokens, and of the echoed ones.
    """

    id: str
    created: int
    model: str
    choices: int
    prompt_tokens: int
    counter: UsageCounter
    include_usage: bool = False
    continuous_usage: bool = False
    prompts: Sequence[list[int]] | None = None
    echo: Sequence[str] | None = None
    reasons: bool = False
    prompt_logprobs: int | None = None
    echo_logprobs: int | None = None

    def chunk_usage(self) -> Usage | UnsetType | None:
        """The usage in a chunk that is not the last."""
        if self.continuous_usage:
            return self.usage()
        return None if self.include_usage else UNSET

    def prompt_ids(self, prompt: int) -> list[int] | UnsetType:
        """The tokens of a prompt, if the request wants them."""
        return UNSET if self.prompts is None else self.prompts[prompt]

    def ids(self, pieces: Sequence[Piece]) -> list[int] | UnsetType:
        """The tokens of an answer's pieces, if the request wants them."""
        return UNSET if self.prompts is None else [token for piece in pieces for token in piece.ids]

    async def prompt_scores(self, pieces: Sequence[Piece]) -> PromptLogprobs | UnsetType:
        """The prompt's log-probabilities in an answer's `pieces`, if the request wants them and they are there."""
        scores = next((piece.prompt for piece in pieces if piece.prompt is not None), None)
        if self.prompt_logprobs is None or scores is None:
            return UNSET
        return await _off_loop(len(scores), partial(scores.shown, self.prompt_logprobs))

    async def echoed(self, pieces: Sequence[Piece], text: str) -> list[EchoedToken]:
        """The scored tokens of an answer's prompt, with whose `text` it begins, if the request wants them."""
        scores = next((piece.prompt for piece in pieces if piece.prompt is not None), None)
        if self.echo_logprobs is None or scores is None:
            return []
        return await _off_loop(len(scores), partial(scores.echoed, text, self.echo_logprobs))

    def usage(self) -> Usage:
        """The tokens so far; the whole usage once all choices have ended."""
        completion = self.counter.completion_tokens
        return Usage(
            self.prompt_tokens,
            completion,
            self.prompt_tokens + completion,
            PromptTokensDetails(self.counter.cached_tokens),
            CompletionTokensDetails(self.counter.reasoning_tokens) if self.reasons else UNSET,
        )

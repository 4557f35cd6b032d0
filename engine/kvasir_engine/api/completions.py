"""OpenAI's text completion: the body and the chunks."""

import math
from collections.abc import AsyncGenerator, AsyncIterator, Sequence

import msgspec
from msgspec import UNSET

from kvasir_engine.api.answer import Answer
from kvasir_engine.api.detokenizer import Piece, ScoredToken
from kvasir_engine.api.generation import Choice, text_of
from kvasir_engine.api.http_responses import failure_of
from kvasir_engine.api.prompt_report import EchoedToken
from kvasir_engine.api.schemas import Completion, CompletionChoice, CompletionLogprobs
from kvasir_engine.api.text_events import PLACE, TextEvents


def _top(scored: ScoredToken | EchoedToken) -> dict[str, float] | None:
    """The likeliest tokens by name, and the sampled one. A second token with the same name, as some vocabularies
    have, is named by its id. A prompt's first token has none.
    """
    if scored.logprob is None:
        return None
    names: dict[str, int] = {}
    logprobs: dict[str, float] = {}
    for token, logprob in [(scored.token, scored.logprob), *scored.top]:
        known = names.setdefault(token.name, token.id)
        logprobs[token.name if known == token.id else f"token_id:{token.id}"] = logprob
    return logprobs


def _logprobs(
    scored: Sequence[ScoredToken], top: int, before: Sequence[EchoedToken], text: str
) -> CompletionLogprobs:
    """With `top` 0 only the tokens' own log-probabilities. `before` is the echoed prompt, whose text is `text`."""
    every: list[ScoredToken | EchoedToken] = [*before, *scored]
    return CompletionLogprobs(
        tokens=[each.token.name for each in every],
        token_logprobs=[each.logprob for each in every],
        top_logprobs=[_top(each) for each in every] if top else None,
        text_offset=[*(each.offset for each in before), *(each.offset + len(text) for each in scored)],
    )


async def completion_body(
    answer: Answer, pieces: AsyncIterator[tuple[Choice, Piece]], logprobs: int | None, shown: int, candidates: int
) -> bytes:
    """The `shown` best of each prompt's `candidates`."""
    every = await text_of(pieces, answer.choices)
    chosen: list[tuple[int, list[Piece]]] = []
    for prompt, start in enumerate(range(0, len(every), candidates)):
        some = every[start : start + candidates]
        best = sorted(some, key=_likelihood, reverse=True)[:shown] if shown < candidates else some
        chosen += [(prompt, each) for each in best]
    choices = [await _choice(answer, index, prompt, each, logprobs) for index, (prompt, each) in enumerate(chosen)]
    return msgspec.json.encode(
        Completion(id=answer.id, created=answer.created, model=answer.model, choices=choices, usage=answer.usage())
    )


async def _choice(
    answer: Answer, index: int, prompt: int, pieces: Sequence[Piece], logprobs: int | None, first: bool = True
) -> CompletionChoice:
    """A choice from its pieces: from all, or from some of a stream; `first`: they are the first."""
    echo, scored = _echo(answer, prompt), [token for piece in pieces for token in piece.scored]
    before = await answer.echoed(pieces, echo)
    return CompletionChoice(
        index,
        (echo if first else "") + "".join(piece.text for piece in pieces),
        None if logprobs is None else _logprobs(scored, logprobs, before, echo),
        pieces[-1].finish_reason,
        failure_of(pieces[-1]),
        answer.ids(pieces),
        answer.prompt_ids(prompt) if first else UNSET,
        await answer.prompt_scores(pieces),
    )


def _likelihood(pieces: Sequence[Piece]) -> float:
    """The mean log-probability of a choice's tokens; a failed choice is the least likely."""
    logprobs = [token.logprob for piece in pieces for token in piece.scored]
    if pieces[-1].failure is not None:
        return -math.inf
    return sum(logprobs) / len(logprobs) if logprobs else 0.0


def _echo(answer: Answer, prompt: int) -> str:
    return "" if answer.echo is None else answer.echo[prompt]


def completion_chunk(answer: Answer, index: int) -> Completion:
    """A chunk that has text alone."""
    usage = answer.chunk_usage()
    choice = CompletionChoice(index, PLACE)
    return Completion(id=answer.id, created=answer.created, model=answer.model, choices=[choice], usage=usage)


async def completion_events(
    answer: Answer, pieces: AsyncIterator[tuple[Choice, Piece]], logprobs: int | None
) -> AsyncGenerator[bytes, None]:
    begun: set[int] = set()
    plain = logprobs is None and answer.prompts is None and not answer.continuous_usage
    text_only = TextEvents(lambda index: completion_chunk(answer, index))
    async for choice, piece in pieces:
        if plain and piece.finish_reason is None and choice.index in begun:
            yield text_only.event(choice.index, piece.text)
            continue
        first = choice.index not in begun
        begun.add(choice.index)
        one = await _choice(answer, choice.index, choice.prompt, [piece], logprobs, first)
        usage = answer.chunk_usage()
        yield msgspec.json.encode(
            Completion(id=answer.id, created=answer.created, model=answer.model, choices=[one], usage=usage)
        )
    if answer.include_usage:
        yield msgspec.json.encode(
            Completion(id=answer.id, created=answer.created, model=answer.model, choices=[], usage=answer.usage())
        )

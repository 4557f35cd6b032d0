"""OpenAI's text completion: the body and the chunks."""

from collections.abc import AsyncGenerator, AsyncIterator, Sequence

import msgspec
from msgspec import UNSET

from kvasir_engine.api.answer import Answer
from kvasir_engine.api.detokenizer import Piece, ScoredToken
from kvasir_engine.api.generation import Choice, text_of
from kvasir_engine.api.responses import failure_of
from kvasir_engine.api.schemas import Completion, CompletionChoice, CompletionLogprobs


def _top(scored: ScoredToken) -> dict[str, float]:
    """By name, the sampled token too. A second token of one name, as some vocabularies have, is named by its id."""
    names: dict[str, int] = {}
    logprobs: dict[str, float] = {}
    for token, logprob in [(scored.token, scored.logprob), *scored.top]:
        known = names.setdefault(token.name, token.id)
        logprobs[token.name if known == token.id else f"token_id:{token.id}"] = logprob
    return logprobs


def _logprobs(scored: Sequence[ScoredToken], top: int) -> CompletionLogprobs:
    """`top` 0 asks for the sampled tokens' log-probabilities alone."""
    return CompletionLogprobs(
        tokens=[each.token.name for each in scored],
        token_logprobs=[each.logprob for each in scored],
        top_logprobs=[_top(each) for each in scored] if top else None,
        text_offset=[each.offset for each in scored],
    )


async def completion_body(
    answer: Answer, pieces: AsyncIterator[tuple[Choice, Piece]], logprobs: int | None
) -> bytes:
    choices = [
        CompletionChoice(
            index,
            "".join(piece.text for piece in each),
            None if logprobs is None else _logprobs([token for piece in each for token in piece.scored], logprobs),
            each[-1].finish_reason,
            failure_of(each[-1]),
        )
        for index, each in enumerate(await text_of(pieces, answer.choices))
    ]
    return msgspec.json.encode(
        Completion(id=answer.id, created=answer.created, model=answer.model, choices=choices, usage=answer.usage())
    )


async def completion_events(
    answer: Answer, pieces: AsyncIterator[tuple[Choice, Piece]], logprobs: int | None, include_usage: bool
) -> AsyncGenerator[bytes, None]:
    usage = None if include_usage else UNSET
    async for choice, piece in pieces:
        scored = None if logprobs is None else _logprobs(piece.scored, logprobs)
        one = CompletionChoice(choice.index, piece.text, scored, piece.finish_reason, failure_of(piece))
        yield msgspec.json.encode(
            Completion(id=answer.id, created=answer.created, model=answer.model, choices=[one], usage=usage)
        )
    if include_usage:
        yield msgspec.json.encode(
            Completion(id=answer.id, created=answer.created, model=answer.model, choices=[], usage=answer.usage())
        )

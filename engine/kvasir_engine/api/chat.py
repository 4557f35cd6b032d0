"""OpenAI's chat completion: the body and the chunks."""

from collections.abc import AsyncGenerator, AsyncIterator, Sequence

import msgspec
from msgspec import UNSET

from kvasir_engine.api.answer import Answer
from kvasir_engine.api.detokenizer import NamedToken, Piece, ScoredToken
from kvasir_engine.api.generation import Choice, text_of
from kvasir_engine.api.responses import failure_of
from kvasir_engine.api.schemas import (
    AssistantMessage,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprob,
    ChatLogprobs,
    TopLogprob,
)


def _bytes(token: NamedToken) -> list[int] | None:
    return None if token.raw is None else list(token.raw)


def _logprobs(scored: Sequence[ScoredToken]) -> ChatLogprobs:
    return ChatLogprobs(
        [
            ChatLogprob(
                each.token.name,
                each.logprob,
                _bytes(each.token),
                [TopLogprob(token.name, logprob, _bytes(token)) for token, logprob in each.top],
            )
            for each in scored
        ]
    )


async def chat_body(answer: Answer, pieces: AsyncIterator[tuple[Choice, Piece]], logprobs: bool) -> bytes:
    choices = [
        ChatChoice(
            index,
            AssistantMessage("".join(piece.text for piece in each)),
            _logprobs([token for piece in each for token in piece.scored]) if logprobs else None,
            each[-1].finish_reason or "stop",
            failure_of(each[-1]),
        )
        for index, each in enumerate(await text_of(pieces, answer.choices))
    ]
    return msgspec.json.encode(
        ChatCompletion(
            id=answer.id, created=answer.created, model=answer.model, choices=choices, usage=answer.usage()
        )
    )


async def chat_events(
    answer: Answer, pieces: AsyncIterator[tuple[Choice, Piece]], logprobs: bool, include_usage: bool
) -> AsyncGenerator[bytes, None]:
    usage = None if include_usage else UNSET

    def chunk(choice: ChatChunkChoice) -> bytes:
        return msgspec.json.encode(
            ChatChunk(id=answer.id, created=answer.created, model=answer.model, choices=[choice], usage=usage)
        )

    begun: set[int] = set()
    async for choice, piece in pieces:
        index = choice.index
        if index not in begun:
            begun.add(index)
            yield chunk(ChatChunkChoice(index, ChatDelta(role="assistant", content="")))
        if piece.text or piece.scored:
            yield chunk(
                ChatChunkChoice(index, ChatDelta(content=piece.text), _logprobs(piece.scored) if logprobs else None)
            )
        if piece.finish_reason:
            ended = ChatChunkChoice(index, ChatDelta(), finish_reason=piece.finish_reason, error=failure_of(piece))
            yield chunk(ended)
    if include_usage:
        yield msgspec.json.encode(
            ChatChunk(id=answer.id, created=answer.created, model=answer.model, choices=[], usage=answer.usage())
        )

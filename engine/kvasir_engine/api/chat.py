"""OpenAI's chat completion: the body and the chunks."""

from collections.abc import AsyncGenerator, AsyncIterator, Sequence

import msgspec
from msgspec import UNSET

from kvasir_engine.api.answer import Answer
from kvasir_engine.api.detokenizer import NamedToken, Piece, ScoredToken
from kvasir_engine.api.generation import Choice, text_of
from kvasir_engine.api.http_responses import failure_of
from kvasir_engine.api.schemas import (
    AnsweredCall,
    AnsweredFunction,
    AssistantMessage,
    CallDelta,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprob,
    ChatLogprobs,
    FunctionDelta,
    TopLogprob,
)
from kvasir_engine.api.tools.types import (
    ArgumentsDelta,
    ContentDelta,
    Delta,
    ReasoningDelta,
    ToolCallBegin,
    joined,
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


def _message(pieces: Sequence[Piece]) -> AssistantMessage:
    message = joined(delta for piece in pieces for delta in piece.deltas)
    calls = [AnsweredCall(each.id, AnsweredFunction(each.name, each.arguments)) for each in message.tool_calls]
    nothing = None if calls or message.reasoning is not None else ""
    return AssistantMessage(
        nothing if message.content is None else message.content,
        reasoning_content=UNSET if message.reasoning is None else message.reasoning,
        tool_calls=calls or UNSET,
    )


def _shown(delta: Delta) -> ChatDelta:
    match delta:
        case ContentDelta(text):
            return ChatDelta(content=text)
        case ReasoningDelta(text):
            return ChatDelta(reasoning_content=text)
        case ToolCallBegin(index, id, name):
            return ChatDelta(tool_calls=[CallDelta(index, FunctionDelta("", name), id, "function")])
        case ArgumentsDelta(index, text):
            return ChatDelta(tool_calls=[CallDelta(index, FunctionDelta(text))])


async def chat_body(answer: Answer, pieces: AsyncIterator[tuple[Choice, Piece]], logprobs: bool) -> bytes:
    choices = [
        ChatChoice(
            index,
            _message(each),
            _logprobs([token for piece in each for token in piece.scored]) if logprobs else None,
            each[-1].finish_reason or "stop",
            failure_of(each[-1]),
            answer.ids(each),
        )
        for index, each in enumerate(await text_of(pieces, answer.choices))
    ]
    return msgspec.json.encode(
        ChatCompletion(
            id=answer.id,
            created=answer.created,
            model=answer.model,
            choices=choices,
            usage=answer.usage(),
            prompt_token_ids=answer.prompt_ids(0),
        )
    )


async def chat_events(
    answer: Answer, pieces: AsyncIterator[tuple[Choice, Piece]], logprobs: bool
) -> AsyncGenerator[bytes, None]:
    def chunk(choice: ChatChunkChoice) -> bytes:
        return msgspec.json.encode(
            ChatChunk(
                id=answer.id,
                created=answer.created,
                model=answer.model,
                choices=[choice],
                usage=answer.chunk_usage(),
                prompt_token_ids=UNSET if begun else answer.prompt_ids(0),
            )
        )

    begun: set[int] = set()
    async for choice, piece in pieces:
        index = choice.index
        if index not in begun:
            yield chunk(ChatChunkChoice(index, ChatDelta(role="assistant", content="")))
            begun.add(index)
        ids = answer.ids([piece])
        scored = _logprobs(piece.scored) if logprobs else None
        for delta in piece.deltas or ([ContentDelta("")] if piece.scored else []):
            yield chunk(ChatChunkChoice(index, _shown(delta), scored, token_ids=ids))
            ids = UNSET if ids is UNSET else []
            scored = _logprobs([]) if logprobs else None
        if piece.finish_reason:
            ended, failure = piece.finish_reason, failure_of(piece)
            yield chunk(ChatChunkChoice(index, ChatDelta(), None, ended, failure, token_ids=ids))
    if answer.include_usage:
        yield msgspec.json.encode(
            ChatChunk(id=answer.id, created=answer.created, model=answer.model, choices=[], usage=answer.usage())
        )

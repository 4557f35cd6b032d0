"""OpenAI's chat completion: the body and the chunks."""

from collections.abc import AsyncGenerator, AsyncIterator, Sequence

import msgspec
from msgspec import UNSET, UnsetType

from kvasir_engine.api.answer import Answer
from kvasir_engine.api.detokenizer import Piece, ScoredToken
from kvasir_engine.api.generation import Choice, text_of
from kvasir_engine.api.http_responses import failure_of
from kvasir_engine.api.named_tokens import NamedToken
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
    PromptLogprobs,
    TopLogprob,
)
from kvasir_engine.api.text_events import PLACE, TextEvents
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


def _deltas(piece: Piece) -> Sequence[Delta]:
    if piece.deltas is not None:
        return piece.deltas
    return (ContentDelta(piece.text),) if piece.text else ()


def _message(pieces: Sequence[Piece]) -> AssistantMessage:
    message = joined(delta for piece in pieces for delta in _deltas(piece))
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
    every = await text_of(pieces, answer.choices)
    choices = [
        ChatChoice(
            index,
            _message(each),
            _logprobs([token for piece in each for token in piece.scored]) if logprobs else None,
            each[-1].finish_reason or "stop",
            failure_of(each[-1]),
            answer.ids(each),
        )
        for index, each in enumerate(every)
    ]
    return msgspec.json.encode(
        ChatCompletion(
            id=answer.id,
            created=answer.created,
            model=answer.model,
            choices=choices,
            usage=answer.usage(),
            prompt_token_ids=answer.prompt_ids(0),
            prompt_logprobs=await answer.prompt_scores([piece for each in every for piece in each]),
        )
    )


def chat_chunk(answer: Answer, index: int) -> ChatChunk:
    """A chunk that has text alone."""
    choice = ChatChunkChoice(index, ChatDelta(content=PLACE))
    usage = answer.chunk_usage()
    return ChatChunk(id=answer.id, created=answer.created, model=answer.model, choices=[choice], usage=usage)


async def chat_events(
    answer: Answer, pieces: AsyncIterator[tuple[Choice, Piece]], logprobs: bool
) -> AsyncGenerator[bytes, None]:
    def chunk(choice: ChatChunkChoice, scores: PromptLogprobs | UnsetType = UNSET) -> bytes:
        return msgspec.json.encode(
            ChatChunk(
                id=answer.id,
                created=answer.created,
                model=answer.model,
                choices=[choice],
                usage=answer.chunk_usage(),
                prompt_token_ids=UNSET if begun else answer.prompt_ids(0),
                prompt_logprobs=scores,
            )
        )

    begun: set[int] = set()
    scores_sent = False  # of the prompt, which all choices have
    plain = not logprobs and answer.prompts is None and not answer.continuous_usage
    text_only = TextEvents(lambda index: chat_chunk(answer, index))
    async for choice, piece in pieces:
        index = choice.index
        if plain and piece.deltas is None and piece.finish_reason is None and index in begun:
            yield text_only.event(index, piece.text)
            continue
        if index not in begun:
            scores = UNSET if scores_sent else await answer.prompt_scores([piece])
            scores_sent = scores_sent or scores is not UNSET
            yield chunk(ChatChunkChoice(index, ChatDelta(role="assistant", content="")), scores)
            begun.add(index)
        ids = answer.ids([piece])
        scored = _logprobs(piece.scored) if logprobs else None
        for delta in _deltas(piece) or ([ContentDelta("")] if piece.scored else []):
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

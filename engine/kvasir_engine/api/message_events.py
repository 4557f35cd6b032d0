"""The events of a streamed answer of Anthropic's Messages API."""

from collections.abc import AsyncGenerator, AsyncIterator

import msgspec

from kvasir_engine.api.answer import Answer
from kvasir_engine.api.answer_parts import (
    AnswerParts,
    Change,
    PartClosed,
    PartGrown,
    PartOpened,
    ReasoningPart,
    ToolCallPart,
)
from kvasir_engine.api.detokenizer import Piece
from kvasir_engine.api.errors import ApiError, anthropic_body
from kvasir_engine.api.generation import Choice
from kvasir_engine.api.http_responses import EventStyle, named_event
from kvasir_engine.api.message_answer import any_called, block_of, message, stop_reason, usage
from kvasir_engine.api.message_schemas import BlockDelta, MessageEvent


def _event(event: MessageEvent) -> bytes:
    return named_event(event.type, msgspec.json.encode(event))


def _failed(error: ApiError) -> bytes:
    return named_event("error", anthropic_body(error))


STYLE = EventStyle(bytes, b"", _failed)


async def message_events(
    answer: Answer, pieces: AsyncIterator[tuple[Choice, Piece]]
) -> AsyncGenerator[bytes, None]:
    """The whole stream of one choice's pieces. The first events are written with the first text."""
    begun = False
    parts = AnswerParts()
    async for _, piece in pieces:
        written = [] if begun else [_event(MessageEvent(type="message_start", message=message(answer, [])))]
        begun = True
        written += [_changed(change) for change in parts.push(piece)]
        if piece.finish_reason:
            reason = stop_reason(piece, any_called(parts.closed))
            ended = BlockDelta(stop_reason=reason, stop_sequence=piece.stop)
            written.append(_event(MessageEvent(type="message_delta", delta=ended, usage=usage(answer))))
            written.append(_event(MessageEvent(type="message_stop")))
        if written:
            yield b"".join(written)


def _changed(change: Change) -> bytes:
    match change:
        case PartOpened(index, part):
            start = _event(MessageEvent(type="content_block_start", index=index, content_block=block_of(part)))
            return start if index else start + _event(MessageEvent(type="ping"))
        case PartGrown(index):
            return _event(MessageEvent(type="content_block_delta", index=index, delta=_delta(change)))
        case PartClosed(index):
            return _event(MessageEvent(type="content_block_stop", index=index))


def _delta(grown: PartGrown) -> BlockDelta:
    if isinstance(grown.part, ToolCallPart):
        return BlockDelta(type="input_json_delta", partial_json=grown.text)
    if isinstance(grown.part, ReasoningPart):
        return BlockDelta(type="thinking_delta", thinking=grown.text)
    return BlockDelta(type="text_delta", text=grown.text)

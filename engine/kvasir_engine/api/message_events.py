"""The events of a streamed answer of Anthropic's Messages API."""

from collections.abc import AsyncGenerator, AsyncIterator

import msgspec

from kvasir_engine.api.answer import Answer
from kvasir_engine.api.detokenizer import Piece
from kvasir_engine.api.errors import ApiError, anthropic_body
from kvasir_engine.api.generation import Choice
from kvasir_engine.api.http_responses import EventStyle, named_event
from kvasir_engine.api.message_schemas import BlockDelta, MessageEvent, ShownBlock
from kvasir_engine.api.messages import message, stop_reason, usage


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
    async for _, piece in pieces:
        written = b"" if begun else _begin(answer)
        begun = True
        if piece.text:
            delta = BlockDelta(type="text_delta", text=piece.text)
            written += _event(MessageEvent(type="content_block_delta", index=0, delta=delta))
        if piece.finish_reason:
            written += _end(answer, piece)
        if written:
            yield written


def _begin(answer: Answer) -> bytes:
    return b"".join(
        (
            _event(MessageEvent(type="message_start", message=message(answer, []))),
            _event(MessageEvent(type="content_block_start", index=0, content_block=ShownBlock(""))),
            _event(MessageEvent(type="ping")),
        )
    )


def _end(answer: Answer, last: Piece) -> bytes:
    ended = BlockDelta(stop_reason=stop_reason(last), stop_sequence=last.stop)
    return b"".join(
        (
            _event(MessageEvent(type="content_block_stop", index=0)),
            _event(MessageEvent(type="message_delta", delta=ended, usage=usage(answer))),
            _event(MessageEvent(type="message_stop")),
        )
    )

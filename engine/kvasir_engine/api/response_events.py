"""The events of a streamed answer of OpenAI's Responses API."""

from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

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
from kvasir_engine.api.errors import ApiError
from kvasir_engine.api.generation import Choice
from kvasir_engine.api.http_responses import EventStyle, named_event
from kvasir_engine.api.response_answer import content_of, ended, item_of, text_logprobs, whole_item
from kvasir_engine.api.response_schemas import ModelResponse, OutputItem, ResponseError, ResponseEvent


class ResponseEvents:
    """Writes the events, in OpenAI's order, each with its number. The first are written with the first text."""

    def __init__(self, response: ModelResponse, answer: Answer) -> None:
        self._response = response
        self._answer = answer
        self._parts = AnswerParts(never_empty=True)
        self._items: list[OutputItem] = []
        self._item = ""  # the id of the one that is open
        self._number = 0
        self.style = EventStyle(bytes, b"", self._failed)

    async def write(self, pieces: AsyncIterator[tuple[Choice, Piece]]) -> AsyncGenerator[bytes, None]:
        """The whole stream of one choice's pieces."""
        begun = False
        async for _, piece in pieces:
            written = [] if begun else self._begin()
            begun = True
            for change in self._parts.push(piece):
                written += self._changed(change)
            if piece.finish_reason:
                response = ended(self._response, self._answer, self._items, piece.finish_reason)
                written.append(self._event(f"response.{response.status}", response=response))
            if written:
                yield b"".join(written)

    def _event(self, type: str, **fields: Any) -> bytes:
        event = ResponseEvent(type=type, sequence_number=self._number, **fields)
        self._number += 1
        return named_event(type, msgspec.json.encode(event))

    def _of_item(self, type: str, index: int, **fields: Any) -> bytes:
        return self._event(type, item_id=self._item, output_index=index, **fields)

    def _begin(self) -> list[bytes]:
        return [
            self._event("response.created", response=self._response),
            self._event("response.in_progress", response=self._response),
        ]

    def _changed(self, change: Change) -> list[bytes]:
        match change:
            case PartOpened():
                return self._opened(change)
            case PartGrown():
                return [self._grown(change)]
            case PartClosed():
                return self._closed(change)

    def _opened(self, opened: PartOpened) -> list[bytes]:
        item = item_of(self._answer, opened.index, opened.part, "in_progress")
        self._item = item.id
        written = [self._event("response.output_item.added", output_index=opened.index, item=item)]
        if not isinstance(opened.part, ToolCallPart):
            part = content_of(opened.part)
            written.append(self._of_item("response.content_part.added", opened.index, content_index=0, part=part))
        return written

    def _grown(self, grown: PartGrown) -> bytes:
        index, text = grown.index, grown.text
        if isinstance(grown.part, ToolCallPart):
            return self._of_item("response.function_call_arguments.delta", index, delta=text)
        if isinstance(grown.part, ReasoningPart):
            return self._of_item("response.reasoning_text.delta", index, content_index=0, delta=text)
        logprobs = text_logprobs(grown.scored)
        return self._of_item("response.output_text.delta", index, content_index=0, delta=text, logprobs=logprobs)

    def _closed(self, closed: PartClosed) -> list[bytes]:
        index, part = closed.index, closed.part
        item = whole_item(self._answer, closed)
        self._items.append(item)
        written: list[bytes] = []
        if isinstance(part, ToolCallPart):
            written.append(self._of_item("response.function_call_arguments.done", index, arguments=part.text))
        elif isinstance(part, ReasoningPart):
            written.append(self._of_item("response.reasoning_text.done", index, content_index=0, text=part.text))
        else:
            logprobs = text_logprobs(part.scored)
            written.append(
                self._of_item(
                    "response.output_text.done", index, content_index=0, text=part.text, logprobs=logprobs
                )
            )
        if not isinstance(part, ToolCallPart):
            content = content_of(part)
            written.append(self._of_item("response.content_part.done", index, content_index=0, part=content))
        written.append(self._event("response.output_item.done", output_index=index, item=item))
        return written

    def _failed(self, error: ApiError) -> bytes:
        failure = ResponseError(error.detail.code or "server_error", error.detail.message)
        response = msgspec.structs.replace(self._response, status="failed", error=failure, output=list(self._items))
        return self._event("response.failed", response=response)

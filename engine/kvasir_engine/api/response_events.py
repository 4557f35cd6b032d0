"""The events of a streamed answer of OpenAI's Responses API."""

from collections.abc import AsyncGenerator, AsyncIterator

import msgspec

from kvasir_engine.api.answer import Answer
from kvasir_engine.api.detokenizer import Piece
from kvasir_engine.api.errors import ApiError
from kvasir_engine.api.generation import Choice
from kvasir_engine.api.http_responses import EventStyle, named_event
from kvasir_engine.api.response_schemas import (
    ModelResponse,
    OutputMessage,
    OutputText,
    ResponseError,
    ResponseEvent,
    TextLogprob,
)
from kvasir_engine.api.responses import ended, message_id, text_logprobs


class ResponseEvents:
    """Writes the events, in OpenAI's order, each with its number. The first are written with the first text."""

    def __init__(self, response: ModelResponse, answer: Answer) -> None:
        self._response = response
        self._answer = answer
        self._item = message_id(answer)
        self._number = 0
        self._text: list[str] = []
        self._logprobs: list[TextLogprob] = []
        self.style = EventStyle(bytes, b"", self._failed)

    async def write(self, pieces: AsyncIterator[tuple[Choice, Piece]]) -> AsyncGenerator[bytes, None]:
        """The whole stream of one choice's pieces."""
        begun = False
        async for _, piece in pieces:
            written = b"" if begun else self._begin()
            begun = True
            if piece.text or piece.scored:
                written += self._delta(piece)
            if piece.finish_reason:
                written += self._end(piece.finish_reason)
            if written:
                yield written

    def _event(self, event: ResponseEvent) -> bytes:
        self._number += 1
        return named_event(event.type, msgspec.json.encode(event))

    def _of_response(self, type: str, response: ModelResponse) -> bytes:
        return self._event(ResponseEvent(type=type, sequence_number=self._number, response=response))

    def _of_item(self, type: str, item: OutputMessage) -> bytes:
        return self._event(ResponseEvent(type=type, sequence_number=self._number, output_index=0, item=item))

    def _of_part(self, type: str, part: OutputText) -> bytes:
        return self._event(
            ResponseEvent(
                type=type,
                sequence_number=self._number,
                item_id=self._item,
                output_index=0,
                content_index=0,
                part=part,
            )
        )

    def _begin(self) -> bytes:
        return b"".join(
            (
                self._of_response("response.created", self._response),
                self._of_response("response.in_progress", self._response),
                self._of_item("response.output_item.added", OutputMessage(self._item, [], "in_progress")),
                self._of_part("response.content_part.added", OutputText("")),
            )
        )

    def _delta(self, piece: Piece) -> bytes:
        logprobs = text_logprobs(piece.scored)
        self._text.append(piece.text)
        self._logprobs += logprobs
        return self._event(
            ResponseEvent(
                type="response.output_text.delta",
                sequence_number=self._number,
                item_id=self._item,
                output_index=0,
                content_index=0,
                delta=piece.text,
                logprobs=logprobs,
            )
        )

    def _end(self, finish: str) -> bytes:
        text = "".join(self._text)
        response = ended(self._response, self._answer, text, self._logprobs, finish)
        (item,) = response.output
        done = ResponseEvent(
            type="response.output_text.done",
            sequence_number=self._number,
            item_id=self._item,
            output_index=0,
            content_index=0,
            text=text,
            logprobs=self._logprobs,
        )
        return b"".join(
            (
                self._event(done),
                self._of_part("response.content_part.done", item.content[0]),
                self._of_item("response.output_item.done", item),
                self._of_response(f"response.{response.status}", response),
            )
        )

    def _failed(self, error: ApiError) -> bytes:
        failure = ResponseError(error.detail.code or "server_error", error.detail.message)
        response = msgspec.structs.replace(self._response, status="failed", error=failure)
        return self._of_response("response.failed", response)

"""Answers whose generation stops when the client disconnects: one JSON body, or server-sent events."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
from msgspec import UNSET, UnsetType
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from kvasir_engine.api.detokenizer import Piece
from kvasir_engine.api.errors import (
    ApiError,
    ErrorDetail,
    anthropic_body,
    client_left,
    from_engine,
    unexpected,
)
from kvasir_engine.api.http.body_writer import WRITE
from kvasir_engine.engine_client import EngineError

log = logging.getLogger("api")

CODE = "kvasir.code"  # scope key: the outcome for the metrics, where it is not the HTTP status
CLIENT_LEFT = "499"
ANTHROPIC_PATH = "/v1/messages"
DONE = b"data: [DONE]\n\n"

R = TypeVar("R")


def event(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"


def named_event(name: str, data: bytes) -> bytes:
    return b"event: " + name.encode() + b"\n" + event(data)


def as_api_error(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, EngineError):
        return from_engine(error)
    log.error("request failed unexpectedly", exc_info=error)
    return unexpected()


def failure_of(piece: Piece) -> ErrorDetail | UnsetType:
    """The error of one choice that failed while others did not."""
    return UNSET if piece.failure is None else as_api_error(piece.failure).detail


async def _client_left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _unless_client_leaves(scope: Scope, receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Run `work` to its end; if the client disconnects, cancel it and wait until it has cleaned up."""
    working = asyncio.create_task(work)
    disconnect = asyncio.create_task(_client_left(receive))
    try:
        await asyncio.wait({working, disconnect}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            scope[CODE] = CLIENT_LEFT
    finally:
        disconnect.cancel()
        working.cancel()
        results = await asyncio.gather(working, disconnect, return_exceptions=True)
    if isinstance(results[0], Exception) and not isinstance(results[0], OSError):
        raise results[0]


async def while_client_stays(request: Request, work: Coroutine[Any, Any, R]) -> R:
    """The result of `work`. If the client disconnects, cancels `work` and raises ApiError.

    Call it after the request's body was read.
    """
    working = asyncio.create_task(work)
    disconnect = asyncio.create_task(_client_left(request.receive))
    try:
        await asyncio.wait({working, disconnect}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise client_left()
        return working.result()
    finally:
        disconnect.cancel()
        working.cancel()
        await asyncio.gather(working, disconnect, return_exceptions=True)


async def _send_whole(
    send: Send, status: int, content_type: bytes, body: bytes, more: Mapping[str, str] | None = None
) -> None:
    headers = [(b"content-type", content_type), (b"content-length", str(len(body)).encode())]
    headers += [(name.encode(), value.encode()) for name, value in (more or {}).items()]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def error_headers(error: ApiError) -> dict[str, str]:
    """The headers of an error: how to authenticate, or when to retry."""
    return {401: {"www-authenticate": "Bearer"}, 503: {"retry-after": "1"}}.get(error.status, {})


def body_of(error: ApiError, path: str) -> bytes:
    """An error's body in the form of the API that `path` belongs to."""
    return anthropic_body(error) if path.startswith(ANTHROPIC_PATH) else error.body


async def send_error(scope: Scope, send: Send, error: ApiError) -> None:
    body = body_of(error, scope["path"])
    await _send_whole(send, error.status, b"application/json", body, error_headers(error))


class JsonResponse(Response):
    """A response with the JSON bytes that `produce` makes, or the error that it raises."""

    def __init__(self, produce: Callable[[], Awaitable[bytes]]) -> None:
        super().__init__()
        self._produce = produce

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await _unless_client_leaves(scope, receive, self._answer(scope, send))

    async def _answer(self, scope: Scope, send: Send) -> None:
        try:
            body = await self._produce()
        except Exception as error:
            await send_error(scope, send, as_api_error(error))
        else:
            await _send_whole(send, 200, b"application/json", body)


@dataclass(frozen=True)
class EventStyle:
    """How events and errors are written, and what ends the stream."""

    written: Callable[[bytes], bytes]
    last: bytes
    failed: Callable[[ApiError], bytes]


def _failed(error: ApiError) -> bytes:
    return event(error.body)


UNNAMED = EventStyle(event, DONE, _failed)


class EventResponse(Response):
    """A response with the events that `produce` makes: JSON values, or another `style`; then `[DONE]`.

    An error before the first event is an HTTP status; a later one is an event, and ends the stream.
    """

    def __init__(self, produce: Callable[[], AsyncGenerator[bytes, None]], style: EventStyle = UNNAMED) -> None:
        super().__init__()
        self._produce = produce
        self._style = style

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await _unless_client_leaves(scope, receive, self._answer(scope, send))

    async def _answer(self, scope: Scope, send: Send) -> None:
        started, written = False, self._style.written

        async def send_part(part: bytes) -> None:
            await send({"type": "http.response.body", "body": part, "more_body": True})

        write: Callable[[bytes], Awaitable[None]] = scope.get(WRITE, send_part)
        async with aclosing(self._produce()) as events:
            try:
                async for data in events:
                    if not started:
                        started = True
                        headers = [
                            (b"content-type", b"text/event-stream; charset=utf-8"),
                            (b"cache-control", b"no-cache"),
                            (b"x-accel-buffering", b"no"),
                        ]
                        await send({"type": "http.response.start", "status": 200, "headers": headers})
                        await send({"type": "http.response.body", "body": written(data), "more_body": True})
                    else:
                        await write(written(data))
            except OSError:  # the client's socket
                raise
            except Exception as error:
                failure = as_api_error(error)
                if not started:
                    await send_error(scope, send, failure)
                    return
                scope[CODE] = str(failure.status)
                await send({"type": "http.response.body", "body": self._style.failed(failure)})
                return
        await send({"type": "http.response.body", "body": self._style.last})


def json_response(value: msgspec.Struct) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")

"""Limits the bodies of all requests together, so that many at once do not exhaust memory."""

import logging

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvasir_engine.api.errors import ApiError
from kvasir_engine.api.http_responses import send_error

log = logging.getLogger("api")


FILES = "/v1/files"


class BodyBudget:
    """ASGI middleware: counts a request's body from its first byte until its answer begins, or it ends.

    Until then the body is held as bytes, text or tokens. A request beyond `most` gets a 503. Files are not counted:
    they are streamed to disk.
    """

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app = app
        self._most = most
        self.held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] == FILES:
            await self._app(scope, receive, send)
            return
        mine = 0
        started = False

        def give_back() -> None:
            nonlocal mine
            self.held -= mine
            mine = 0

        async def counted() -> Message:
            nonlocal mine
            message = await receive()
            size = len(message.get("body", b""))
            if not started:
                if self.held + size > self._most:
                    raise _Full
                self.held += size
                mine += size
            return message

        async def noted(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                give_back()
            await send(message)

        try:
            await self._app(scope, counted, noted)
        except _Full:
            if started:
                raise
            give_back()
            log.warning("a body was refused: all together are too large held=%d", self.held)
            message = "The server holds too many request bodies. Try again later."
            await send_error(scope, send, ApiError(503, message, code="overloaded", type="server_error"))
        finally:
            give_back()


class _Full(BaseException):
    """The budget is exhausted. Not an error of the application, so none of its handlers sees it."""

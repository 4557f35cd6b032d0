"""Counts and times the API's requests, and those in flight."""

import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvasir_engine.api.caller import CALLER
from kvasir_engine.api.http_responses import CLIENT_LEFT, CODE
from kvasir_engine.api.lifecycle import Lifecycle
from kvasir_engine.api.metrics import ApiMetrics

_METERED = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"})


class RequestMeter:
    """ASGI middleware for requests from outside. Starlette's own base class would hide a client's disconnect."""

    def __init__(self, app: ASGIApp, metrics: ApiMetrics, lifecycle: Lifecycle) -> None:
        self._app = app
        self._metrics = metrics
        self._lifecycle = lifecycle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] not in _METERED or CALLER in scope:
            await self._app(scope, receive, send)
            return
        code = CLIENT_LEFT

        async def note(message: Message) -> None:
            nonlocal code
            if message["type"] == "http.response.start":
                code = str(message["status"])
                if self._lifecycle.draining:
                    # The next request of this client is to find its way to a process that stays.
                    message = {**message, "headers": [*message.get("headers", []), (b"connection", b"close")]}
            await send(message)

        started = time.perf_counter()
        self._metrics.inflight.inc()
        try:
            with self._lifecycle.request():
                await self._app(scope, receive, note)
        finally:
            self._metrics.inflight.dec()
            self._metrics.requests.labels(scope.get(CODE, code)).inc()
            self._metrics.seconds.observe(time.perf_counter() - started)

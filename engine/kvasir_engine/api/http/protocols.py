"""uvicorn's protocols with limits: HTTP/1.1 by h11, and WebSockets."""

import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import h11
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.config import Config
from uvicorn.protocols.http.flow_control import service_unavailable
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from uvicorn.server import ServerState

from kvasir_engine.api.errors import ApiError
from kvasir_engine.api.http.body_writer import WRITE, BodyWriter
from kvasir_engine.api.http.connections import ConnectionGate, Entry, unsent_bytes
from kvasir_engine.api.http.strict_heads import StrictConnection

log = logging.getLogger("api")

PROBES = frozenset({"/health", "/ready"})


class _Writing:
    """For how long a peer has not read pending data."""

    def __init__(self) -> None:
        self._paused: tuple[float, int] | None = None

    def pause(self, transport: Any) -> None:
        self._paused = time.monotonic(), unsent_bytes(transport)

    def resume(self) -> None:
        self._paused = None

    def late(self, now: float, gate: ConnectionGate) -> str | None:
        if self._paused is None:
            return None
        since, size = self._paused
        allowed = gate.limits.write_seconds + size / gate.limits.bytes_per_second
        return "write" if now - since > allowed else None


class GuardedHttp(H11Protocol):
    """The requests of a connection. It uses h11, which can be limited where httptools cannot.

    After each batch of events it knows what the connection waits for: a head, a body, or nothing from the client.
    """

    def __init__(
        self,
        gate: ConnectionGate,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        refusal: Callable[[Any], str | None] | None = None,
    ) -> None:
        """`refusal` gives the reason not to answer a transport's peer, or None."""
        super().__init__(config, server_state, app_state)
        self._gate = gate
        self._refusal = refusal
        self.conn = StrictConnection(gate.limits)
        self.ws_protocol_class = partial(GuardedWebSocket, gate)  # type: ignore[assignment]
        self._writing = _Writing()
        self._idle_since: float | None = None
        self._head_since: float | None = None
        self._body_since: float | None = None
        self._body_bytes = 0
        self._status = 400

    @property
    def idle_since(self) -> float | None:
        """See gate.Watched."""
        return self._idle_since

    def overdue(self, now: float, shutdown_since: float | None) -> str | None:
        """See gate.Watched. Between requests uvicorn's own timer runs."""
        limits = self._gate.limits
        if self._head_since is not None and now - self._head_since > limits.header_seconds:
            return "header"
        if self._body_since is not None:
            if now - self._body_since > limits.body_seconds + self._body_bytes / limits.bytes_per_second:
                return "body"
            if shutdown_since is not None and now - max(shutdown_since, self._body_since) > limits.leaving_seconds:
                return "body"
        return self._writing.late(now, self._gate)

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._idle_since = self._head_since = time.monotonic()
        address = self.client[0] if self.client else ""
        reason = None if self._refusal is None else self._refusal(transport)
        if reason is not None:
            log.warning("refused address=%s reason=%r", address, reason)
            transport.abort()
            return
        entry = self._gate.enter(transport, self, address)
        if entry is Entry.PROBES:
            self.app = _ProbesOnly(self.app)

    def connection_lost(self, exc: Exception | None) -> None:
        self._gate.leave(self.transport)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if self._body_since is not None:
            self._body_bytes += len(data)
        super().data_received(data)

    def handle_events(self) -> None:
        before = self.cycle
        super().handle_events()
        cycle = self.cycle
        if cycle is not None and cycle is not before and self.scope["http_version"] == "1.1":
            self.scope[WRITE] = BodyWriter(cycle).write  # type: ignore[literal-required]
        self._note(time.monotonic())

    def _note(self, now: float) -> None:
        waits_for_head = self.conn.their_state is h11.IDLE
        begun = waits_for_head and bool(self.conn.trailing_data[0])
        if not waits_for_head:
            self._idle_since = self._head_since = None
        else:
            self._idle_since = self._idle_since or now
            if begun:
                self._head_since = self._head_since or now
        if self.conn.their_state is not h11.SEND_BODY:
            self._body_since = None
        elif self._body_since is None:
            self._body_since, self._body_bytes = now, 0
        if self.cycle is not None and any(name == b"transfer-encoding" for name, _ in self.headers):
            self.cycle.keep_alive = False  # nothing after a body whose end another parser may see elsewhere

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        if any(name == b"origin" for name, _ in self.headers):  # a page in somebody's browser; routers send none
            self._refuse(403, "no page may connect here")
            return
        self._idle_since = self._head_since = None
        super().handle_websocket_upgrade(event)

    def send_400_response(self, msg: str) -> None:
        """Answer that no request was readable, and close."""
        self._refuse(400, msg)

    def _refuse(self, status: int, message: str) -> None:
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE) or (
            self.cycle is not None and not self.cycle.response_complete
        ):
            self.transport.abort()  # in the midst of a request: its answer is not to be mixed with another
            return
        body = ApiError(status, message).body
        headers = [("content-type", "application/json"), ("content-length", str(len(body)))]
        response = h11.Response(status_code=status, headers=[*headers, ("connection", "close")])
        for each in (response, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(each) or b"")
        self.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._writing.pause(self.transport)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._writing.resume()


class GuardedWebSocket(WebSocketsSansIOProtocol):
    """A WebSocket. Its pings detect a silent peer; this class detects one that does not read."""

    def __init__(
        self, gate: ConnectionGate, config: Config, server_state: ServerState, app_state: dict[str, Any]
    ) -> None:
        super().__init__(config, server_state, app_state)
        self._gate = gate
        self._writing = _Writing()
        self._since = time.monotonic()

    @property
    def idle_since(self) -> float | None:
        """See gate.Watched: none makes room for others."""
        return None

    def overdue(self, now: float, shutdown_since: float | None) -> str | None:
        """See gate.Watched."""
        if not self.handshake_complete and now - self._since > self._gate.limits.header_seconds:
            return "header"
        return self._writing.late(now, self._gate)

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._gate.take_over(transport, self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._gate.leave(self.transport)
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._writing.pause(self.transport)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._writing.resume()


class _ProbesOnly:
    """The application for connections beyond the limit: it answers probes, and all else with 503."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app: ASGIApp = self._app
        if scope["type"] != "http" or scope["path"] not in PROBES:
            app = service_unavailable  # type: ignore[assignment]
        await app(scope, receive, send)

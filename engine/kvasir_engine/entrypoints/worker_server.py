"""The worker's HTTP server: probes, metrics and the routers' WebSockets."""

import asyncio
import contextlib
import logging

import msgspec
from fastapi import FastAPI, Response, WebSocket, WebSocketDisconnect
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.websockets import WebSocketDisconnected

from kvasir_engine import faults, protocol
from kvasir_engine.api.http.graceful_shutdown import GracefulShutdown
from kvasir_engine.config import EngineConfig
from kvasir_engine.core.engine_thread import EngineThread
from kvasir_engine.core.frame_errors import encoded, request_of
from kvasir_engine.core.metrics import EngineCollector
from kvasir_engine.kv.pages import Owner
from kvasir_engine.protocol import (
    CAPABILITIES,
    GRAMMAR,
    LATEST,
    VERSION,
    Abort,
    BadFrame,
    Drain,
    Endpoint,
    Hello,
    Reserve,
    Resync,
    Submit,
    ToRouter,
    agreed_version,
    encode,
    version_range,
)
from kvasir_engine.status_reports import WorkerLoad, WorkerStatus
from kvasir_engine.supervisor import Supervisor

log = logging.getLogger("worker")

PROTOCOL_ERROR = 1002
POLICY_VIOLATION = 1008
INTERNAL_ERROR = 1011
HELLO_SECONDS = 10.0
"""Seconds that a router has to send its hello."""


def hello_of(config: EngineConfig, thread: EngineThread, endpoint: Endpoint) -> Hello:
    """The worker's first frame to each router."""
    engine = thread.engine
    return Hello(
        VERSION,
        engine.epoch,
        config.role,
        config.served_model_name or config.model,
        engine.max_length,
        config.max_running,
        endpoint,
        latest=LATEST,
        capabilities=CAPABILITIES if engine.grammars.service is None else (*CAPABILITIES, GRAMMAR),
        place=engine.policy.place,
        encryption=config.encryption,
    )


class WorkerServer:
    """The sessions of routers on one engine thread."""

    def __init__(self, thread: EngineThread, hello: Hello, apart: bool = False) -> None:
        """`apart`: routers connect to `router_app`, which has a port of its own, and none to `app`."""
        self._thread = thread
        self._hello = hello
        self._outboxes: set[asyncio.Queue[ToRouter]] = set()
        self._tasks = Supervisor()
        self.draining = False
        registry = CollectorRegistry()
        registry.register(EngineCollector(thread.engine))
        self.app = FastAPI(title="Kvasir worker", docs_url=None, redoc_url=None, openapi_url=None)

        @self.app.get("/health")
        async def health() -> Response:
            return _state(thread.unhealthy_reason())

        @self.app.get("/ready")
        async def ready() -> Response:
            return _state("draining" if self.draining else thread.unhealthy_reason())

        @self.app.get("/metrics")
        async def metrics() -> Response:
            return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

        self.router_app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None) if apart else self.app

        @self.router_app.websocket(protocol.WORKER_PATH)
        async def router(socket: WebSocket) -> None:
            await self._session(socket)

    def show_status(self, shutdown: GracefulShutdown) -> None:
        """Add `GET /status`: what a draining worker still waits for."""

        @self.app.get("/status")
        async def status() -> Response:
            engine = self._thread.engine
            left = shutdown.seconds_left
            links = () if engine.connector is None else engine.connector.links
            leases = engine.load().leases
            shown = WorkerStatus(self.draining, len(engine.jobs), leases, left, self._load(), links)
            return Response(msgspec.json.encode(shown), media_type="application/json")

    def _load(self) -> WorkerLoad:
        engine, meter = self._thread.engine, self._thread.meter
        pool = engine.cache.pool
        return WorkerLoad(
            waiting=len(engine.waiting),
            running=len(engine.running),
            used_pages=pool.size - pool.count(Owner.FREE) - pool.count(Owner.CACHED),
            pages=pool.size,
            prompts=meter.prompts,
            busy=meter.busy,
            alone=meter.alone,
        )

    @property
    def inflight(self) -> int:
        """Requests and leases that have not ended."""
        return self._thread.engine.unfinished

    def drain(self) -> None:
        """Tell the routers to send nothing new; running requests continue."""
        if self.draining:
            return
        self.draining = True
        for outbox in self._outboxes:
            outbox.put_nowait(Drain())

    async def _session(self, socket: WebSocket) -> None:
        await socket.accept()
        greeted = await self._greet(socket)
        if greeted is None:
            return
        loop = asyncio.get_running_loop()
        outbox: asyncio.Queue[ToRouter] = asyncio.Queue()

        def deliver(frames: list[ToRouter]) -> None:
            for frame in frames:
                outbox.put_nowait(frame)

        def sink(frames: list[ToRouter]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server is going down
                loop.call_soon_threadsafe(deliver, frames)

        try:
            await socket.send_bytes(encode(msgspec.structs.replace(self._hello, draining=self.draining)))
        except (WebSocketDisconnect, RuntimeError):
            return
        receiving = asyncio.current_task()
        why = ""

        def cut(reason: str) -> None:
            """A task of the session has ended: close the connection, so that the router uses another worker."""
            nonlocal why
            why = reason
            if receiving is not None:
                receiving.cancel()

        def ended(reason: str) -> None:
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(cut, reason)

        def hang_up() -> None:
            loop.call_soon_threadsafe(cut, "hung up")

        self._outboxes.add(outbox)
        session = self._thread.attach(sink, ended, speaks=greeted.capabilities)
        sender = self._tasks.start(self._send(socket, outbox), f"sender of session {session}", cut)
        try:
            with faults.closable(hang_up):
                while True:
                    self._take(session, outbox, await socket.receive_bytes())
        except WebSocketDisconnect:
            log.info("router left session=%d", session)
        except (BadFrame, KeyError) as error:
            log.warning("router sent nonsense session=%d error=%s", session, error)
            await self._close(socket, PROTOCOL_ERROR, str(error))
        except asyncio.CancelledError:
            if not why:
                raise
            log.warning("session cut session=%d reason=%r", session, why)
            await self._close(socket, INTERNAL_ERROR, why)
        except WebSocketDisconnected:  # it was seen when something was sent
            log.info("router left session=%d", session)
        except Exception as error:
            log.exception("session failed session=%d", session)
            await self._close(socket, INTERNAL_ERROR, str(error))
        finally:
            self._outboxes.discard(outbox)
            self._thread.detach(session)
            await self._tasks.stop(sender)

    @staticmethod
    async def _close(socket: WebSocket, code: int, reason: str) -> None:
        with contextlib.suppress(RuntimeError, WebSocketDisconnect):  # it has gone already
            await socket.close(code, reason.encode(errors="replace")[:120].decode(errors="ignore"))

    async def _greet(self, socket: WebSocket) -> Hello | None:
        """The router's hello. Refuses unsupported versions by name."""
        theirs = "no hello"
        try:
            async with asyncio.timeout(HELLO_SECONDS):
                hello = protocol.decode_to_worker(await socket.receive_bytes())
            if isinstance(hello, Hello):
                if agreed_version(self._hello, hello) is not None:
                    return hello
                theirs = f"version {version_range(hello)}"
        except (BadFrame, KeyError, WebSocketDisconnect, TimeoutError):
            pass
        await self._close(
            socket, POLICY_VIOLATION, f"protocol: I speak version {version_range(self._hello)}, you {theirs}"
        )
        return None

    def _take(self, session: int, outbox: asyncio.Queue[ToRouter], data: bytes) -> None:
        """A frame. A bad one fails its own request, if its id is readable. Raises BadFrame."""
        try:
            frame = protocol.decode_to_worker(data)
        except BadFrame as error:
            request = request_of(data)
            if request is None:
                raise
            log.warning("bad frame session=%d request=%r error=%s", session, request, error)
            why = f"bad frame: {error}"
            self._thread.post(lambda engine: engine.refuse(session, request, why))
            return
        self._handle(session, frame)

    def _handle(self, session: int, frame: protocol.ToWorker) -> None:
        match frame:
            case Submit():
                self._thread.post(lambda engine: engine.submit(session, frame))
            case Reserve():
                self._thread.post(lambda engine: engine.reserve(session, frame))
            case Abort(request):
                self._thread.post(lambda engine: engine.abort(session, request))
            case Resync():
                self._thread.resync(session)
            case Hello():
                raise BadFrame("a second hello")

    @staticmethod
    async def _send(socket: WebSocket, outbox: asyncio.Queue[ToRouter]) -> None:
        while True:
            for data in encoded(await outbox.get()):
                await socket.send_bytes(data)


def _state(reason: str | None) -> Response:
    """The answer to a probe: 200, or 503 with the reason."""
    if reason is None:
        return JSONResponse({"status": "ok"})
    return JSONResponse({"reason": reason}, 503)

"""The worker's HTTP server: probes, metrics and the routers' WebSockets."""

import asyncio
import contextlib
import logging

import msgspec
from fastapi import FastAPI, Response, WebSocket, WebSocketDisconnect
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest

from kvasir_engine import faults, protocol
from kvasir_engine.api.leaving import Leaving
from kvasir_engine.kv.pages import Owner
from kvasir_engine.protocol import Abort, Drain, Hello, Reserve, Resync, Submit, ToRouter
from kvasir_engine.reports import WorkerLoad, WorkerStatus
from kvasir_engine.worker.metrics import EngineCollector
from kvasir_engine.worker.thread import EngineThread

log = logging.getLogger("worker")

HELLO_SECONDS = 10.0
PROTOCOL_ERROR = 1002
POLICY_VIOLATION = 1008


class WorkerServer:
    """Routers' sessions on one engine thread."""

    def __init__(self, thread: EngineThread, hello: Hello) -> None:
        self._thread = thread
        self._hello = hello
        self._outboxes: set[asyncio.Queue[ToRouter]] = set()
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

        @self.app.websocket(protocol.WORKER_PATH)
        async def router(socket: WebSocket) -> None:
            await self._session(socket)

    def show_status(self, leaving: Leaving) -> None:
        """Add `GET /status`: what a worker that leaves still waits for."""

        @self.app.get("/status")
        async def status() -> Response:
            engine = self._thread.engine
            left = leaving.seconds_left
            shown = WorkerStatus(self.draining, len(engine.jobs), engine.load().leases, left, self._load())
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
        return self._thread.engine.owing

    def drain(self) -> None:
        """Tell the routers to send nothing new; what runs goes on."""
        if self.draining:
            return
        self.draining = True
        for outbox in self._outboxes:
            outbox.put_nowait(Drain())

    async def _session(self, socket: WebSocket) -> None:
        await socket.accept()
        if not await self._greet(socket):
            return
        loop = asyncio.get_running_loop()
        outbox: asyncio.Queue[ToRouter] = asyncio.Queue()

        def deliver(frames: list[ToRouter]) -> None:
            for frame in frames:
                outbox.put_nowait(frame)

        def sink(frames: list[ToRouter]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server is going down
                loop.call_soon_threadsafe(deliver, frames)

        await socket.send_bytes(protocol.encode(msgspec.structs.replace(self._hello, draining=self.draining)))
        self._outboxes.add(outbox)
        session = self._thread.attach(sink)
        sender = asyncio.create_task(self._send(socket, outbox))

        def hang_up() -> None:
            asyncio.run_coroutine_threadsafe(socket.close(), loop)

        try:
            with faults.closable(hang_up):
                while True:
                    self._handle(session, protocol.decode_to_worker(await socket.receive_bytes()))
        except WebSocketDisconnect:
            log.info("router left session=%d", session)
        except (msgspec.DecodeError, KeyError) as error:
            log.warning("router sent nonsense session=%d error=%s", session, error)
            await socket.close(PROTOCOL_ERROR, str(error)[:120])
        finally:
            self._outboxes.discard(outbox)
            self._thread.detach(session)
            sender.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await sender

    async def _greet(self, socket: WebSocket) -> bool:
        """The router's hello; a version that we do not speak is refused by name."""
        try:
            async with asyncio.timeout(HELLO_SECONDS):
                hello = protocol.decode_to_worker(await socket.receive_bytes())
        except (msgspec.DecodeError, KeyError, WebSocketDisconnect, TimeoutError):
            hello = None
        if isinstance(hello, Hello) and hello.version == protocol.VERSION:
            return True
        theirs = f"version {hello.version}" if isinstance(hello, Hello) else "no hello"
        with contextlib.suppress(RuntimeError):  # it has gone already
            await socket.close(POLICY_VIOLATION, f"protocol: I speak version {protocol.VERSION}, you sent {theirs}")
        return False

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
                raise msgspec.DecodeError("hello was said already")

    @staticmethod
    async def _send(socket: WebSocket, outbox: asyncio.Queue[ToRouter]) -> None:
        with contextlib.suppress(WebSocketDisconnect, RuntimeError):  # the receiving side ends the session
            while True:
                await socket.send_bytes(protocol.encode(await outbox.get()))


def _state(reason: str | None) -> Response:
    """What a probe gets: 200, or 503 with the reason."""
    if reason is None:
        return JSONResponse({"status": "ok"})
    return JSONResponse({"reason": reason}, 503)

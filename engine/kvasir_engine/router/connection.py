"""One WebSocket to one worker: the hello, reconnects, and the dispatch of frames to their streams."""

import asyncio
import logging
import random
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from websockets.asyncio.client import ClientConnection, connect, unix_connect
from websockets.exceptions import WebSocketException

from kvasir_engine import faults
from kvasir_engine.keepalive import notice_silence
from kvasir_engine.protocol import (
    ALIVE,
    CAPABILITIES,
    LATEST,
    VERSION,
    WORKER_PATH,
    Abort,
    Alive,
    BadFrame,
    CacheEvents,
    Delta,
    Drain,
    Endpoint,
    Failure,
    Hello,
    Leased,
    Load,
    Reserve,
    Resync,
    Role,
    Step,
    Submit,
    ToRouter,
    ToWorker,
    agreed_version,
    decode_to_router,
    encode,
    version_range,
)
from kvasir_engine.router.frame_recovery import readable
from kvasir_engine.router.prefix_index import PrefixIndex
from kvasir_engine.router.worker_trust import WorkerTrust, check_claim
from kvasir_engine.supervisor import Supervisor
from kvasir_engine.tls import Untrusted, why_failed
from kvasir_engine.transport_policy import ANY_TRANSPORT, TransportPolicy

log = logging.getLogger("router")

State = Literal["connecting", "ready", "draining", "refused"]

HELLO_SECONDS = 10.0
PING_SECONDS = 5.0
PONG_SECONDS = 10.0  # for a process that hangs; a machine that falls silent is noticed sooner
FIRST_BACKOFF = 0.1
MOST_BACKOFF = 0.5  # a worker serves as soon as it is ready: the one that it replaces may be about to leave
REFUSED_BACKOFF = 2.0
MOST_FRAME_BYTES = 256 << 20
SILENT_SECONDS = 90.0
"""A worker that sends nothing about our requests for so many seconds, though it sends keepalives, is hung."""
UNIX = "ws+unix:"
"""Prefix of the URL of a worker on this machine; the path of its Unix socket follows."""
ANY_WORKER = WorkerTrust()
MISSED = 3
"""A request that is missing from so many consecutive reports of a worker was lost there."""


@dataclass(frozen=True)
class ConnectionLost:
    """The socket to a worker closed, and all streams on it ended."""

    reason: str


Event = Leased | Delta | ConnectionLost


@dataclass(frozen=True)
class Peer:
    """A worker as its hello describes it."""

    epoch: int
    role: Role
    model: str
    max_length: int
    endpoint: Endpoint
    capabilities: tuple[str, ...] = ()
    version: int = VERSION
    transport: TransportPolicy = ANY_TRANSPORT

    def cannot_write_to(self, holder: "Peer") -> str | None:
        """Why this worker's KV cannot, or may not, be written to `holder`; None where it may."""
        refusal = self.transport.refusal(holder.transport)
        return refusal or self.endpoint.fingerprint.mismatch(holder.endpoint.fingerprint)


class WorkerRefused(Exception):
    """The router cannot use this worker; the message says why."""


def router_hello(epoch: int) -> Hello:
    """The router's first frame."""
    return Hello(VERSION, epoch, latest=LATEST, capabilities=CAPABILITIES)


def check_hello(frame: ToRouter, model: str) -> Peer:
    """The worker's hello as a Peer. Raises WorkerRefused for a worker that this router cannot use."""
    if not isinstance(frame, Hello):
        raise WorkerRefused(f"first frame is {type(frame).__name__}, not Hello")
    ours = router_hello(0)
    version = agreed_version(ours, frame)
    if version is None:
        raise WorkerRefused(f"protocol version: {version_range(ours)}, {version_range(frame)}")
    if frame.role is None or frame.endpoint is None:
        raise WorkerRefused("hello without a role or an endpoint")
    if model and frame.model and frame.model != model:
        raise WorkerRefused(f"model: {model!r}, {frame.model!r}")
    return Peer(
        frame.epoch,
        frame.role,
        frame.model,
        frame.max_length,
        frame.endpoint,
        frame.capabilities,
        version,
        TransportPolicy(frame.encryption, frame.place),
    )


class WorkerConnection:
    """Keeps the socket to the worker at `url` (ws://host:port, wss:// or ws+unix:PATH) while `run` runs.

    `changed` is called whenever `state` or `peer` changes. Frames are sent in the order they are posted.
    """

    def __init__(
        self,
        name: str,
        url: str,
        epoch: int,
        model: str,
        changed: Callable[[], None],
        trust: WorkerTrust = ANY_WORKER,
    ) -> None:
        self.name = name
        self.url = url
        self.state: State = "connecting"
        self.reason = "not connected yet"
        self.peer: Peer | None = None
        self.load = Load()
        self.prefixes = PrefixIndex()
        self._epoch = epoch
        self._model = model
        self._trust = trust
        self._changed = changed
        self._streams: dict[str, Callable[[Event], None]] = {}
        self._unused = asyncio.Event()
        self._unused.set()
        self._expected: dict[str, int] = {}
        self._outbound: asyncio.Queue[tuple[ToWorker, bytes]] = asyncio.Queue()
        self._tasks = Supervisor()
        self._cut: str | None = None
        self._missed: dict[str, int] = {}
        self._watched = False
        self._heard = 0.0

    @property
    def requests(self) -> int:
        """Requests on the worker: what it last reported, or the number of this router's if that is larger."""
        return max(self.load.running + self.load.waiting, len(self._streams))

    @property
    def queued_tokens(self) -> int:
        """Prompt tokens that wait there to be computed: what it last reported, or this router's if that is more."""
        return max(self.load.queued_tokens, sum(self._expected.values()))

    async def unused(self) -> None:
        """Wait until no stream is open here."""
        await self._unused.wait()

    def open(self, frame: Submit | Reserve, sink: Callable[[Event], None], expected_tokens: int) -> None:
        """Send `frame`, and pass each frame with its id to `sink` until `close`.

        `expected_tokens` count as queued on the worker until the stream's first event with tokens. A frame that
        cannot be sent ends its own stream at once.
        """
        self._streams[frame.id] = sink
        self._unused.clear()
        self._expected[frame.id] = expected_tokens
        if len(self._streams) == 1:
            self._heard = asyncio.get_running_loop().time()
        try:
            self._post(frame)
        except BadFrame as error:
            log.error("a request cannot be sent worker=%s request=%s reason=%r", self.name, frame.id, str(error))
            self._give(frame.id, Delta(frame.id, failure=Failure("bad_request", str(error))))

    def close(self, id: str, abort: bool) -> None:
        """Ignore further frames for `id`; with `abort`, tell the worker to stop it. Idempotent."""
        self._expected.pop(id, None)
        self._missed.pop(id, None)
        if self._streams.pop(id, None) is not None and abort:
            self._post(Abort(id))
        if not self._streams:
            self._unused.set()

    def abandon(self, reason: str) -> None:
        """Fail all streams, because the connection's task has ended."""
        self._lose(reason)
        self._become("connecting", reason)

    def _post(self, frame: ToWorker) -> None:
        self._outbound.put_nowait((frame, encode(frame)))

    async def run(self) -> None:
        """Connect, and reconnect with backoff, until cancelled."""
        backoff = FIRST_BACKOFF
        while True:
            reason = "not connected"
            try:
                async with _connect(self.url, self._trust.context(self.url)) as socket:
                    notice_silence(socket.transport.get_extra_info("socket"))
                    await self._greet(socket)
                    backoff = FIRST_BACKOFF
                    await self._exchange(socket)
                    reason = "connection closed"
            except (WorkerRefused, Untrusted) as refusal:
                reason = str(refusal)
                backoff = REFUSED_BACKOFF
                self._become("refused", reason)
            except ssl.SSLError as error:
                reason = f"no TLS with it: {why_failed(error)}"
                backoff = REFUSED_BACKOFF
                self._become("refused", reason)
            except (OSError, WebSocketException) as error:
                reason = f"{type(error).__name__}: {error}"
            except BadFrame as error:
                reason = f"worker sent nonsense: {error}"
                log.warning("worker sent nonsense worker=%s url=%s error=%r", self.name, self.url, str(error))
                backoff = REFUSED_BACKOFF
            except Exception as error:  # of one worker, not of the others
                reason = f"{type(error).__name__}: {error}"
                log.exception("connection failed worker=%s url=%s", self.name, self.url)
                backoff = REFUSED_BACKOFF
            finally:
                self._lose("connection lost")
            if self.state != "refused":
                self._become("connecting", reason)
            await asyncio.sleep(backoff * random.uniform(0.5, 1))
            backoff = backoff if self.state == "refused" else min(2 * backoff, MOST_BACKOFF)

    async def _greet(self, socket: ClientConnection) -> None:
        identity = self._trust.peer(socket.transport.get_extra_info("ssl_object"))
        await socket.send(encode(router_hello(self._epoch)))
        async with asyncio.timeout(HELLO_SECONDS):
            frame = decode_to_router(_binary(await socket.recv()))
        peer = check_hello(frame, self._model)
        check_claim(identity, peer.role)
        self.peer = peer
        self.load = Load()
        self.prefixes = PrefixIndex()
        self._outbound = asyncio.Queue()
        self._post(Resync())
        assert isinstance(frame, Hello)
        self._watched = ALIVE in frame.capabilities
        self._heard = asyncio.get_running_loop().time()
        self._become("draining" if frame.draining else "ready", "draining" if frame.draining else "")

    async def _exchange(self, socket: ClientConnection) -> None:
        self._cut = None

        def cut(reason: str) -> None:
            """A task of the connection has ended: close the connection."""
            self._cut = reason
            socket.transport.abort()

        started = [self._tasks.start(self._send(socket), f"sender to {self.name}", cut)]
        if self._watched:
            started.append(self._tasks.start(self._watch(cut), f"watch of {self.name}", cut))
        try:
            with faults.closable(socket.transport.abort):
                async for data in socket:
                    self._heard = asyncio.get_running_loop().time()
                    for frame in readable(_binary(data)):
                        self._dispatch(frame)
        finally:
            await self._tasks.stop(*started)
        if self._cut is not None:
            raise OSError(self._cut)

    async def _send(self, socket: ClientConnection) -> None:
        while True:
            frame, data = await self._outbound.get()
            await socket.send(data)
            if isinstance(frame, Reserve):
                faults.hit("router.reserved")
            elif isinstance(frame, Submit) and frame.lease is not None:
                faults.hit("router.submitted")

    async def _watch(self, cut: Callable[[str], None]) -> None:
        """Close the connection when a worker with requests of ours stays silent; a healthy one reports often."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(SILENT_SECONDS / 10)
            silent = loop.time() - self._heard
            if self._streams and silent > SILENT_SECONDS:
                log.error("worker says nothing worker=%s url=%s seconds=%.0f", self.name, self.url, silent)
                cut(f"the worker said nothing for {silent:.0f} s")

    def _take_alive(self, requests: list[str]) -> None:
        known = set(requests)
        missing = [id for id in self._streams if id not in known]
        self._missed = {id: self._missed.get(id, 0) + 1 for id in missing}
        for id in [id for id, times in self._missed.items() if times >= MISSED]:
            log.error("worker lost a request worker=%s request=%s", self.name, id)
            self._give(id, Delta(id, failure=Failure("request_lost", "the worker does not know the request")))

    def _dispatch(self, frame: ToRouter) -> None:
        match frame:
            case Step():
                self.load = frame.load
                for delta in frame.deltas:
                    if delta.tokens:
                        self._expected.pop(delta.id, None)
                    self._give(delta.id, delta)
            case Leased():
                self._give(frame.id, frame)
            case CacheEvents():
                if self.prefixes.apply(frame):
                    log.warning("cache events lost worker=%s seq=%d", self.name, frame.seq)
                    self._post(Resync())
            case Drain():
                self._become("draining", "draining")
            case Alive(requests):
                self._take_alive(requests)
            case Hello():
                raise WorkerRefused("a second hello")

    def _give(self, id: str, event: Event) -> None:
        sink = self._streams.get(id)
        if sink is not None:  # a frame may cross an abort
            sink(event)

    def _lose(self, reason: str) -> None:
        self.peer = None
        self._expected.clear()
        self._missed.clear()
        lost, self._streams = self._streams, {}
        self._unused.set()
        for sink in lost.values():
            sink(ConnectionLost(reason))

    def _become(self, state: State, reason: str) -> None:
        if (state, reason) != (self.state, self.reason):
            level = logging.WARNING if state == "refused" else logging.INFO
            log.log(level, "worker %s worker=%s url=%s reason=%r", state, self.name, self.url, reason)
        self.state, self.reason = state, reason
        self._changed()


def _connect(url: str, tls: ssl.SSLContext | None) -> connect:
    options: dict[str, Any] = {
        "ssl": tls,
        "max_size": MOST_FRAME_BYTES,
        "compression": None,
        "proxy": None,
        "open_timeout": HELLO_SECONDS,
        "ping_interval": PING_SECONDS,
        "ping_timeout": PONG_SECONDS,
        "close_timeout": 1,
    }
    if url.startswith(UNIX):
        return unix_connect(url.removeprefix(UNIX), f"ws://localhost{WORKER_PATH}", **options)
    return connect(url + WORKER_PATH, **options)


def _binary(data: str | bytes) -> bytes:
    if isinstance(data, str):
        raise WorkerRefused("a text frame")
    return data

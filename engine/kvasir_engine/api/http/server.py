"""Serves an application on one socket until SIGTERM or SIGINT, then drains."""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import uvicorn
from uvicorn.server import ServerState

from kvasir_engine.api.http.acceptor import Acceptor
from kvasir_engine.api.http.connections import ConnectionGate
from kvasir_engine.api.http.graceful_shutdown import GracefulShutdown
from kvasir_engine.api.http.limits import HttpLimits, fitted
from kvasir_engine.api.http.protocols import GuardedHttp
from kvasir_engine.errors import PortTaken, UserError
from kvasir_engine.private_folders import drain_socket
from kvasir_engine.tls import Credentials, Untrusted

log = logging.getLogger("api")


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises PortTaken."""
    return _bound(host, port, shared=False)


def bind_shared(host: str, port: int, count: int) -> list[socket.socket]:
    """`count` bound sockets of one address, not listening yet: the kernel distributes connections among those that
    listen.

    Another process with shared sockets at the address is not detected here but by `check_port`. Raises PortTaken.
    """
    first = _bound(host, port, shared=True)
    port = first.getsockname()[1]
    return [first, *(_bound(host, port, shared=True) for _ in range(count - 1))]


def _bound(host: str, port: int, shared: bool) -> socket.socket:
    """A bound socket; it listens unless it is `shared`."""
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if sock.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((host, port))
        if not shared:
            sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise PortTaken(f"cannot listen on {host}:{port}: {reason}") from error
    # What is accepted inherits it. Without it a stream's first event waits for the client's acknowledgement of the
    # headers, 40 ms; asyncio sets it only on sockets that say which protocol they were made for.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def check_port(host: str, port: int) -> None:
    """Raise PortTaken if the address cannot be listened on: before minutes of loading, not after.

    Raises UserError where the folder for the socket of `kvasir drain` is missing, too.
    """
    listen(host, port).close()
    try:
        path = drain_socket(host, port)
    except OSError as error:
        raise UserError(f"no folder for the socket of `kvasir drain`: {error}") from error
    if len(os.fsencode(path)) > MOST_SOCKET_PATH:
        raise UserError(f"no socket of `kvasir drain` can be at {path}: the path is too long; set KVASIR_RUN_DIR")


def end_at_sigterm() -> None:
    """Let SIGTERM end the process at once until `serve` runs: there is nothing to finish.

    That is the default, except for the first process of a container, which may load for minutes.
    """
    signal.signal(signal.SIGTERM, lambda *_: os._exit(128 + signal.SIGTERM))


BACKLOG = 2048
MOST_SOCKET_PATH = 107  # what a Unix socket's address holds
SWEEP_TICKS = 5  # uvicorn's ticks of 0.1 s between looks at the connections


class _Server(uvicorn.Server):
    """uvicorn with limits, and without its own signal handling, which would not wait for the drain.

    uvicorn is well kept, has the WebSockets that routers use, and its h11 side is plain Python that can be limited
    from outside.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        limits: HttpLimits,
        shutdown: GracefulShutdown,
        secured: "Secured | None" = None,
    ) -> None:
        super().__init__(config)
        self._secured = secured
        self._gate = ConnectionGate(limits)
        self._shutdown = shutdown
        self._shutdown_since: float | None = None
        self._acceptors: list[Acceptor] = []

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        def make() -> asyncio.Protocol:
            return GuardedHttp(self._gate, self.config, self.server_state, {})

        self.servers = []
        self._acceptors = [Acceptor(sock, make) for sock in sockets or []]
        if self._secured is not None:
            self._acceptors.append(self._secured.accept(self._gate, self.config, self.server_state))
        self.started = True

    async def on_tick(self, counter: int) -> bool:
        if counter % SWEEP_TICKS == 0:
            if self._shutdown_since is None and self._shutdown.seconds_left is not None:
                self._shutdown_since = time.monotonic()
            self._gate.sweep(self._shutdown_since)
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for each in self._acceptors:
            each.close()
        await super().shutdown(sockets)


@dataclass(frozen=True)
class Secured:
    """A second listening socket, on which `app` is served by mutual TLS to peers of these `roles` only."""

    app: Any
    sock: socket.socket
    credentials: Credentials
    roles: tuple[str, ...]

    def accept(self, gate: ConnectionGate, config: uvicorn.Config, state: ServerState) -> Acceptor:
        """Start accepting; `config` is that of the other socket."""
        own = uvicorn.Config(
            self.app,
            log_config=None,
            access_log=False,
            lifespan="off",
            http="h11",
            proxy_headers=False,
            server_header=False,
            ws_per_message_deflate=False,
            timeout_keep_alive=config.timeout_keep_alive,
        )
        own.load()

        def make() -> asyncio.Protocol:
            return GuardedHttp(gate, own, state, {}, self.refusal)

        return Acceptor(self.sock, make, self.credentials)

    def refusal(self, transport: Any) -> str | None:
        """Why a peer is refused after its handshake, or None."""
        try:
            self.credentials.peer(transport.get_extra_info("ssl_object"), *self.roles)
        except Untrusted as error:
            return str(error)
        return None


async def serve(
    app: Any,
    sock: socket.socket,
    shutdown: GracefulShutdown,
    until: asyncio.Event | None = None,
    limits: HttpLimits | None = None,
    secured: Secured | None = None,
) -> None:
    """Serve the ASGI `app` until SIGTERM, SIGINT or `until`; then become unready, finish what is in flight, and
    return.

    The deadline of `shutdown`, or a second signal, aborts what still runs.
    """
    with ended_by_signals(shutdown) as stop:
        async with shutdown.listening_at(drain_socket(*sock.getsockname()[:2])):
            stops = [each for each in (stop, until) if each is not None]
            await serve_until(app, sock, shutdown, stops, limits, secured)


@contextlib.contextmanager
def ended_by_signals(shutdown: GracefulShutdown) -> Iterator[asyncio.Event]:
    """An event that SIGTERM and SIGINT set; at the second signal `shutdown` stops waiting."""
    stop = asyncio.Event()

    def on_signal() -> None:
        if stop.is_set():
            shutdown.stop_waiting()
        stop.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    try:
        yield stop
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


async def serve_until(
    app: Any,
    sock: socket.socket,
    shutdown: GracefulShutdown,
    stops: Sequence[asyncio.Event],
    limits: HttpLimits | None = None,
    secured: Secured | None = None,
) -> None:
    """As `serve`, until one of `stops`, in a process whose parent handles signals."""
    limits = fitted(limits or HttpLimits())
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="off",
        http="h11",
        proxy_headers=False,  # whoever connects is the client: no header says otherwise
        server_header=False,
        ws_per_message_deflate=False,  # routers do not compress, and what others compress may be large
        timeout_keep_alive=int(limits.idle_seconds),
        timeout_graceful_shutdown=1,
    )
    server = _Server(config, limits, shutdown, secured)
    serving = asyncio.create_task(server.serve(sockets=[sock]))
    stopping = [asyncio.create_task(each.wait()) for each in stops]
    try:
        await asyncio.wait({serving, *stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not serving.done() and (left := await shutdown.done()):
            log.warning("cutting off requests inflight=%d", left)
        server.should_exit = True
        await serving
    finally:
        for each in stopping:
            each.cancel()

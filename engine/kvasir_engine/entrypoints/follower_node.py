"""A node of a worker other than node 0: its ranks' processes, their connections to the leader, and probes.

It lives as long as the worker. The leader decides what its ranks do, and when they end.
"""

import asyncio
import contextlib
import logging
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import NoReturn

from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse

from kvasir_engine.api.http.graceful_shutdown import GracefulShutdown
from kvasir_engine.api.http.server import check_port, end_at_sigterm, listen, serve
from kvasir_engine.config import EngineConfig
from kvasir_engine.entrypoints.build import check, log_progress
from kvasir_engine.errors import UserError
from kvasir_engine.executor import node_protocol
from kvasir_engine.executor.node_protocol import (
    AnyFrame,
    Channel,
    Closed,
    Ended,
    Leave,
    NodeHello,
    NodeSettings,
    RankEnded,
    Welcome,
    WorkerLoaded,
)
from kvasir_engine.executor.rank_link import end, exit_reason_of, spawn
from kvasir_engine.interruptible import run_interruptible
from kvasir_engine.model.loading.resolver import resolve
from kvasir_engine.model.loading.weight_loader import choose_device
from kvasir_engine.model.models.registry import load_config
from kvasir_engine.model.tensor_parallel import shard
from kvasir_engine.nodes import Nodes
from kvasir_engine.supervisor import ExpectedEnd, start_thread
from kvasir_engine.tls import HANDSHAKE_SECONDS, Credentials, Untrusted, check_role, credentials_of, why_failed
from kvasir_engine.tls_stream import Stream, TlsStream, relay

log = logging.getLogger("nodes")

CONNECT_SECONDS = 5.0
ANSWER_SECONDS = 60.0
"""Seconds that the leader, after it accepted the node, may take to accept one of its ranks."""
RETRY_SECONDS = 0.5
SAY_SECONDS = 10.0
"""Seconds between two log lines that the leader does not answer."""
REASON_SECONDS = 3.0
"""Seconds that the leader has to say why the worker ends, after a rank here has ended."""
STOP_SECONDS = 10.0
"""Seconds for the ranks to end after the leader has closed."""
LEADER_SECONDS = 10.0
"""Seconds beyond the leader's drain deadline, which begins a moment after ours."""


class Leader:
    """Makes connections to the leader, each with a hello. `epoch` is the leader's, once it has
    welcomed the node.
    """

    def __init__(self, where: Nodes, group: NodeSettings, credentials: Credentials | None = None) -> None:
        self._where = where
        self._credentials = credentials
        self._group = group
        self.epoch = 0
        self.name = f"the leader at {where.host}:{where.port}"

    def join(self) -> Stream:
        """The node's own connection; waits until a leader answers. Raises UserError when the leader refuses."""
        began = said = time.monotonic()
        log.info("joins node=%d of=%d leader=%s:%d", *self._about())
        while True:
            try:
                return self.connect(self._where.ranks(self._group.config.tensor_parallel).start, "node", None)
            except OSError as error:
                if time.monotonic() - said > SAY_SECONDS:
                    said = time.monotonic()
                    log.info("%s does not answer yet seconds=%.0f reason=%r", self.name, said - began, str(error))
            time.sleep(RETRY_SECONDS)

    def _about(self) -> tuple[int, int, str, int]:
        return self._where.rank, self._where.count, self._where.host, self._where.port

    def connect(self, rank: int, channel: Channel, seconds: float | None) -> Stream:
        """A connection that the leader accepts within so many seconds. Raises UserError, or OSError."""
        sock = socket.create_connection((self._where.host, self._where.port), CONNECT_SECONDS)
        try:
            node_protocol.watch(sock)
            stream = self._authenticated(sock)
            node_protocol.send(
                stream, NodeHello(node_protocol.VERSION, self._group, self._where.rank, rank, channel, self.epoch)
            )
            sock.settimeout(seconds)  # a leader that still fetches its model listens, and answers later
            match node_protocol.receive(stream):
                case Welcome(epoch):
                    self.epoch = epoch
                    sock.settimeout(None)
                    return stream
                case node_protocol.Refused(reason):
                    raise UserError(f"{self.name} refuses node {self._where.rank}: {reason}")
                case None:
                    raise ConnectionError("it closed the connection")
                case frame:
                    raise node_protocol.unexpected(frame)
        except (ssl.SSLError, Untrusted) as error:
            sock.close()
            why = str(error) if isinstance(error, Untrusted) else why_failed(error)
            raise UserError(f"no TLS with {self.name}: {why}") from None
        except ValueError as error:
            sock.close()
            raise UserError(
                f"what answers at {self._where.host}:{self._where.port} is not a leader: {error}"
            ) from None
        except BaseException:
            sock.close()
            raise

    def _authenticated(self, sock: socket.socket) -> Stream:
        """The connection, after the leader's certificate proved its role."""
        if self._credentials is None:
            return sock
        sock.settimeout(HANDSHAKE_SECONDS)
        stream = TlsStream(sock, self._credentials.client, server_side=False)
        self._credentials.peer(stream.tls, self._credentials.identity.role)
        return stream


class Follower:
    """This node's ranks, from the leader's welcome until it closes.

    `start` returns when all ranks of the worker have loaded. If anything else ends the worker, this process ends
    with one line that says why: with exit status 2 before that, 1 after it.
    """

    def __init__(
        self, config: EngineConfig, where: Nodes, folder: Path, credentials: Credentials | None = None
    ) -> None:
        self._leader = Leader(where, NodeSettings.of(config, folder), credentials)
        self._size = config.tensor_parallel
        self._ranks = where.ranks(self._size)
        self._folder = folder
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._lock = threading.Lock()
        self._ending = threading.Lock()
        self._node: Stream
        self._loaded = threading.Event()
        self._closing = threading.Event()
        self._closed = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self.draining = False

    def start(self) -> None:
        """Join, start the ranks, and wait until all have loaded. Raises UserError when the leader refuses us."""
        self._node = self._leader.join()
        try:
            for rank in self._ranks:
                with self._channel(rank, "steps") as steps, self._channel(rank, "reports") as reports:
                    self._processes[rank] = spawn(rank, self._folder, steps.fileno(), reports.fileno())
        except OSError as error:
            raise UserError(f"{self._leader.name} {node_protocol.loss(error)}") from None
        for rank in self._ranks:
            start_thread(partial(self._watch, rank), f"kvasir-watch-{rank}", self._end)
        start_thread(self._read, "kvasir-leader", self._end)
        self._loaded.wait()

    def _channel(self, rank: int, channel: Channel) -> socket.socket:
        """A socket to the leader for a rank's process; this process does the TLS."""
        stream = self._leader.connect(rank, channel, ANSWER_SECONDS)
        if isinstance(stream, socket.socket):
            return stream
        assert isinstance(stream, TlsStream)
        return relay(stream, lambda work, name: start_thread(work, name, self._end), f"kvasir-{channel}-{rank}")

    # -- what GracefulShutdown asks

    @property
    def inflight(self) -> int:
        """1 until the leader has closed: only the leader knows what is in flight."""
        return 0 if self._closing.is_set() else 1

    def drain(self) -> None:
        """Become unready, and ask the leader to drain. The ranks run until it closes."""
        self.draining = True
        self._tell(Leave())

    async def serve(self, host: str, port: int, drain: float) -> None:
        """Answer probes until the leader closes, or the drain deadline has passed."""
        self._loop = asyncio.get_running_loop()
        if self._closing.is_set():
            self._closed.set()
        app = FastAPI(title="Kvasir node", docs_url=None, redoc_url=None, openapi_url=None)

        @app.get("/health")
        async def health() -> Response:
            return JSONResponse({"status": "ok"})

        @app.get("/ready")
        async def ready() -> Response:
            return JSONResponse({"reason": "draining"}, 503) if self.draining else JSONResponse({"status": "ok"})

        shutdown = GracefulShutdown(self, drain)
        sock = listen(host, port)
        log.info("serving probes address=%s:%d", *sock.getsockname()[:2])
        await serve(app, sock, shutdown, self._closed)

    def close(self) -> None:
        """End with the ranks once the leader has closed; if it does not, with status 1."""
        if not self._closing.is_set():
            self._end(f"{self._leader.name} has not closed, and this node has to leave")
        for process in self._processes.values():
            end(process, STOP_SECONDS)
        self._node.close()

    # -- on threads of their own

    def _read(self) -> None:
        error: Exception | None = None
        try:
            while frame := node_protocol.receive(self._node):
                match frame:
                    case WorkerLoaded():
                        self._loaded.set()
                    case Closed():
                        self._close()
                        raise ExpectedEnd
                    case Ended(reason):
                        self._end(reason)
                    case _:
                        raise node_protocol.unexpected(frame)
        except (OSError, ValueError) as lost:
            error = lost
        self._end(f"{self._leader.name} {node_protocol.loss(error)}; the worker ends with it")

    def _close(self) -> None:
        log.info("the leader has closed")
        self._closing.set()
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # it is going down already
                self._loop.call_soon_threadsafe(self._closed.set)

    def _watch(self, rank: int) -> None:
        """Report a rank that ends to the leader, which ends the worker and says why."""
        exit_reason = exit_reason_of(self._processes[rank].wait())
        if not self._closing.is_set():
            self._tell(RankEnded(rank, exit_reason))
            if not self._closing.wait(REASON_SECONDS):
                self._end(f"rank {rank} of {self._size} {exit_reason}; the worker ends with it")
        raise ExpectedEnd

    def _tell(self, frame: AnyFrame) -> None:
        with self._lock, contextlib.suppress(OSError):  # if it has gone, the reading thread knows
            node_protocol.send(self._node, frame)

    def _end(self, reason: str) -> NoReturn:
        self._ending.acquire()  # for ever: one reason is enough
        sys.stderr.write(f"kvasir: error: {reason}\n")
        sys.stderr.flush()
        os._exit(1 if self._loaded.is_set() else 2)


def follow(config: EngineConfig) -> None:
    """Be a node other than 0, until the leader closes. Raises UserError for what the user can mend."""
    nodes, ranks = config.nodes, config.tensor_parallel
    assert nodes is not None
    end_at_sigterm()
    check_port(config.host, config.port)
    check(config)
    credentials = credentials_of(config.tls_dir)
    if credentials is not None:
        check_role(credentials, config.role)
    folder = resolve(config.model, config.revision or None, progress=log_progress())
    shard(load_config(folder), 0, ranks)  # refused here, before there are processes
    choose_device(config.device, nodes.ranks(ranks).start, ranks, config.nnodes)
    follower = Follower(config, nodes, folder, credentials)
    follower.start()
    run_interruptible(follower.serve(config.host, config.port, config.drain_seconds + LEADER_SECONDS))
    follower.close()

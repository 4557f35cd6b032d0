"""The leader's listening socket for the other nodes of its worker, and the nodes that have joined."""

import contextlib
import errno
import logging
import os
import secrets
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection

from kvasir_engine.errors import PortTaken
from kvasir_engine.executor import node_protocol
from kvasir_engine.executor.node_protocol import (
    AnyFrame,
    Leave,
    NodeHello,
    NodeSettings,
    RankEnded,
    Refused,
    Welcome,
)
from kvasir_engine.executor.rank_link import Channel
from kvasir_engine.nodes import Nodes
from kvasir_engine.supervisor import ExpectedEnd, start_thread
from kvasir_engine.tls import Credentials, Untrusted, why_failed
from kvasir_engine.tls_stream import Stream, StreamConnection, TlsStream

log = logging.getLogger("nodes")

EXIT_REASON_SECONDS = 0.5
"""In which a node says how its rank ended, after the rank's connection has."""
WAIT_SECONDS = 10.0
"""Between two log lines that name the nodes that have not joined."""
GREETED_AT_ONCE = 32
MOST_GREETINGS = 128
"""Those that wait, too."""
MOST_OF_ADDRESS = 16
"""Of these: nobody keeps the others out by connections that say nothing."""
GREETING_SECONDS = 30.0
"""From a connection's beginning to its hello, however little comes at a time."""
OVERRUN = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.ECONNABORTED, errno.EINTR)
"""What passes: descriptors run out, or who came has gone."""
OVERRUN_SECONDS = 0.1
BACKLOG = 128


class JoinedNode:
    """A node that has joined, as the leader sees it."""

    def __init__(self, number: int, sock: Stream, address: str) -> None:
        self.number = number
        self.address = address
        self.sock = sock
        self._exit_reasons: dict[int, str] = {}
        self._lock = threading.Lock()
        self._news = threading.Condition()
        self.gone = threading.Event()

    def send(self, frame: AnyFrame) -> None:
        """Send a frame, if the node is still connected."""
        with self._lock, contextlib.suppress(OSError):
            node_protocol.send(self.sock, frame)

    def rank_ended(self, rank: int, exit_reason: str) -> None:
        """Note how a rank of the node ended."""
        with self._news:
            self._exit_reasons[rank] = exit_reason
            self._news.notify_all()

    def disconnected(self) -> None:
        """Note that the node's connection is gone."""
        with self._news:
            self.gone.set()
            self._news.notify_all()

    def exit_reason(self, rank: int) -> str | None:
        """How a rank ended; `None` if its node is gone too."""
        with self._news:
            self._news.wait_for(lambda: rank in self._exit_reasons or self.gone.is_set(), EXIT_REASON_SECONDS)
            return (
                None
                if self.gone.is_set() and rank not in self._exit_reasons
                else self._exit_reasons.get(rank, "ended")
            )


@dataclass(frozen=True)
class JoinedRank:
    """A rank of another node, and its connections."""

    rank: int
    node: JoinedNode
    steps: Channel
    reports: Channel
    leader: str
    """The leader's address, as that node reached it."""


@dataclass(frozen=True)
class _Taken:
    """An accepted connection, and the leader's address to which it was made."""

    stream: Stream
    leader: str


class NodeListener:
    """The leader's side. It listens at once, and answers connections after `open`.

    Only nodes that fit `group`, which has to be set before, may join. `leave` is called when a node has to leave.
    Raises PortTaken.
    """

    def __init__(self, where: Nodes, leave: Callable[[], None], credentials: Credentials | None = None) -> None:
        self._where = where
        self._leave = leave
        self._credentials = credentials
        self._listening = _listen(where)
        self._epoch = secrets.randbits(63) + 1
        self._nodes: dict[int, JoinedNode] = {}
        self._taken: dict[tuple[int, node_protocol.Channel], _Taken] = {}
        self._changed = threading.Condition()
        self._greeted: Counter[str] = Counter()
        self._counting = threading.Lock()
        self._ended: Callable[[str], None]
        self.group: NodeSettings

    def open(self, ended: Callable[[str], None]) -> None:
        """Let nodes join. `ended` gets the reason when a node that had joined is gone."""
        self._ended = ended
        start_thread(self._accept, "kvasir-nodes", ended)

    def wait(self) -> list[JoinedRank]:
        """Wait for all ranks of the other nodes, and return them."""
        size = self.group.config.tensor_parallel
        with self._changed:
            while missing := self._missing():
                log.info("waits for nodes port=%d missing=%s", self._where.port, missing)
                self._changed.wait_for(lambda: not self._missing(), WAIT_SECONDS)
            joined = []
            for number, node in sorted(self._nodes.items()):
                for rank in self._where.ranks(size, number):
                    steps, reports = self._taken[rank, "steps"], self._taken[rank, "reports"]
                    ours = _channel(steps.stream), _channel(reports.stream)
                    joined.append(JoinedRank(rank, node, *ours, steps.leader))
            return joined

    def _missing(self) -> list[int]:
        """The nodes that have not joined with all their ranks."""
        size, channels = self.group.config.tensor_parallel, ("steps", "reports")
        return [
            node
            for node in range(1, self._where.count)
            if any((rank, each) not in self._taken for rank in self._where.ranks(size, node) for each in channels)
        ]

    def broadcast(self, frame: AnyFrame) -> None:
        """Send a frame to all nodes."""
        for node in list(self._nodes.values()):
            node.send(frame)

    def wait_closed(self, seconds: float) -> None:
        """Wait until the nodes have closed, at most `seconds`."""
        deadline = time.monotonic() + seconds
        for node in self._nodes.values():
            if not node.gone.wait(max(0.0, deadline - time.monotonic())):
                log.warning("a node has not closed node=%d address=%s", node.number, node.address)

    # -- on threads of its own

    def _accept(self) -> None:
        greeting = ThreadPoolExecutor(GREETED_AT_ONCE, "kvasir-greeting")
        while True:
            try:
                sock, address = self._listening.accept()
            except OSError as error:
                if error.errno not in OVERRUN:
                    raise
                log.warning("cannot let anybody in reason=%r", str(error))
                time.sleep(OVERRUN_SECONDS)
                continue
            who = _plain(address[0])
            if self._may_be_greeted(who):
                greeting.submit(self._greet, sock, who)
            else:
                log.warning("refused address=%s reason='too many connections say nothing'", who)
                sock.close()

    def _may_be_greeted(self, address: str) -> bool:
        with self._counting:
            if self._greeted.total() >= MOST_GREETINGS or self._greeted[address] >= MOST_OF_ADDRESS:
                return False
            self._greeted[address] += 1
            return True

    def _greet(self, sock: socket.socket, address: str) -> None:
        try:
            self._hear(sock, address)
        finally:
            with self._counting:
                self._greeted[address] -= 1
                if not self._greeted[address]:
                    del self._greeted[address]

    def _hear(self, sock: socket.socket, address: str) -> None:
        late = threading.Timer(GREETING_SECONDS, _shut, (sock,))
        late.daemon = True
        late.start()
        try:
            node_protocol.watch(sock)
            sock.settimeout(node_protocol.HELLO_SECONDS)
            came = _Taken(self._authenticated(sock), _plain(sock.getsockname()[0]))
            hello = node_protocol.receive(came.stream)
            late.cancel()
            if not isinstance(hello, NodeHello):
                raise ValueError("it does not say who it is")
            reason = self._let_in(hello, came, address)
            if reason is not None:
                log.warning("refused %s address=%s reason=%r", node_protocol.named(hello), address, reason)
                node_protocol.send(came.stream, Refused(reason))
                sock.close()
        except (ssl.SSLError, Untrusted) as error:
            why = str(error) if isinstance(error, Untrusted) else f"no TLS with it: {why_failed(error)}"
            log.warning("refused address=%s reason=%r", address, why)
            sock.close()
        except Exception as error:  # of whoever came, not of those who are there
            log.warning("refused address=%s reason=%r", address, f"{type(error).__name__}: {error}")
            sock.close()
        finally:
            late.cancel()

    def _authenticated(self, sock: socket.socket) -> Stream:
        """The connection after the TLS handshake, in which the peer proves that it is a node of this worker's
        role."""
        if self._credentials is None:
            return sock
        stream = TlsStream(sock, self._credentials.server, server_side=True)
        self._credentials.peer(stream.tls, self._credentials.identity.role)
        return stream

    def _let_in(self, hello: NodeHello, came: "_Taken", address: str) -> str | None:
        """Welcome a fitting peer and keep its connection; refuse any other with the reason."""
        with self._changed:
            reason = node_protocol.refusal(hello, self.group, self._epoch, self._taken)
            if reason is None and hello.channel != "node" and hello.node not in self._nodes:
                reason = "its node has not joined"
            if reason is not None:
                return reason
            node_protocol.send(came.stream, Welcome(self._epoch))
            came.stream.settimeout(None)
            self._taken[hello.rank, hello.channel] = came
            if hello.channel == "node":
                node = self._nodes[hello.node] = JoinedNode(hello.node, came.stream, address)
                log.info("node joined node=%d address=%s", hello.node, address)
                start_thread(partial(self._read, node), f"kvasir-node-{node.number}", self._ended)
            self._changed.notify_all()
        return None

    def _read(self, node: JoinedNode) -> None:
        error: Exception | None = None
        ranks = self._where.ranks(self.group.config.tensor_parallel, node.number)
        try:
            while frame := node_protocol.receive(node.sock):
                match frame:
                    case RankEnded(rank, exit_reason) if rank in ranks:
                        node.rank_ended(rank, exit_reason)
                    case Leave():
                        log.info("a node has to leave node=%d address=%s", node.number, node.address)
                        self._leave()
                    case _:
                        raise node_protocol.unexpected(frame)
        except (OSError, ValueError) as lost:
            error = lost
        node.disconnected()
        count = self._where.count
        self._ended(f"node {node.number} of {count} at {node.address} {node_protocol.loss(error)}")
        raise ExpectedEnd


def _shut(sock: socket.socket) -> None:
    """Shut the connection down, which wakes its reader."""
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


def _listen(where: Nodes) -> socket.socket:
    """Listen on all addresses of the machine, or only on loopback if all nodes are there. Raises PortTaken."""
    port, dual = where.port, socket.has_dualstack_ipv6()
    try:
        if where.on_loopback:
            return socket.create_server((where.host, port), family=_family(where.host), backlog=BACKLOG)
        family = socket.AF_INET6 if dual else socket.AF_INET
        return socket.create_server(("", port), family=family, dualstack_ipv6=dual, backlog=BACKLOG)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise PortTaken(f"cannot listen for other nodes on port {port}: {reason}") from error


def _channel(stream: Stream) -> Channel:
    """The channel of a connection on which nothing was sent since its welcome."""
    return Connection(stream.detach()) if isinstance(stream, socket.socket) else StreamConnection(stream)


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _plain(address: str) -> str:
    """An address without the prefix of IPv4-mapped IPv6 addresses."""
    return address.removeprefix("::ffff:")

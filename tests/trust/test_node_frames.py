"""Frames between the nodes of a worker, made of the wire's types with values at their edges, and broken.

Who has not joined changes nothing for those who have. Who has, and speaks nonsense, ends the worker by a reason
that names it: no thread ends unseen, and nobody waits.
"""

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import SimpleQueue
from typing import Any, get_args

import msgspec
import pytest
from certificates import Authority
from frame_fuzzer import Grammar
from services import SECONDS

from kvasir_engine.config import EngineConfig
from kvasir_engine.connector import notifications
from kvasir_engine.connector.commands import AnyCommand
from kvasir_engine.entrypoints.follower_node import Follower, Leader
from kvasir_engine.errors import UserError
from kvasir_engine.executor import node_protocol, rank_protocol
from kvasir_engine.executor.node_listener import JoinedNode, NodeListener
from kvasir_engine.executor.node_protocol import (
    AnyFrame,
    Leave,
    NodeHello,
    NodeSettings,
    RankEnded,
    Welcome,
    WorkerLoaded,
)
from kvasir_engine.executor.rank_link import RankLink
from kvasir_engine.executor.rank_protocol import FromRank
from kvasir_engine.nodes import Nodes
from kvasir_engine.protocol import BadFrame, ToRouter, ToWorker, decode_to_router, decode_to_worker
from kvasir_engine.supervisor import ExpectedEnd
from kvasir_engine.tls import Credentials
from kvasir_engine.tls_stream import TlsStream

SEED = int(os.environ.get("KVASIR_FUZZ_SEED", "1"))
RANKS = (2, 3)
"""Of node 1 of 2, in a worker of four."""
NESTED = b"\x83\xa1t\xa5hello\xa1y" + b"\x91" * 20_000 + b"\xc0"
BROKEN = [b"", b"\xc1", b"\x80", b"\xff" * 64, NESTED, b"\x81\xa1t\xa7welcome", b"\x82\xa1t\xa5leave\xa1x" + NESTED]
GRAMMAR_KINDS: list[Any] = [*[NodeHello] * 8, *get_args(AnyFrame)]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def settings() -> NodeSettings:
    config = EngineConfig("file:///m", "decode", tensor_parallel=4, nnodes=2, dist_init_addr="127.0.0.1:1")
    return NodeSettings(config, "weights")


def framed(data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + data


class Group:
    """A leader, and node 1, which has joined with all its ranks."""

    def __init__(self, credentials: tuple[Credentials, Credentials] | None = None) -> None:
        self.address = "127.0.0.1", free_port()
        self.group = settings()
        self.ends = SimpleQueue[str]()
        ours, theirs = credentials or (None, None)
        self.theirs = theirs
        self.listener = NodeListener(Nodes(2, 0, *self.address), lambda: None, ours)
        self.listener.group = self.group
        self.listener.open(self.ends.put)
        self.leader = Leader(Nodes(2, 1, *self.address), self.group, theirs)
        self.node = self.leader.join()
        self.ranks = [
            self.leader.connect(rank, channel, SECONDS) for rank in RANKS for channel in ("steps", "reports")
        ]

    def grammar(self, seed: int) -> Grammar:
        """Hellos that nearly fit, and all else."""
        known = {
            "version": [node_protocol.VERSION] * 8 + [2, 9],
            "group": [msgspec.msgpack.decode(msgspec.msgpack.encode(self.group))],
            "node": [1, 1, 1, 1, 0, 2],
            "rank": [*RANKS, *RANKS, 0, 1, 4],
            "channel": ["node", "node", "steps", "reports"],
            "epoch": [self.leader.epoch, self.leader.epoch, 0, 1],
        }
        return Grammar(seed, known)

    def say(self, data: bytes) -> bytes:
        """What is answered to these bytes on a new connection."""
        answer = b""
        # It may be closed before all is read.
        with socket.create_connection(self.address, SECONDS) as sock, contextlib.suppress(OSError):
            stream = sock if self.theirs is None else TlsStream(sock, self.theirs.client, server_side=False)
            sock.settimeout(SECONDS)
            stream.sendall(data)
            if self.theirs is None:
                sock.shutdown(socket.SHUT_WR)
            while some := stream.recv(4096):
                answer += some
        return answer

    def check(self) -> None:
        """Node 1 is there, and hears the leader; nobody has been told that anything ended."""
        assert self.ends.empty()
        self.listener.broadcast(WorkerLoaded())
        assert node_protocol.receive(self.node) == WorkerLoaded()
        assert self.ends.empty()


def test_no_frame_of_who_has_not_joined_changes_anything_for_who_has() -> None:
    group = Group()
    grammar = group.grammar(SEED)
    for data in BROKEN:
        assert b"welcome" not in group.say(framed(data))
    for number in range(300):
        assert b"welcome" not in group.say(framed(grammar.frame(GRAMMAR_KINDS)))
        if number % 50 == 0:
            group.check()
    group.check()


def test_with_a_certificate_of_the_role_neither(tmp_path: Path) -> None:
    ca = Authority()
    one, other = (Credentials(ca.folder(tmp_path / name, "decode")) for name in ("leader", "node"))
    group = Group((one, other))
    grammar = group.grammar(SEED + 1)
    for _ in range(20):
        # A frame that is whole: the connection stays open for what is not, until its time is over.
        assert b"welcome" not in group.say(framed(grammar.frame(GRAMMAR_KINDS)) + b"\0\0\0\1\xc1")
    group.check()


def test_a_node_that_joined_is_not_replaced_by_another_of_its_ranks() -> None:
    group = Group()
    hello = NodeHello(node_protocol.VERSION, group.group, 1, RANKS[1], "node", 0)
    answer = group.say(framed(msgspec.msgpack.encode(hello)))
    assert b"its own connection is that of its first rank, 2" in answer
    group.check()


def heard(listener: NodeListener, ends: "SimpleQueue[str]", data: bytes) -> tuple[JoinedNode, str]:
    """What the leader says of a node that sends these bytes and goes."""
    ours, theirs = socket.socketpair()
    node = JoinedNode(1, ours, "10.0.0.2")
    with ours, theirs:
        sending = threading.Thread(target=_send, args=(theirs, data), daemon=True)
        sending.start()
        with pytest.raises(ExpectedEnd):
            listener._read(node)
        ours.shutdown(socket.SHUT_RDWR)
        sending.join(SECONDS)
    assert node.gone.is_set()
    said = ends.get(timeout=SECONDS)
    assert ends.empty(), "one reason"
    return node, said


def _send(sock: socket.socket, data: bytes) -> None:
    with contextlib.suppress(OSError):
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)


@pytest.fixture
def listening() -> Iterator[tuple[NodeListener, "SimpleQueue[str]"]]:
    ends = SimpleQueue[str]()
    listener = NodeListener(Nodes(2, 0, "127.0.0.1", free_port()), lambda: None)
    listener.group, listener._ended = settings(), ends.put
    yield listener, ends
    listener._listening.close()


def test_a_node_that_speaks_nonsense_ends_the_worker_by_its_name(
    listening: tuple[NodeListener, "SimpleQueue[str]"],
) -> None:
    listener, ends = listening
    grammar = Grammar(SEED + 2, {"rank": [2, 3, 3, 7, -1]})
    for number in range(600):
        frames = [grammar.frame([RankEnded, RankEnded, Leave, *get_args(AnyFrame)]) for _ in range(number % 4 + 1)]
        node, said = heard(listener, ends, b"".join(map(framed, frames)))
        assert said.startswith("node 1 of 2 at 10.0.0.2 is ")
        assert said.endswith("is gone") or "is refused: it sends" in said
        assert set(node._exit_reasons) <= set(RANKS)
    for data in BROKEN:
        assert "is refused: it sends a frame that cannot be read" in heard(listener, ends, framed(data))[1]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "is gone"),
        (b"\0\0", "is gone"),
        (framed(b"12345")[:-1], "is gone"),
        (b"\0\1\0\1", "is refused: it sends what is no frame"),
        (b"\xff\xff\xff\xff", "is refused: it sends what is no frame"),
        (
            framed(msgspec.msgpack.encode(Welcome(1))),
            "is refused: it sends a frame that is not its to send: Welcome",
        ),
        (
            framed(msgspec.msgpack.encode(RankEnded(1, "of the leader's own"))),
            "is refused: it sends a frame that is not its to send: RankEnded",
        ),
    ],
)
def test_how_a_node_ended_is_said_as_it_was(
    listening: tuple[NodeListener, "SimpleQueue[str]"], data: bytes, said: str
) -> None:
    assert heard(*listening, data)[1] == f"node 1 of 2 at 10.0.0.2 {said}"


class Reports:
    """The messages of a rank, then its end."""

    def __init__(self, messages: list[bytes]) -> None:
        self._messages = iter(messages)

    def send_bytes(self, buf: bytes, /) -> None:
        raise AssertionError("nothing is said to it")

    def recv_bytes(self) -> bytes:
        for each in self._messages:
            return each
        raise EOFError


def reported(messages: list[bytes]) -> str:
    """How the rank is said to have ended that reports so."""
    ends = SimpleQueue[str]()
    nothing = Reports([])
    RankLink(3, nothing, Reports(messages), lambda: "has ended", lambda _, why: ends.put(why), lambda *_: None)
    why = ends.get(timeout=SECONDS)
    assert ends.empty(), "one reason"
    return why


def test_a_rank_that_reports_nonsense_is_named() -> None:
    grammar = Grammar(SEED + 3, {"reason": ["no memory"]})
    said = set()
    for number in range(300):
        why = reported([grammar.frame(get_args(FromRank)) for _ in range(number % 3 + 1)])
        said.add(why.partition(":")[0])
        assert "kvasir-rank" not in why, "its thread has not failed, it has said what is wrong"
    assert {"says what cannot be read", "has ended", "no memory"} <= said
    for data in BROKEN:
        assert reported([data]).startswith("says what cannot be read: ")


def test_what_a_leader_answers_is_a_welcome_or_one_line() -> None:
    grammar = Grammar(SEED + 4, {"reason": ["no"]})
    server = socket.create_server(("127.0.0.1", 0))
    where = Nodes(2, 1, *server.getsockname()[:2])
    answers = [*BROKEN, *(grammar.frame(get_args(AnyFrame)) for _ in range(120)), None]

    def answer() -> None:
        for data in answers:
            with server.accept()[0] as sock:
                node_protocol.receive(sock)
                if data is not None:
                    _send(sock, framed(data))

    answering = threading.Thread(target=answer, daemon=True)
    answering.start()
    seen = set()
    for _ in answers:
        try:
            Leader(where, settings()).connect(2, "node", SECONDS).close()
            seen.add("welcome")
        except UserError as error:
            seen.add("refused" if "refuses node 1" in str(error) else "no leader")
        except ConnectionError:
            seen.add("gone")
    answering.join(SECONDS)
    server.close()
    assert seen == {"welcome", "refused", "no leader", "gone"}


class Exited(Exception):
    """Instead of the process's end."""


def test_a_leader_that_speaks_nonsense_ends_its_nodes_with_one_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def leave(status: int) -> None:
        raise Exited(status)

    monkeypatch.setattr("kvasir_engine.entrypoints.follower_node.os._exit", leave)
    monkeypatch.setattr(NodeSettings, "of", classmethod(lambda cls, config, folder: settings()))
    grammar = Grammar(SEED + 5, {"reason": ["a rank has ended"]})
    said: list[str] = []
    for data in [*BROKEN, *(grammar.frame(get_args(AnyFrame)) for _ in range(200))]:
        follower = Follower(settings().config, Nodes(2, 1, "127.0.0.1", 1), Path("/m"))
        ours, theirs = socket.socketpair()
        follower._node = ours
        with ours, theirs:
            _send(theirs, framed(data))
            with pytest.raises((Exited, ExpectedEnd)) as ended:
                follower._read()
        lines = capfd.readouterr().err.splitlines()
        assert len(lines) == (1 if ended.type is Exited else 0)
        said += lines
    assert any("is refused: it sends a frame that cannot be read" in line for line in said)
    assert any("is refused: it sends a frame that is not its to send" in line for line in said)
    assert any("a rank has ended" in line for line in said)


@pytest.mark.parametrize(
    ("decode", "kinds"),
    [
        (rank_protocol.decode_to_main, get_args(rank_protocol.ToMain)),
        (rank_protocol.decode_command, get_args(AnyCommand)),
        (rank_protocol.decode_from_rank, get_args(FromRank)),
        (decode_to_worker, get_args(ToWorker)),
        (decode_to_router, get_args(ToRouter)),
        (notifications.decode, get_args(notifications.AnyMessage)),
    ],
)
def test_every_frame_is_read_or_refused(decode: Callable[[bytes], object], kinds: tuple[type, ...]) -> None:
    for data in BROKEN:
        with pytest.raises(BadFrame):
            decode(data)
    grammar, read = Grammar(SEED + 6, {}), 0
    for _ in range(2000):
        with contextlib.suppress(BadFrame):
            decode(grammar.frame(kinds))
            read += 1
    assert read > 200

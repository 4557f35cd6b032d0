"""Nodes of one worker over TLS: who shows no certificate of its role is told nothing, and messages go both ways."""

import contextlib
import logging
import socket
import threading
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue

import pytest
from certificates import Authority
from services import SECONDS

from kvasir_engine.config import EngineConfig
from kvasir_engine.entrypoints.follower_node import Leader
from kvasir_engine.errors import UserError
from kvasir_engine.executor import node_protocol
from kvasir_engine.executor.node_listener import JoinedRank, NodeListener
from kvasir_engine.executor.node_protocol import NodeSettings
from kvasir_engine.nodes import Nodes
from kvasir_engine.supervisor import start_thread
from kvasir_engine.tls import Credentials
from kvasir_engine.tls_stream import StreamConnection, TlsStream, relay

LARGE = bytes(range(256)) * 4096


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


class Group:
    """A decode worker on two nodes: a listener, and what the other node needs."""

    def __init__(self, folder: Path, tls: bool = True) -> None:
        self.ca = Authority()
        self.folder = folder
        address = "127.0.0.1", free_port()
        self.where = [Nodes(2, node, *address) for node in range(2)]
        config = EngineConfig("file:///m", "decode", tensor_parallel=2, nnodes=2, dist_init_addr="127.0.0.1:1")
        self.group = NodeSettings(config, "weights")
        self.ends = SimpleQueue[str]()
        own = Credentials(self.ca.folder(folder / "leader", "decode")) if tls else None
        self.listener = NodeListener(self.where[0], lambda: None, own)
        self.listener.group = self.group
        self.listener.open(self.ends.put)

    def leader(self, credentials: Credentials | None) -> Leader:
        return Leader(self.where[1], self.group, credentials)


@pytest.fixture
def group(tmp_path: Path) -> Group:
    return Group(tmp_path)


def test_messages_of_a_rank_go_both_ways_through_tls(group: Group) -> None:
    joined: list[JoinedRank] = []
    waiting = threading.Thread(target=lambda: joined.extend(group.listener.wait()))
    waiting.start()
    leader = group.leader(Credentials(group.ca.folder(group.folder / "node", "decode")))
    node = leader.join()
    assert isinstance(node, TlsStream)
    ranks: list[Connection] = []
    for channel in ("steps", "reports"):
        stream = leader.connect(1, channel, SECONDS)  # type: ignore[arg-type]
        assert isinstance(stream, TlsStream)
        there = relay(stream, lambda work, name: start_thread(work, name, group.ends.put), channel)
        ranks.append(Connection(there.detach()))
    waiting.join(SECONDS)
    (rank,) = joined
    steps, reports = ranks
    hears = threading.Thread(target=lambda: [reports.send_bytes(reports.recv_bytes()) for _ in range(20)])
    hears.start()
    for size in (0, 1, 70_000, len(LARGE)) * 5:  # it answers while it is told more: one stream, two threads
        rank.steps.send_bytes(LARGE[:size])
        rank.reports.send_bytes(LARGE[:size])
        assert steps.recv_bytes() == LARGE[:size]
        assert rank.reports.recv_bytes() == LARGE[:size]
    hears.join(SECONDS)
    steps.close()
    with pytest.raises(EOFError):
        rank.steps.recv_bytes()
    group.listener.broadcast(node_protocol.Closed())
    assert node_protocol.receive(node) == node_protocol.Closed()
    node.close()
    assert "node 1 of 2" in group.ends.get(timeout=SECONDS)


@pytest.mark.parametrize(
    ("who", "why"),
    [
        ("stranger", "certificate verify failed"),
        ("service", "it is of the InferenceService models/other, this is models/chat"),
        ("role", "its role is prefill, only decode may connect here"),
    ],
)
def test_a_node_and_a_leader_that_are_not_of_one_role_refuse_each_other_by_name(
    group: Group, who: str, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    ca = Authority("stranger") if who == "stranger" else group.ca
    role, service = "prefill" if who == "role" else "decode", "other" if who == "service" else "chat"
    node = group.leader(Credentials(ca.folder(group.folder / who, role, service)))
    with pytest.raises(UserError, match="no TLS with the leader"):
        node.join()
    refused(caplog, "" if who == "stranger" else why)


def refused(caplog: pytest.LogCaptureFixture, why: str) -> None:
    """Wait until the listener has said why it refused somebody."""
    ended = threading.Event()
    for _ in range(6000):
        if any("refused" in each.getMessage() and why in each.getMessage() for each in caplog.records):
            return
        ended.wait(0.01)
    raise AssertionError([each.getMessage() for each in caplog.records])


def test_who_shows_no_certificate_is_told_nothing(group: Group, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    plain = socket.create_connection((group.where[0].host, group.where[0].port), SECONDS)
    with plain:
        node_protocol.send(plain, node_protocol.NodeHello(node_protocol.VERSION, group.group, 1, 1, "node", 0))
        answer = b""
        try:
            while some := plain.recv(4096):
                answer += some
        except ConnectionError:
            pass
    assert b"welcome" not in answer
    assert b"refused" not in answer, "not even why: it may be anybody"
    refused(caplog, "no TLS with it")
    with pytest.raises((UserError, OSError)):
        group.leader(None).connect(1, "node", SECONDS)


def silent(group: Group, count: int, address: str) -> list[socket.socket]:
    """Connections that say nothing, from an address."""
    to = group.where[0].host, group.where[0].port
    return [socket.create_connection(to, SECONDS, source_address=(address, 0)) for _ in range(count)]


def test_who_says_nothing_on_many_connections_keeps_no_node_out(
    group: Group, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("tls_stream.HANDSHAKE_SECONDS", "executor.node_listener.GREETING_SECONDS"):
        monkeypatch.setattr(f"kvasir_engine.{name}", 3600.0)
    monkeypatch.setattr("kvasir_engine.executor.node_protocol.HELLO_SECONDS", 3600.0)
    many = silent(group, 60, "127.0.0.9")
    try:
        refused(caplog, "too many connections say nothing")
        group.leader(Credentials(group.ca.folder(group.folder / "node", "decode"))).join().close()
        assert "node 1 of 2" in group.ends.get(timeout=SECONDS)
    finally:
        for each in many:
            each.close()


@pytest.mark.parametrize("tls", [True, False])
def test_a_hello_that_trickles_is_cut_off(tls: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvasir_engine.executor.node_listener.GREETING_SECONDS", 0.5)
    group = Group(tmp_path, tls)
    (slow,) = silent(group, 1, "127.0.0.9")
    # What never ends: a TLS record of 16 KiB, or a frame of 64.
    head = b"\x16\x03\x01\x40\x00" if tls else (64 << 10).to_bytes(4, "big")
    with slow, pytest.raises(OSError, match=r"reset|pipe"):  # noqa: PT012
        slow.sendall(head)
        for _ in range(30_000):
            slow.sendall(b"x")
            threading.Event().wait(0.01)


def test_a_handshake_has_one_deadline_for_all_its_bytes(tmp_path: Path) -> None:
    credentials = Credentials(Authority().folder(tmp_path / "decode", "decode"))
    ours, theirs = socket.socketpair()
    stop = threading.Event()

    def trickle() -> None:
        with contextlib.suppress(OSError):
            theirs.sendall(b"\x16\x03\x01\x40\x00")
            while not stop.wait(0.01):
                theirs.sendall(b"x")

    trickling = threading.Thread(target=trickle)
    trickling.start()
    try:
        with pytest.raises(TimeoutError):
            TlsStream(ours, credentials.server, server_side=True, seconds=0.5)
    finally:
        stop.set()
        trickling.join()
        ours.close()
        theirs.close()


def test_both_ends_may_send_more_than_the_network_holds_at_the_same_time(tmp_path: Path) -> None:
    ca = Authority()
    one, other = (Credentials(ca.folder(tmp_path / role, role)) for role in ("prefill", "decode"))
    socks = socket.socketpair()
    made: list[TlsStream] = []
    answers = threading.Thread(target=lambda: made.append(TlsStream(socks[1], other.server, server_side=True)))
    answers.start()
    streams = [TlsStream(socks[0], one.client, server_side=False)]
    answers.join(SECONDS)
    streams += made
    large, got = bytes(32 << 20), SimpleQueue[bool]()

    def receive(stream: TlsStream) -> None:
        got.put(StreamConnection(stream).recv_bytes() == large)

    work = [threading.Thread(target=receive, args=(each,), daemon=True) for each in streams]
    work += [
        threading.Thread(target=StreamConnection(each).send_bytes, args=(large,), daemon=True) for each in streams
    ]
    for each in streams:
        each.settimeout(None)
    for thread in work:
        thread.start()
    assert [got.get(timeout=60) for _ in streams] == [True, True]
    for thread in work:
        thread.join(SECONDS)
    for sock in socks:
        sock.close()

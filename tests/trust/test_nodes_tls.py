"""Nodes of one worker over TLS: who shows no certificate of its role is told nothing, and messages go both ways."""

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
from kvasir_engine.tls_stream import TlsStream, relay

LARGE = bytes(range(256)) * 4096


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


class Group:
    """A decode worker on two nodes: a listener, and what the other node needs."""

    def __init__(self, folder: Path) -> None:
        self.ca = Authority()
        self.folder = folder
        address = "127.0.0.1", free_port()
        self.where = [Nodes(2, node, *address) for node in range(2)]
        config = EngineConfig("file:///m", "decode", tensor_parallel=2, nnodes=2, dist_init_addr="127.0.0.1:1")
        self.group = NodeSettings(config, "weights")
        self.ends = SimpleQueue[str]()
        own = Credentials(self.ca.folder(folder / "leader", "decode"))
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
    group.listener.tell(node_protocol.Closed())
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
        node_protocol.send(plain, node_protocol.Hello(node_protocol.VERSION, group.group, 1, 1, "node", 0))
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

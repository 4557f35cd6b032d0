"""Who is let in to a worker on several nodes, who is refused, and what each side says of the other's end."""

import contextlib
import os
import signal
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from queue import SimpleQueue

import msgspec
import pytest
from node_workers import Follower, free_port
from rank_workers import SECONDS, children, engine_options

from kvasir_engine.entrypoints.follower_node import Leader
from kvasir_engine.errors import UserError
from kvasir_engine.executor import node_protocol
from kvasir_engine.executor.node_listener import JoinedRank, NodeListener
from kvasir_engine.executor.node_protocol import (
    Closed,
    Ended,
    Leave,
    NodeHello,
    Nodes,
    NodeSettings,
    RankEnded,
    Refused,
    Welcome,
    WorkerLoaded,
)

SIZE, COUNT = 4, 2
RANKS = range(2, 4)
"""Those of node 1."""


class Open:
    """A leader's listener in this process, and what it heard."""

    def __init__(self, folder: Path, size: int = SIZE) -> None:
        self.where = Nodes(COUNT, 0, "127.0.0.1", free_port())
        self.left, self.ends = threading.Event(), SimpleQueue[str]()
        self.listener = NodeListener(self.where, self.left.set)
        self.listener.group = self.group = NodeSettings.of(engine_options(folder, size, 16, self.where), folder)
        self.listener.open(self.ends.put)
        self.members: list[Member] = []

    def say(self, hello: NodeHello) -> tuple[socket.socket, node_protocol.AnyFrame | None]:
        sock = socket.create_connection((self.where.host, self.where.port), SECONDS)
        node_protocol.send(sock, hello)
        return sock, node_protocol.receive(sock)

    def hello(self, rank: int = 2, channel: node_protocol.Channel = "node", epoch: int = 0) -> NodeHello:
        return NodeHello(node_protocol.VERSION, self.group, 1, rank, channel, epoch)

    def join(self) -> "Member":
        """Node 1, which says hello as it should."""
        node, welcome = self.say(self.hello())
        assert isinstance(welcome, Welcome)
        self.members.append(Member(node, welcome.epoch))
        return self.members[-1]


class Member:
    def __init__(self, node: socket.socket, epoch: int) -> None:
        self.node, self.epoch = node, epoch
        self.socks = [node]

    def bring(self, listener: Open, rank: int, channel: node_protocol.Channel) -> None:
        sock, welcome = listener.say(listener.hello(rank, channel, self.epoch))
        assert welcome == Welcome(self.epoch)
        self.socks.append(sock)


@pytest.fixture
def listener(folder: Path) -> Open:
    return Open(folder)


def waited(listener: Open) -> tuple[threading.Thread, list[JoinedRank]]:
    joined: list[JoinedRank] = []
    thread = threading.Thread(target=lambda: joined.extend(listener.listener.wait()))
    thread.start()
    return thread, joined


def test_the_leader_waits_for_every_rank_of_every_node(listener: Open) -> None:
    thread, joined = waited(listener)
    member = listener.join()
    for rank in RANKS:
        for channel in ("steps", "reports"):
            assert thread.is_alive()
            member.bring(listener, rank, channel)  # type: ignore[arg-type]
    thread.join(SECONDS)
    assert [each.rank for each in joined] == list(RANKS)
    joined[1].steps.send_bytes(b"a step")
    frame = member.socks[3].recv(100)  # the node's own, then steps and reports of each rank
    assert frame == struct.pack("!i", 6) + b"a step"


REFUSALS: dict[str, tuple[Callable[[NodeHello], NodeHello], str]] = {
    "version": (
        lambda hello: msgspec.structs.replace(hello, version=9),
        "it speaks version 9 of the protocol between nodes, and the leader 3",
    ),
    "weights": (
        lambda hello: changed(hello, weights="another"),
        "the two are not one worker's: weights is '{weights}' at the leader and 'another' at the node",
    ),
    "flag": (
        lambda hello: with_settings(hello, page_size=32),
        "the two are not one worker's: page_size is 16 at the leader and 32 at the node",
    ),
    "leader": (lambda hello: msgspec.structs.replace(hello, node=0, rank=0), "nodes 1 to 1 may join"),
    "node": (lambda hello: msgspec.structs.replace(hello, node=2), "nodes 1 to 1 may join"),
    "rank": (lambda hello: msgspec.structs.replace(hello, rank=1), "its ranks are 2 to 3"),
    "stranger": (
        lambda hello: msgspec.structs.replace(hello, channel="steps", epoch=5),
        "its epoch 0000000000000005 is not the leader's",
    ),
}


def with_settings(hello: NodeHello, **settings: object) -> NodeHello:
    return changed(hello, config=msgspec.structs.replace(hello.group.config, **settings))


def changed(hello: NodeHello, **fields: object) -> NodeHello:
    return msgspec.structs.replace(hello, group=msgspec.structs.replace(hello.group, **fields))


@pytest.mark.parametrize("what", REFUSALS)
def test_who_does_not_belong_here_is_refused_by_name(
    listener: Open, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    change, reason = REFUSALS[what]
    _, answer = listener.say(change(listener.hello()))
    assert isinstance(answer, Refused)
    assert answer.reason.startswith(reason.format(weights=listener.group.weights))
    assert reason.format(weights=listener.group.weights) in caplog.messages[-1].replace('"', "'")
    listener.join()
    assert listener.ends.empty()


def test_who_comes_twice_is_refused_and_the_first_stays(listener: Open) -> None:
    member = listener.join()
    member.bring(listener, 2, "steps")
    for hello in (listener.hello(), listener.hello(2, "steps", member.epoch)):
        assert listener.say(hello)[1] == Refused("it has joined already")
    assert listener.say(listener.hello(3, "steps", member.epoch + 1))[1] != Welcome(member.epoch)
    member.bring(listener, 3, "reports")
    assert listener.ends.empty()


GARBAGE = [b"", b"\0", b"GET /metrics HTTP/1.1\r\n\r\n", b"\0\0\0\5hello", b"\0\0\0\1\xc0", b"\xff" * 4096]


def test_garbage_is_refused_and_harms_nobody(listener: Open, caplog: pytest.LogCaptureFixture) -> None:
    for data in GARBAGE:
        sock = socket.create_connection((listener.where.host, listener.where.port), SECONDS)
        with sock, contextlib.suppress(OSError):  # it closes, some of it may be unread
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(100):
                pass
    member = listener.join()
    for rank in RANKS:
        member.bring(listener, rank, "steps")
    assert listener.ends.empty()
    assert sum("refused" in message for message in caplog.messages) == len(GARBAGE)


def test_the_leader_hears_how_a_rank_ended_and_that_a_node_has_gone(listener: Open) -> None:
    thread, joined = waited(listener)
    member = listener.join()
    for rank in RANKS:
        member.bring(listener, rank, "steps")
        member.bring(listener, rank, "reports")
    thread.join(SECONDS)
    node_protocol.send(member.node, RankEnded(3, "was killed by signal 9"))
    assert joined[1].node.exit_reason(3) == "was killed by signal 9"
    assert joined[0].node.exit_reason(2) == "ended", "its node lives, and has not said more"
    node_protocol.send(member.node, Leave())
    assert listener.left.wait(SECONDS)
    member.node.close()
    assert listener.ends.get(timeout=SECONDS) == "node 1 of 2 at 127.0.0.1 is gone"
    assert joined[0].node.exit_reason(2) is None, "the node's end is the reason, and told already"
    assert joined[1].node.exit_reason(3) == "was killed by signal 9"


# -- the other side


@pytest.fixture
def followers() -> Iterator[list[Follower]]:
    followers: list[Follower] = []
    yield followers
    for each in followers:
        each.process.kill()
        each.process.join()


def followed(folder: Path, followers: list[Follower]) -> tuple[Open, Follower, JoinedRank]:
    """A follower whose ranks the test leads, and never asks for anything."""
    listener = Open(folder, size=2)
    follower = Follower(folder, "both", Nodes(COUNT, 1, "127.0.0.1", listener.where.port))
    followers.append(follower)
    (joined,) = listener.listener.wait()
    return listener, follower, joined


@pytest.mark.dataplane
def test_a_node_ends_with_its_leader(folder: Path, followers: list[Follower]) -> None:
    listener, follower, joined = followed(folder, followers)
    listener.listener.broadcast(WorkerLoaded())
    while follower.status("/ready") != 200:
        assert follower.process.is_alive()
    joined.node.sock.shutdown(socket.SHUT_RDWR)
    assert follower.errors() == [f"the leader at 127.0.0.1:{listener.where.port} is gone; the worker ends with it"]
    assert follower.process.exitcode == 1


@pytest.mark.dataplane
def test_a_node_says_what_the_leader_says_and_mending_it_is_the_users_while_it_loads(
    folder: Path, followers: list[Follower]
) -> None:
    listener, follower, _ = followed(folder, followers)
    listener.listener.broadcast(Ended("node 0 cannot start: no memory"))
    assert follower.errors() == ["node 0 cannot start: no memory"]
    assert follower.process.exitcode == 2


@pytest.mark.dataplane
def test_a_rank_that_is_killed_is_told_to_the_leader(folder: Path, followers: list[Follower]) -> None:
    listener, follower, joined = followed(folder, followers)
    while not (pids := children(follower.process.pid)):
        assert follower.process.is_alive()
    os.kill(pids[0], signal.SIGKILL)
    with pytest.raises(EOFError):
        joined.reports.recv_bytes()
    assert joined.node.exit_reason(1) == "was killed by signal 9"
    listener.listener.broadcast(Ended("rank 1 of 2 was killed by signal 9; the worker ends with it"))
    assert follower.errors() == ["rank 1 of 2 was killed by signal 9; the worker ends with it"]


@pytest.mark.dataplane
def test_a_node_that_the_leader_closes_ends_well(folder: Path, followers: list[Follower]) -> None:
    listener, follower, joined = followed(folder, followers)
    listener.listener.broadcast(WorkerLoaded())
    listener.listener.broadcast(Closed())
    joined.steps.close()
    listener.listener.wait_closed(SECONDS)
    assert follower.errors() == []
    assert follower.process.exitcode == 0


def test_a_node_with_another_model_says_so_in_one_line(folder: Path, listener: Open) -> None:
    where = Nodes(COUNT, 1, listener.where.host, listener.where.port)
    other = msgspec.structs.replace(listener.group, weights="another")
    with pytest.raises(
        UserError, match=r"refuses node 1: the two are .*: weights is '.*' at the leader and 'another'"
    ):
        Leader(where, other).join()


def test_a_node_tries_until_its_leader_is_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listener = Open(folder)
    where = Nodes(COUNT, 1, listener.where.host, free_port())
    tried = threading.Event()
    monkeypatch.setattr("kvasir_engine.entrypoints.follower_node.RETRY_SECONDS", 0.01)
    monkeypatch.setattr("kvasir_engine.entrypoints.follower_node.SAY_SECONDS", 0.0)
    monkeypatch.setattr("kvasir_engine.entrypoints.follower_node.log.info", lambda *_: tried.set())
    leader = Leader(where, listener.group)
    found: SimpleQueue[socket.socket] = SimpleQueue()
    threading.Thread(target=lambda: found.put(leader.join()), daemon=True).start()
    assert tried.wait(SECONDS)
    late = NodeListener(where, lambda: None)
    late.group = listener.group
    late.open(lambda _: None)
    assert found.get(timeout=SECONDS).getpeername()[1] == where.port

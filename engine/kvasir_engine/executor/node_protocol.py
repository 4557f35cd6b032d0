"""What the nodes of one worker tell each other: who they are, and how they end. Msgpack over TCP, after a length.

The leader, node 0, listens. Each other node makes a connection of its own first, and then two for each of its
ranks, which carry the frames of `rank_protocol.py` once the leader has welcomed the hello on them. It refuses by
name a hello that does not fit. The node's own connection lives as long as the node. With certificates all of them
are TLS, and only who has one of the same InferenceService and role may say hello.
"""

import errno
import socket
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import msgspec

from kvasir_engine import keepalive
from kvasir_engine.config import EngineConfig
from kvasir_engine.errors import UserError
from kvasir_engine.nodes import Nodes
from kvasir_engine.protocol import UNREADABLE
from kvasir_engine.tls_stream import Stream

VERSION = 3
HELLO_SECONDS = 10.0
"""In which a connection must have said who it is."""
LONGEST = 64 << 10
"""Bytes of a frame between nodes."""
Channel = Literal["node", "steps", "reports"]


class NodeSettings(msgspec.Struct, frozen=True):
    """What a node was told, and the digest of the model that it has."""

    config: EngineConfig
    weights: str

    @classmethod
    def of(cls, config: EngineConfig, folder: Path) -> "NodeSettings":
        """Those of a node that was told `config` and has the model in `folder`. Raises ModelError."""
        from kvasir_engine.model.loading.safetensors_files import weights_digest

        return cls(config, weights_digest(folder))

    def mismatch(self, other: "NodeSettings") -> str | None:
        """The first setting by which a node's are not these, the leader's, or None; as one clause."""
        if self.weights != other.weights:
            return f"weights is {self.weights!r} at the leader and {other.weights!r} at the node"
        return self.config.mismatch(other.config)


class NodeFrame(msgspec.Struct, frozen=True, tag_field="t", tag=str.lower):
    """Base of what travels between nodes."""


class NodeHello(NodeFrame, frozen=True, tag="hello"):
    """First on each connection. `epoch` is the leader's, as its welcome to the node said; 0 on the node's own.

    `rank` is that of the connection, on the node's own its first.
    """

    version: int
    group: NodeSettings
    node: int
    rank: int
    channel: Channel
    epoch: int


class Welcome(NodeFrame, frozen=True):
    """The leader's answer. `epoch` is new at each of its starts."""

    epoch: int


class Refused(NodeFrame, frozen=True):
    """The leader's answer to who does not belong here."""

    reason: str


class WorkerLoaded(NodeFrame, frozen=True, tag="loaded"):
    """Leader to nodes: every rank has its part of the model."""


class Ended(NodeFrame, frozen=True):
    """Leader to nodes: the worker ends, for this reason."""

    reason: str


class Closed(NodeFrame, frozen=True):
    """Leader to nodes: the worker has done all it had, and closes."""


class RankEnded(NodeFrame, frozen=True):
    """Node to leader: the process of a rank has ended so."""

    rank: int
    fate: str


class Leave(NodeFrame, frozen=True):
    """Node to leader: this node has to go. The worker may finish what it has first."""


AnyFrame = NodeHello | Welcome | Refused | WorkerLoaded | Ended | Closed | RankEnded | Leave

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[AnyFrame] = msgspec.msgpack.Decoder(AnyFrame)


def refusal(hello: NodeHello, group: NodeSettings, epoch: int, taken: Iterable[tuple[int, Channel]]) -> str | None:
    """Why a leader of `group` does not let a connection in; None when it does. `taken`: ranks that have theirs."""
    if hello.version != VERSION:
        return f"it speaks version {hello.version} of the protocol between nodes, and the leader {VERSION}"
    mismatch = group.mismatch(hello.group)
    if mismatch is not None:
        return f"the two are not one worker's: {mismatch}"
    count = group.config.nnodes
    if not 0 < hello.node < count:
        return f"nodes 1 to {count - 1} may join"
    ranks = Nodes(count, hello.node, "", 0).ranks(group.config.tensor_parallel)
    if hello.rank not in ranks:
        return f"its ranks are {ranks.start} to {ranks.stop - 1}"
    if hello.channel == "node" and hello.rank != ranks.start:
        return f"its own connection is that of its first rank, {ranks.start}"
    if hello.channel != "node" and hello.epoch != epoch:
        return f"its epoch {hello.epoch:016x} is not the leader's {epoch:016x}: it is left from another start"
    if (hello.rank, hello.channel) in taken:
        return "it has joined already"
    return None


def named(hello: NodeHello) -> str:
    """Who a connection says that it is."""
    return f"node {hello.node}" + ("" if hello.channel == "node" else f", rank {hello.rank}, {hello.channel}")


def watch(sock: socket.socket) -> None:
    """Notice when the machine at the other end is gone, and send what is small at once."""
    keepalive.notice_silence(sock)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def send(sock: Stream, frame: AnyFrame) -> None:
    """Send a frame. Raises OSError."""
    data = _encoder.encode(frame)
    sock.sendall(struct.pack(">I", len(data)) + data)


def receive(sock: Stream) -> AnyFrame | None:
    """The next frame; None at the connection's end. Raises OSError, or ValueError for what is no frame."""
    head = _exactly(sock, 4)
    if not head:
        return None
    (length,) = struct.unpack(">I", head)
    if length > LONGEST:
        raise ValueError("it sends what is no frame")
    data = _exactly(sock, length)
    if len(data) < length:
        return None
    try:
        return _decoder.decode(data)
    except (*UNREADABLE, UserError) as error:  # a setting out of its range is the user's error elsewhere
        raise ValueError(f"it sends a frame that cannot be read: {error}") from None


def _exactly(sock: Stream, count: int) -> bytes:
    """So many bytes, or none when the connection has ended before the last."""
    data = b""
    while len(data) < count:
        some = sock.recv(count - len(data))
        if not some:
            return b""
        data += some
    return data


def unexpected(frame: AnyFrame) -> ValueError:
    """What to raise for a frame that the other side has no reason to send."""
    return ValueError(f"it sends a frame that is not its to send: {type(frame).__name__}")


def loss(error: Exception | None) -> str:
    """How a connection, and with it the other side, was lost."""
    if isinstance(error, OSError) and error.errno in (errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH):
        return f"is silent: it has answered nothing for {keepalive.SILENT_SECONDS} s"
    return "is gone" if error is None or isinstance(error, OSError) else f"is refused: {error}"

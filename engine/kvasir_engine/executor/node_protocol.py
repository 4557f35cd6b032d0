"""What the nodes of one worker tell each other: who they are, and how they end. Msgpack over TCP, after a length.

The leader, node 0, listens. Each other node makes a connection of its own first, and then two for each of its
ranks, which carry the frames of `rank_protocol.py` once the leader has welcomed the hello on them. It refuses by
name a hello that does not fit. The node's own connection lives as long as the node.
"""

import errno
import ipaddress
import socket
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from kvasir_engine import keepalive
from kvasir_engine.errors import UserError

if TYPE_CHECKING:
    from kvasir_engine.entrypoints.build import EngineOptions
    from kvasir_engine.protocol import Role

VERSION = 1
HELLO_SECONDS = 10.0
"""In which a connection must have said who it is."""
LONGEST = 64 << 10
"""Bytes of a frame between nodes."""
Channel = Literal["node", "steps", "reports"]


@dataclass(frozen=True)
class Nodes:
    """The nodes that a worker's ranks are divided among. `rank` is this one; `host` and `port` are the leader's."""

    count: int
    rank: int
    host: str
    port: int

    @property
    def on_loopback(self) -> bool:
        """Whether all of them are on one machine, by the leader's address. A name may mean any."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    def ranks(self, size: int, node: int | None = None) -> range:
        """Those of `size` ranks that run on a node, this one by default."""
        here, first = size // self.count, self.rank if node is None else node
        return range(first * here, (first + 1) * here)


def nodes_of(count: int, rank: int, address: str, tensor_parallel: int) -> Nodes | None:
    """What --nnodes, --node-rank and --dist-init-addr say; None for one node. Raises UserError."""
    if count == 1:
        if rank or address:
            raise UserError("--node-rank and --dist-init-addr are for a worker on several nodes: say --nnodes")
        return None
    if tensor_parallel % count:
        raise UserError(f"--tensor-parallel {tensor_parallel} is no multiple of --nnodes {count}")
    if not 0 <= rank < count:
        raise UserError(f"--node-rank {rank} is not one of the {count} nodes, 0 to {count - 1}")
    if not address:
        raise UserError(f"--nnodes {count} needs --dist-init-addr, HOST:PORT of node 0")
    host, _, port = address.rpartition(":")
    if not host or not (port.isdecimal() and 0 < int(port) < 1 << 16):
        raise UserError(f"--dist-init-addr {address!r} is not HOST:PORT")
    return Nodes(count, rank, host.removeprefix("[").removesuffix("]"), int(port))


class NodeSettings(msgspec.Struct, frozen=True):
    """What every node of a worker must have been told alike. `weights` is the model's digest on each."""

    nnodes: int
    tensor_parallel: int
    role: str
    weights: str
    model: str
    revision: str
    dtype: str
    device: str
    attention_backend: str
    page_size: int
    kv_cache_memory: int
    deterministic: bool
    enforce_eager: bool
    cuda_graph_max_bs: int
    fabric: str
    kv_digests: bool

    @classmethod
    def of(cls, options: "EngineOptions", role: "Role", folder: Path) -> "NodeSettings":
        """The group that a node with these options, and the model in `folder`, belongs to. Raises ModelError."""
        from kvasir_engine.model.loading.safetensors_files import weights_digest

        return cls(
            options.node_count,
            options.tensor_parallel,
            role,
            weights_digest(folder),
            options.model,
            options.revision or "",
            options.dtype,
            options.device,
            options.attention_backend,
            options.page_size,
            options.kv_cache_memory,
            options.deterministic,
            options.enforce_eager,
            options.cuda_graph_max_bs,
            options.fabric,
            options.kv_digests,
        )

    def mismatch(self, other: "NodeSettings") -> str | None:
        """The first field by which a node's `other` group is not this one, the leader's, or None; as one clause."""
        for field in self.__struct_fields__:
            ours, theirs = getattr(self, field), getattr(other, field)
            if ours != theirs:
                return f"{field} is {ours!r} at the leader and {theirs!r} at the node"
        return None


class NodeFrame(msgspec.Struct, frozen=True, tag_field="t", tag=str.lower):
    """Base of what travels between nodes."""


class Hello(NodeFrame, frozen=True):
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


class Loaded(NodeFrame, frozen=True):
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


AnyFrame = Hello | Welcome | Refused | Loaded | Ended | Closed | RankEnded | Leave

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[AnyFrame] = msgspec.msgpack.Decoder(AnyFrame)


def refusal(hello: Hello, group: NodeSettings, epoch: int, taken: Iterable[tuple[int, Channel]]) -> str | None:
    """Why a leader of `group` does not let a connection in; None when it does. `taken`: ranks that have theirs."""
    if hello.version != VERSION:
        return f"it speaks version {hello.version} of the protocol between nodes, and the leader {VERSION}"
    mismatch = group.mismatch(hello.group)
    if mismatch is not None:
        return f"the two are not one worker's: {mismatch}"
    if not 0 < hello.node < group.nnodes:
        return f"nodes 1 to {group.nnodes - 1} may join"
    ranks = Nodes(group.nnodes, hello.node, "", 0).ranks(group.tensor_parallel)
    if hello.rank not in ranks:
        return f"its ranks are {ranks.start} to {ranks.stop - 1}"
    if hello.channel != "node" and hello.epoch != epoch:
        return f"its epoch {hello.epoch:016x} is not the leader's {epoch:016x}: it is left from another start"
    if (hello.rank, hello.channel) in taken:
        return "it has joined already"
    return None


def named(hello: Hello) -> str:
    """Who a connection says that it is."""
    return f"node {hello.node}" + ("" if hello.channel == "node" else f", rank {hello.rank}, {hello.channel}")


def watch(sock: socket.socket) -> None:
    """Notice when the machine at the other end is gone, and send what is small at once."""
    keepalive.notice_silence(sock)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def send(sock: socket.socket, frame: AnyFrame) -> None:
    """Send a frame. Raises OSError."""
    data = _encoder.encode(frame)
    sock.sendall(struct.pack(">I", len(data)) + data)


def receive(sock: socket.socket) -> AnyFrame | None:
    """The next frame; None at the connection's end. Raises OSError, or ValueError for what is no frame."""
    head = _exactly(sock, 4)
    if not head:
        return None
    (length,) = struct.unpack(">I", head)
    if length > LONGEST:
        raise ValueError("it sends what is no frame")
    try:
        return _decoder.decode(_exactly(sock, length))
    except msgspec.DecodeError as error:
        raise ValueError(f"it sends a frame that cannot be read: {error}") from None


def _exactly(sock: socket.socket, count: int) -> bytes:
    """So many bytes, or none when the connection has ended before the last."""
    data = b""
    while len(data) < count:
        some = sock.recv(count - len(data))
        if not some:
            return b""
        data += some
    return data


def loss(error: Exception | None) -> str:
    """How a connection, and with it the other side, was lost."""
    if isinstance(error, OSError) and error.errno in (errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH):
        return f"is silent: it has answered nothing for {keepalive.SILENT_SECONDS} s"
    return "is gone" if error is None or isinstance(error, OSError) else f"is refused: {error}"

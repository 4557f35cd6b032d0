"""The machines that a worker's ranks are divided among."""

import ipaddress
from dataclasses import dataclass

from kvasir_engine.errors import UserError


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

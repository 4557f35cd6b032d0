"""A stand-in for NIXL, without network or threads: real bytes in this process, moved when a test says so.

`Wire.nixl` makes what `NixlAgent` takes for NIXL's agent. It promises no more than NIXL over UCX does:

- Transfers end in any order. What one changes holds `SPOILED` from when it is posted until it has ended, and the
  source is read when it ends: whoever reads the target or changes the source meanwhile is found out.
- A transfer that fails leaves half of its bytes. One whose handle is released goes on.
- Messages of one agent to another stay in order. They arrive late; a test may lose one, or let it arrive twice.
- A death shows when the dead is told something, or a transfer with it is looked at.
"""

import ctypes
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from nixl_cu13._bindings import nixlInvalidParamError, nixlNotFoundError, nixlRemoteDisconnectError

SPOILED = 0xFF
"""What bytes are that a transfer under way is to overwrite."""

Bytes = np.ndarray[tuple[int], np.dtype[np.uint8]]
Pieces = list[tuple[int, int]]
"""Runs of bytes: where each begins, and its size."""


@dataclass(frozen=True)
class Region:
    """Memory that an agent has registered."""

    address: int
    size: int

    def holds(self, address: int, size: int) -> bool:
        return self.address <= address and address + size <= self.address + self.size


@dataclass(frozen=True)
class Table:
    """Prepared descriptors of one agent's memory."""

    agent: str
    pieces: Pieces

    def release(self) -> None:
        """As NIXL's handle has it."""


@dataclass(eq=False)
class Transfer:
    """Bytes from `source` to `target`, which `by` moves to, or from, `peer`."""

    wire: "Wire"
    operation: Literal["READ", "WRITE"]
    by: str
    peer: str
    ours: Pieces
    theirs: Pieces
    state: str = "INIT"
    found: list[bytes] = field(default_factory=list)  # in the source, when it was posted
    released: bool = False

    @property
    def source(self) -> Pieces:
        return self.ours if self.operation == "WRITE" else self.theirs

    @property
    def target(self) -> Pieces:
        return self.theirs if self.operation == "WRITE" else self.ours

    def release(self) -> None:
        """As NIXL's handle has it."""
        assert not self.released, "a handle is released twice"
        self.released = True


class Wire:
    """All agents, what is under way between them, and the dead."""

    def __init__(self) -> None:
        self.agents: dict[str, Nixl] = {}
        self.transfers: list[Transfer] = []
        self.sent: dict[tuple[str, str], deque[bytes]] = {}  # by (from, to): what has not arrived
        self._unseen: set[str] = set()  # the dead that nothing shows of yet

    def nixl(self, name: str, config: Any) -> Any:
        """What NIXL's agent would be."""
        assert name not in self.agents, f"two agents are called {name}"
        self.agents[name] = Nixl(self, name)
        return self.agents[name]

    # -- what a test makes happen

    def waiting(self, to: str) -> list[str]:
        """The agents of which a message is on its way to this one."""
        return sorted(by for (by, other), messages in self.sent.items() if other == to and messages)

    def deliver(self, to: str, by: str | None = None, twice: bool = False) -> bool:
        """Let the next message, `by` an agent or any, arrive. Whether there was one."""
        senders = self.waiting(to) if by is None else [by]
        if not senders or to not in self.agents:
            return False
        message = self.sent[senders[0], to].popleft()
        self.agents[to].arrived += [(senders[0], message)] * (1 + twice)
        return True

    def deliver_all(self, to: str) -> None:
        """Let all that is on its way arrive."""
        while self.deliver(to):
            pass

    def lose(self, to: str, by: str) -> None:
        """The next message does not arrive."""
        self.sent[by, to].popleft()

    def forge(self, by: str, to: str, message: bytes) -> None:
        """A message that somebody sends in the name of `by`."""
        self.sent.setdefault((by, to), deque()).append(message)

    def end(self, transfer: Transfer, ok: bool = True) -> None:
        """All bytes have moved; not `ok`: half of them, and NIXL says so."""
        self.transfers.remove(transfer)
        assert self.bytes_of(transfer.source) == transfer.found, "what is copied was changed meanwhile"
        pieces = list(zip(transfer.source, transfer.target, strict=True))
        for (start, size), (end, _) in pieces if ok else pieces[: len(pieces) // 2]:
            ctypes.memmove(end, start, size)
        transfer.state = "DONE" if ok else "ERR"

    @staticmethod
    def spoil(transfer: Transfer) -> None:
        """A bit of what has moved changed on its way."""
        address, size = transfer.target[-1]
        (last,) = ctypes.string_at(address + size - 1, 1)
        ctypes.memset(address + size - 1, last ^ 1, 1)

    def of(self, by: str) -> list[Transfer]:
        """What an agent has under way, in the order in which it was posted."""
        return [transfer for transfer in self.transfers if transfer.by == by]

    def touches(self, agent: str, transfer: Transfer) -> Pieces:
        """What of an agent's memory a transfer under way reads or writes."""
        return (transfer.ours if transfer.by == agent else []) + (transfer.theirs if transfer.peer == agent else [])

    def kill(self, name: str, shown: bool = True) -> None:
        """The process is gone, with its transfers and mail. Not `shown`: nobody can tell until `show`."""
        del self.agents[name]
        self.transfers = [each for each in self.transfers if name not in (each.by, each.peer)]
        for pair in [pair for pair in self.sent if pair[1] == name]:
            del self.sent[pair]
        if not shown:
            self._unseen.add(name)

    def show(self, name: str) -> None:
        """From now on the death shows."""
        self._unseen.discard(name)

    # -- for the agents

    def reach(self, name: str) -> bool:
        """Whether the agent lives. Raises what NIXL raises where it is known that it does not."""
        if name in self.agents:
            return True
        if name in self._unseen:
            return False
        raise nixlRemoteDisconnectError(f"{name} is gone")

    @staticmethod
    def bytes_of(pieces: Pieces) -> list[bytes]:
        return [ctypes.string_at(address, size) for address, size in pieces]


class Nixl:
    """NIXL's agent, as far as `NixlAgent` uses it."""

    def __init__(self, wire: Wire, name: str) -> None:
        self._wire = wire
        self._name = name
        self._met: set[str] = set()
        self.regions: list[Region] = []
        self.arrived: list[tuple[str, bytes]] = []

    def register_memory(self, regions: list[tuple[int, int, int, str]], memory: str) -> list[Region]:
        registered = [Region(address, size) for address, size, *_ in regions]
        self.regions += registered
        return registered

    def deregister_memory(self, regions: list[Region]) -> None:
        self.regions = [region for region in self.regions if region not in regions]

    def get_agent_metadata(self) -> bytes:
        return self._name.encode()

    def add_remote_agent(self, metadata: bytes) -> bytes:
        self._wire.reach(metadata.decode())
        self._met.add(metadata.decode())
        return metadata

    def remove_remote_agent(self, name: str) -> None:
        self._met.remove(name)

    def prep_xfer_dlist(self, agent: str, table: Any, memory: str) -> Table:
        pieces = [(int(address), int(size)) for address, size, _ in table]
        owner = self._name if agent == "NIXL_INIT_AGENT" else agent
        self._check(owner, pieces)
        return Table(owner, pieces)

    def get_xfer_descs(self, table: Any, memory: str) -> Pieces:
        return [(int(address), int(size)) for address, size, _ in table]

    def make_prepped_xfer(self, operation: Any, ours: Table, here: Any, theirs: Table, there: Any) -> Transfer:
        assert ours.agent == self._name
        local, remote = [ours.pieces[at] for at in here], [theirs.pieces[at] for at in there]
        return self._transfer(operation, local, remote, theirs.agent)

    def initialize_xfer(self, operation: Any, ours: Pieces, theirs: Pieces, agent: str) -> Transfer:
        self._check(self._name, ours)
        self._check(agent, theirs)
        return self._transfer(operation, ours, theirs, agent)

    def _transfer(self, operation: Any, ours: Pieces, theirs: Pieces, agent: str) -> Transfer:
        assert [size for _, size in ours] == [size for _, size in theirs], "the two sides differ in size"
        return Transfer(self._wire, operation, self._name, agent, ours, theirs)

    def transfer(self, transfer: Transfer) -> str:
        assert transfer.state == "INIT"
        transfer.state = "PROC"
        if self._reaches(transfer.peer):
            transfer.found = self._wire.bytes_of(transfer.source)
            for (address, size), new in zip(transfer.target, transfer.found, strict=True):
                if ctypes.string_at(address, size) != new:  # the same bytes again change nothing at any time
                    ctypes.memset(address, SPOILED, size)
            self._wire.transfers.append(transfer)
        return transfer.state

    def check_xfer_state(self, transfer: Transfer) -> str:
        assert not transfer.released, "a handle is used after its release"
        if transfer.state == "PROC":
            self._reaches(transfer.peer)
        return transfer.state

    def send_notif(self, agent: str, message: bytes) -> None:
        if self._reaches(agent):
            self._wire.sent.setdefault((self._name, agent), deque()).append(message)

    def get_new_notifs(self) -> dict[str, list[bytes]]:
        arrived, self.arrived = self.arrived, []
        found: dict[str, list[bytes]] = {}
        for agent, message in arrived:
            found.setdefault(agent, []).append(message)
        return found

    def _reaches(self, agent: str) -> bool:
        if agent not in self._met:
            raise nixlNotFoundError(f"{agent} is not known")
        return self._wire.reach(agent)

    def _check(self, owner: str, pieces: Pieces) -> None:
        if owner != self._name and not self._reaches(owner):
            return
        regions = self._wire.agents[owner].regions
        for address, size in pieces:
            if not any(region.holds(address, size) for region in regions):
                raise nixlInvalidParamError(f"{owner} has not registered {size} bytes at {address}")

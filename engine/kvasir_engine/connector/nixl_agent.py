"""A NIXL agent over one KV pool: names, metadata, prepared descriptors, writes and notifications.

Belongs to one thread. NIXL runs without its progress thread, which would spin on a core; whoever owns the agent
calls `notifications` often enough instead. Death of a peer shows as `PeerDied` from any call that talks to it.
"""

import contextlib
import os
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from nixl_cu13._api import nixl_agent, nixl_agent_config, nixl_prepped_dlist_handle, nixl_xfer_handle
from nixl_cu13._bindings import (
    nixlBackendError,
    nixlInvalidParamError,
    nixlMismatchError,
    nixlNotAllowedError,
    nixlNotFoundError,
    nixlRemoteDisconnectError,
    nixlXferDList,
)

from kvasir_engine.config import Fabric
from kvasir_engine.connector.fabric import fabric_env
from kvasir_engine.connector.layout import Cut, Offsets, Route, routes, spec_of
from kvasir_engine.errors import UserError
from kvasir_engine.protocol import Address, Encryption, Endpoint, Fingerprint, Region

MOST_STRANGERS = 64
"""Whom no router has named, and who is known so that it can be answered."""
_UNREACHABLE = (
    nixlInvalidParamError,
    nixlMismatchError,
    nixlBackendError,
    nixlNotAllowedError,  # another agent goes by this name already
    nixlNotFoundError,
    ValueError,
)

Pages = tuple[int, ...]
"""Of two pools whose pages have different sizes, blocks (`layout.py`)."""


class PeerDied(Exception):
    """The transport reports that the peer's process is gone."""


class PeerRefused(Exception):
    """The peer cannot be written to, or read from; the message says by which field."""


@dataclass
class TransferHandle:
    """One write or read under way."""

    handle: nixl_xfer_handle | None  # None: there was nothing to copy
    state: str


@dataclass(frozen=True)
class _Peer:
    region: Region
    fingerprint: Fingerprint
    to: Route | None  # what goes from here to there
    from_: Route | None
    layers: nixl_prepped_dlist_handle | None  # where pages are pages on both sides


def choose_fabric(fabric: Fabric, cuda: bool, encryption: Encryption = "auto") -> None:
    """Tell UCX which transports it may use. Call before any agent.

    What the environment says already wins; where encryption is required it is refused. Raises UserError.
    """
    required = encryption == "required"
    for name, value in fabric_env(fabric, cuda, required).items():
        if required and os.environ.get(name, value) != value:
            raise UserError(f"encryption required and {name}={os.environ[name]}: only {value} stays on the machine")
        os.environ.setdefault(name, value)


class NixlAgent:
    """This rank's agent; its name carries the worker's epoch, so a restarted worker is another agent."""

    def __init__(
        self,
        epoch: int,
        region: Region,
        fingerprint: Fingerprint,
        rank: int = 0,
        make_nixl: Callable[[str, nixl_agent_config], nixl_agent] = nixl_agent,
    ) -> None:
        self.name = f"kvasir-{epoch:016x}" + (f"-{rank}" if rank else "")
        self.rank = rank
        self._spec = spec_of(fingerprint, region.page_bytes)
        self._nixl = make_nixl(self.name, nixl_agent_config(enable_prog_thread=False, backends=["UCX"]))
        size = region.pages * region.page_bytes
        self._registered = self._nixl.register_memory([(region.address, size, region.device, "")], region.memory)
        self.endpoint = Endpoint(self.name, epoch, self._nixl.get_agent_metadata(), region, fingerprint)
        self._layers = fingerprint.layers
        self._local = self._nixl.prep_xfer_dlist("NIXL_INIT_AGENT", self._table(region), region.memory)
        self._peers: dict[str, _Peer] = {}
        self._met: dict[str, bytes] = {}  # who can be told something, by which metadata
        self._strangers: OrderedDict[str, None] = OrderedDict()

    def connect(self, endpoint: Endpoint, rank: int = 0) -> None:
        """Make a rank of the peer reachable; nothing if it is already. Raises PeerRefused, or PeerDied."""
        ours = self.endpoint
        reason = ours.fingerprint.mismatch(endpoint.fingerprint)
        if reason is not None:
            raise PeerRefused(f"KV of {endpoint.agent} does not fit: {reason}")
        if rank > len(endpoint.others):
            raise PeerRefused(f"{endpoint.agent} names {1 + len(endpoint.others)} ranks, rank {rank} is needed")
        peer = endpoint.address(rank)
        if peer.agent in self._peers:
            return
        try:
            theirs = spec_of(endpoint.fingerprint, peer.region.page_bytes)
        except ValueError as error:
            raise PeerRefused(f"KV of {peer.agent} does not fit: {error}") from None
        if theirs.layers != self._spec.layers:
            sizes = f"{ours.region.page_bytes}, {peer.region.page_bytes}"
            raise PeerRefused(f"KV of {peer.agent} does not fit: page_bytes: {sizes}")
        to = next((r for r in routes(self._spec, theirs) if (r.writer, r.holder) == (self.rank, rank)), None)
        from_ = next((r for r in routes(theirs, self._spec) if (r.writer, r.holder) == (rank, self.rank)), None)
        whole = any(route is not None and route.whole for route in (to, from_))
        try:
            if self._met.get(peer.agent, peer.metadata) != peer.metadata:
                self.forget(peer.agent)  # somebody has used its name: the router knows who it is
            self.meet(peer)
            region = peer.region
            layers = None
            # Of all of it first: what the peer did not register is refused before a table of it is made.
            whole_region = [(region.address, region.pages * region.page_bytes, region.device)]
            self._nixl.prep_xfer_dlist(peer.agent, whole_region, region.memory).release()
            if whole:
                layers = self._nixl.prep_xfer_dlist(peer.agent, self._table(region), region.memory)
        except nixlRemoteDisconnectError as error:
            raise PeerDied(peer.agent) from error
        except _UNREACHABLE as error:
            raise PeerRefused(f"NIXL cannot reach {peer.agent}: {error}") from error
        self._peers[peer.agent] = _Peer(region, endpoint.fingerprint, to, from_, layers)
        self._strangers.pop(peer.agent, None)

    def differs(self, endpoint: Endpoint, rank: int) -> bool:
        """Whether a rank of the peer is known with another pool or agent, or another way to divide it."""
        if rank > len(endpoint.others):
            return False
        peer = endpoint.address(rank)
        known = self._peers.get(peer.agent)
        if known is None:
            return False
        same = (known.region, known.fingerprint) == (peer.region, endpoint.fingerprint)
        return not same or self._met.get(peer.agent) != peer.metadata

    def meet(self, peer: Address) -> None:
        """Make `notify` reach the peer. Raises PeerRefused, or PeerDied."""
        if peer.agent in self._met:
            return
        try:
            name = self._nixl.add_remote_agent(peer.metadata).decode()
        except nixlRemoteDisconnectError as error:
            raise PeerDied(peer.agent) from error
        except _UNREACHABLE as error:
            raise PeerRefused(f"NIXL cannot reach {peer.agent}: {error}") from error
        if name != peer.agent:
            self._nixl.remove_remote_agent(name)  # NIXL has not known it before: its owner is to be met by it
            raise PeerRefused(f"metadata is of agent {name!r}, not {peer.agent!r}")
        self._met[peer.agent] = peer.metadata

    def meet_stranger(self, peer: Address) -> None:
        """As `meet`, for who only says who it is. Of too many the first that nobody has named since goes."""
        if peer.agent in self._met:
            return
        self.meet(peer)
        self._strangers[peer.agent] = None
        if len(self._strangers) > MOST_STRANGERS:
            self.forget(next(iter(self._strangers)))

    def sent(self, agent: str) -> Cut | None:
        """What of our pages goes to the peer; `None` if it is not known any more."""
        peer = self._peers.get(agent)
        return None if peer is None or peer.to is None else peer.to.source

    def received(self, agent: str) -> Cut | None:
        """What of our pages comes from the peer; `None` if it is not known any more."""
        peer = self._peers.get(agent)
        return None if peer is None or peer.from_ is None else peer.from_.target

    def sends_whole_pages(self, agent: str) -> bool:
        """Whether what goes to the peer are pages as they are, so that layers in any choice can be written."""
        peer = self._peers.get(agent)
        return peer is not None and peer.to is not None and peer.to.whole

    def forget(self, agent: str) -> None:
        """Drop a dead peer."""
        self._strangers.pop(agent, None)
        peer = self._peers.pop(agent, None)
        if peer is not None and peer.layers is not None:
            peer.layers.release()
        if agent in self._met:
            del self._met[agent]
            self._nixl.remove_remote_agent(agent)

    def write(self, agent: str, local: Pages, remote: Pages, layers: range) -> TransferHandle:
        """Start copying these layers of our pages `local` to the peer's `remote`.

        On shared memory this blocks for most of the copy. Raises PeerDied.
        """
        peer = self._peers.get(agent)
        if peer is None:
            raise PeerDied(agent)
        if peer.to is None:
            raise ValueError(f"nothing of rank {self.rank} goes to {agent}")
        return self._copy("WRITE", agent, peer, peer.to, local, remote, layers)

    def read(self, agent: str, local: Pages, remote: Pages, layers: range) -> TransferHandle:
        """Start copying these layers of the peer's pages `remote` to our pages `local`. As `write` otherwise."""
        peer = self._peers.get(agent)
        if peer is None:
            raise PeerDied(agent)
        if peer.from_ is None:
            raise ValueError(f"nothing of {agent} comes to rank {self.rank}")
        return self._copy("READ", agent, peer, peer.from_, local, remote, layers)

    def _copy(
        self,
        operation: Literal["READ", "WRITE"],
        agent: str,
        peer: _Peer,
        route: Route,
        local: Pages,
        remote: Pages,
        layers: range,
    ) -> TransferHandle:
        writes = operation == "WRITE"
        limit = peer.region.pages * (route.target if writes else route.source).blocks
        if len(local) != len(remote) or any(not 0 <= page < limit for page in remote):
            raise ValueError(f"pages {remote} are not {len(local)} of the peer's {limit}")
        try:
            if route.whole:
                pages = self._indices(local, layers), self._indices(remote, layers)
                handle = self._nixl.make_prepped_xfer(operation, self._local, pages[0], peer.layers, pages[1])
            else:
                source, target = (local, remote) if writes else (remote, local)
                begins, ends, sizes = route.pieces(source, target, layers)
                if not len(sizes):
                    return TransferHandle(None, "DONE")  # none of the heads of these layers goes this way
                here, there = (begins, ends) if writes else (ends, begins)
                ours = self._pieces(self.endpoint.region, here, sizes)
                handle = self._nixl.initialize_xfer(operation, ours, self._pieces(peer.region, there, sizes), agent)
            return TransferHandle(handle, self._nixl.transfer(handle))
        except nixlRemoteDisconnectError as error:
            raise PeerDied(agent) from error

    def cancel(self, transfer: TransferHandle) -> None:
        """End a transfer with a peer that is dead: nothing reads or writes our memory for it any more."""
        with contextlib.suppress(nixlRemoteDisconnectError, nixlNotFoundError, nixlBackendError):
            if transfer.handle is not None:
                transfer.handle.release()

    def poll(self, agent: str, transfer: TransferHandle) -> bool | None:
        """`True`: the write has ended well, `False`: badly, `None`: it is under way. Raises PeerDied."""
        try:
            if transfer.state == "PROC":
                transfer.state = self._nixl.check_xfer_state(transfer.handle)
            if transfer.state == "PROC":
                return None
            if transfer.handle is not None:
                transfer.handle.release()
        except (nixlRemoteDisconnectError, nixlNotFoundError) as error:  # not found: forgotten since it was posted
            raise PeerDied(agent) from error
        return bool(transfer.state == "DONE")

    def knows(self, agent: str) -> bool:
        """Whether `notify` reaches the peer, as far as is known."""
        return agent in self._met

    def named(self, agent: str) -> bool:
        """Whether a router has named the peer, so that there is a way for KV."""
        return agent in self._peers

    def notify(self, agent: str, message: bytes) -> None:
        """Send a notification of its own. Raises PeerDied."""
        if agent not in self._met:
            raise PeerDied(agent)
        try:
            self._nixl.send_notif(agent, message)
        except nixlRemoteDisconnectError as error:
            raise PeerDied(agent) from error

    def notifications(self) -> list[tuple[str, bytes]]:
        """What has arrived since the last call, as (agent, message). Also makes the transport progress."""
        return [(agent, m) for agent, messages in self._nixl.get_new_notifs().items() for m in messages]

    def close(self) -> None:
        """Deregister the memory: after this nobody can write to it."""
        for agent in list(self._met):
            self.forget(agent)
        self._local.release()
        self._nixl.deregister_memory(self._registered)

    def _pieces(self, region: Region, offsets: Offsets, sizes: Offsets) -> nixlXferDList:
        """Descriptors of pieces of `sizes` bytes at `offsets` in a region."""
        pieces = np.empty((len(offsets), 3), np.uint64)
        pieces[:, 0] = offsets + region.address
        pieces[:, 1] = sizes
        pieces[:, 2] = region.device
        return self._nixl.get_xfer_descs(pieces, region.memory)

    def _table(self, region: Region) -> np.ndarray[tuple[int, int], np.dtype[np.uint64]]:
        """One descriptor a layer of a page: [pages * layers, (address, bytes, device)]."""
        starts = np.asarray(self._spec.starts, np.uint64)
        pages = np.arange(region.pages, dtype=np.uint64) * np.uint64(region.page_bytes)
        table = np.empty((region.pages * self._layers, 3), np.uint64)
        table[:, 0] = (region.address + pages[:, None] + starts[:-1]).ravel()
        table[:, 1] = np.tile(np.diff(starts), region.pages)
        table[:, 2] = region.device
        return table

    def _indices(self, pages: Pages, layers: range) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
        """Places in the table of `layers` of `pages`. NIXL merges neighbours."""
        places = np.arange(layers.start, layers.stop, layers.step, dtype=np.int32)
        return (np.asarray(pages, np.int32)[:, None] * np.int32(self._layers) + places).ravel()

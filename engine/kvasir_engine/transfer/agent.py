"""A NIXL agent over one KV pool: names, metadata, prepared descriptors, writes and notifications.

Belongs to one thread. NIXL runs without its progress thread, which would spin on a core; whoever owns the agent
calls `notifications` often enough instead. Death of a peer shows as `PeerDied` from any call that talks to it.
"""

import os
from dataclasses import dataclass

import numpy as np
from nixl_cu13._api import nixl_agent, nixl_agent_config, nixl_prepped_dlist_handle, nixl_xfer_handle
from nixl_cu13._bindings import (
    nixlBackendError,
    nixlInvalidParamError,
    nixlMismatchError,
    nixlNotFoundError,
    nixlRemoteDisconnectError,
)

from kvasir_engine.protocol import Endpoint, Fingerprint, Region
from kvasir_engine.transfer.fabric import Fabric, fabric_env

Pages = tuple[int, ...]


class PeerDied(Exception):
    """The transport reports that the peer's process is gone."""


class Refused(Exception):
    """The peer cannot be written to; the message says by which field."""


@dataclass
class Transfer:
    """One write under way."""

    handle: nixl_xfer_handle
    state: str


@dataclass(frozen=True)
class _Peer:
    endpoint: Endpoint
    layers: nixl_prepped_dlist_handle


def choose_fabric(fabric: Fabric, cuda: bool) -> None:
    """Tell UCX which transports it may use. What the environment says already wins. Call before any agent."""
    for name, value in fabric_env(fabric, cuda).items():
        os.environ.setdefault(name, value)


class Agent:
    """This worker's agent; its name carries the epoch, so a restarted worker is another agent."""

    def __init__(self, epoch: int, region: Region, fingerprint: Fingerprint) -> None:
        self.name = f"kvasir-{epoch:016x}"
        self._nixl = nixl_agent(self.name, nixl_agent_config(enable_prog_thread=False, backends=["UCX"]))
        size = region.pages * region.page_bytes
        self._registered = self._nixl.register_memory([(region.address, size, region.device, "")], region.memory)
        self.endpoint = Endpoint(self.name, epoch, self._nixl.get_agent_metadata(), region, fingerprint)
        self._layers = fingerprint.layers
        self._local = self._nixl.prep_xfer_dlist("NIXL_INIT_AGENT", self._table(region), region.memory)
        self._peers: dict[str, _Peer] = {}

    def connect(self, endpoint: Endpoint) -> None:
        """Make the peer reachable; nothing if it is already. Raises Refused, or PeerDied."""
        if endpoint.agent in self._peers:
            return
        ours = self.endpoint
        reason = ours.fingerprint.mismatch(endpoint.fingerprint)
        if reason is None and ours.region.page_bytes != endpoint.region.page_bytes:
            reason = f"page_bytes: {ours.region.page_bytes}, {endpoint.region.page_bytes}"
        if reason is not None:
            raise Refused(f"KV of {endpoint.agent} does not fit: {reason}")
        try:
            name = self._nixl.add_remote_agent(endpoint.metadata).decode()
            if name != endpoint.agent:
                raise Refused(f"metadata is of agent {name!r}, not {endpoint.agent!r}")
            region = endpoint.region
            layers = self._nixl.prep_xfer_dlist(endpoint.agent, self._table(region), region.memory)
        except nixlRemoteDisconnectError as error:
            raise PeerDied(endpoint.agent) from error
        except (nixlInvalidParamError, nixlMismatchError, nixlBackendError) as error:
            raise Refused(f"NIXL cannot reach {endpoint.agent}: {error}") from error
        self._peers[endpoint.agent] = _Peer(endpoint, layers)

    def forget(self, agent: str) -> None:
        """Drop a dead peer."""
        peer = self._peers.pop(agent, None)
        if peer is not None:
            peer.layers.release()
            self._nixl.remove_remote_agent(agent)

    def write(self, agent: str, local: Pages, remote: Pages, layers: range) -> Transfer:
        """Start copying these layers of our pages `local` to the peer's `remote`.

        On shared memory this blocks for most of the copy. Raises PeerDied.
        """
        peer = self._peers.get(agent)
        if peer is None:
            raise PeerDied(agent)
        limit = peer.endpoint.region.pages
        if len(local) != len(remote) or any(not 0 <= page < limit for page in remote):
            raise ValueError(f"pages {remote} are not {len(local)} of the peer's {limit}")
        try:
            handle = self._nixl.make_prepped_xfer(
                "WRITE",
                self._local,
                self._indices(local, layers),
                peer.layers,
                self._indices(remote, layers),
            )
            return Transfer(handle, self._nixl.transfer(handle))
        except nixlRemoteDisconnectError as error:
            raise PeerDied(agent) from error

    def poll(self, agent: str, transfer: Transfer) -> bool | None:
        """`True`: the write has ended well, `False`: badly, `None`: it is under way. Raises PeerDied."""
        try:
            if transfer.state == "PROC":
                transfer.state = self._nixl.check_xfer_state(transfer.handle)
            if transfer.state == "PROC":
                return None
            transfer.handle.release()
        except (nixlRemoteDisconnectError, nixlNotFoundError) as error:  # not found: forgotten since it was posted
            raise PeerDied(agent) from error
        return bool(transfer.state == "DONE")

    def notify(self, agent: str, message: bytes) -> None:
        """Send a notification of its own. Raises PeerDied."""
        if agent not in self._peers:
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
        for agent in list(self._peers):
            self.forget(agent)
        self._local.release()
        self._nixl.deregister_memory(self._registered)

    def _table(self, region: Region) -> np.ndarray[tuple[int, int], np.dtype[np.uint64]]:
        """One descriptor a layer of a page: [pages * layers, (address, bytes, device)]."""
        pieces, size = region.pages * self._layers, region.page_bytes // self._layers
        table = np.empty((pieces, 3), np.uint64)
        table[:, 0] = region.address + np.arange(pieces, dtype=np.uint64) * np.uint64(size)
        table[:, 1] = size
        table[:, 2] = region.device
        return table

    def _indices(self, pages: Pages, layers: range) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
        """Places in the table of `layers` of `pages`. NIXL merges neighbours."""
        places = np.arange(layers.start, layers.stop, dtype=np.int32)
        return (np.asarray(pages, np.int32)[:, None] * np.int32(self._layers) + places).ravel()

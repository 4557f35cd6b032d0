"""The handoffs of all ranks of a worker, as the one that its engine knows.

Everything here runs on the engine's thread: what the ranks report comes through `received`.
"""

from collections.abc import Callable
from typing import Protocol

import msgspec

from kvasir_engine.connector import receiver, sender
from kvasir_engine.connector.commands import AnyCommand, Grant, Lend, Open, Read, Revoke, Withdraw
from kvasir_engine.connector.layout import pairs
from kvasir_engine.connector.rank_parts import Event, GrantedParts, PushedParts, StopParts
from kvasir_engine.connector.sender import Key, LayerPush, Push
from kvasir_engine.connector.stats import TransferStats
from kvasir_engine.connector.transfer_thread import TransferThread
from kvasir_engine.protocol import Address, Endpoint, Lease, Loan
from kvasir_engine.status_reports import LinkReport


class OtherRanks(Protocol):
    """Ranks 1 and up, in processes of their own."""

    @property
    def addresses(self) -> tuple[Address, ...]:
        """Where their pools are."""
        ...

    def command(self, command: AnyCommand) -> None:
        """For their transfer threads."""
        ...

    def push(self, key: Key, push: Push) -> None:
        """Copy pages, after what they were given to compute before."""
        ...

    def push_layers(self, pushes: list[LayerPush]) -> None:
        """Copy pages while the next step computes them."""
        ...

    @property
    def stats(self) -> TransferStats:
        """Their counters, added up."""
        ...

    @property
    def links(self) -> list[LinkReport]:
        """What they measured of their links to other workers."""
        ...


class KVConnector:
    """Rank 0's handoff and the `others`', with the interface of one handoff. `others` is None for one rank."""

    def __init__(self, own: TransferThread, others: OtherRanks | None = None) -> None:
        self._own = own
        self._others = others
        self._grants = GrantedParts()
        self._pushes = PushedParts()
        self.endpoint = own.endpoint
        if others is not None:
            self.endpoint = msgspec.structs.replace(own.endpoint, others=others.addresses)

    @property
    def stats(self) -> TransferStats:
        """The counters of all ranks."""
        return self._own.stats if self._others is None else self._own.stats + self._others.stats

    @property
    def links(self) -> tuple[LinkReport, ...]:
        """What all ranks measured of their links to other workers; each measures its own. From any thread."""
        return (*self._own.links.values(), *([] if self._others is None else self._others.links))

    def is_alive(self) -> bool:
        """Whether rank 0's transfer thread runs. Where another rank's does not, the worker ends."""
        return self._own.is_alive()

    def stop(self) -> None:
        """Deregister rank 0's pool and end its thread."""
        self._own.stop()

    def _command(self, command: AnyCommand) -> None:
        self._own.command(command)
        if self._others is not None:
            self._others.command(command)

    # -- the decode side

    def grant(self, lease: Lease, to: Endpoint, tokens: int) -> None:
        """`to` may write the pages of `lease`, `tokens` (0: all) of them, until proof that it has stopped."""
        found = pairs(to.fingerprint, self.endpoint.fingerprint)
        self._grants.grant(lease.id, [(rank, to.agent_of(theirs)) for theirs, rank in found])
        self._command(Grant(lease, to, tokens))

    def revoke(self, lease: int) -> None:
        """The request of a lease or loan was aborted: `Reclaimed` follows when its peer is proven stopped."""
        self._command(Revoke(lease))

    # -- the prefill side

    def open(self, to: Endpoint, lease: Lease) -> Key:
        """Begin to write under `lease`. The key names it in every later call and event."""
        key, found = (to.agent, lease.id), pairs(self.endpoint.fingerprint, to.fingerprint)
        self._pushes.open(key, [(rank, to.agent_of(theirs)) for rank, theirs in found])
        self._command(Open(to, lease))
        return key

    def push(self, key: Key, push: Push) -> None:
        """Copy pages whose KV is there, or complete the lease, after its earlier pushes.

        `Done` follows for whole pages, or `Failed`.
        """
        self._pushes.push(key, push)
        self._own.push(key, push)
        if self._others is not None:
            self._others.push(key, push)

    def push_layers(self, pushes: list[LayerPush]) -> Callable[[int], None]:
        """Push pages layer by layer while the next step computes them. The result is to hear of each layer."""
        for key, last in pushes:
            self._pushes.push(key, last)
        if self._others is not None:
            self._others.push_layers(pushes)
        return self._own.push_layers(pushes)

    def withdraw(self, key: Key, reason: str) -> None:
        """Write, or read, no more under the lease. `Failed` follows when the copies under way have ended."""
        self._command(Withdraw(key, reason))

    def busy(self, to: Endpoint, lease: int) -> bool:
        """Whether a lease or loan with this number is open with any rank of `to`."""
        agents = {to.agent, *(each.agent for each in to.others)}
        return self._pushes.knows(agents, lease)

    # -- pages that are read back

    def reads(self, peer: Endpoint) -> bool:
        """Whether pages can be read from `peer`, or by it: where they can be written."""
        return self.endpoint.fingerprint.mismatch(peer.fingerprint) is None

    def lend(self, loan: Loan, to: Endpoint) -> None:
        """`to` may read the pages of `loan`. `Reclaimed` follows when it has, or is proven not to read any more."""
        found = pairs(self.endpoint.fingerprint, to.fingerprint)
        self._grants.lend(loan.id, [(rank, to.agent_of(theirs)) for rank, theirs in found])
        self._command(Lend(loan, to))

    def read(self, to: Endpoint, loan: Loan) -> Key:
        """Begin to read under `loan`. What is pushed under the key is read; `Done` and `Failed` as for writes."""
        key, found = (to.agent, loan.id), pairs(to.fingerprint, self.endpoint.fingerprint)
        self._pushes.open(key, [(rank, to.agent_of(theirs)) for theirs, rank in found])
        self._command(Read(to, loan))
        return key

    # -- what the ranks report

    def received(self, rank: int, event: Event) -> list[Event]:
        """What an event of one rank means for the worker's lease."""
        events: list[Event] = []
        effects = (
            self._pushes.received(rank, event)
            if isinstance(event, sender.Done | sender.Failed)
            else self._grants.received(rank, event)
        )
        for effect in effects:
            match effect:
                case StopParts(int() as lease):
                    self.revoke(lease)
                case StopParts(tuple() as key, reason):
                    self.withdraw(key, reason)
                case receiver.Settled() | receiver.Fenced() | receiver.Reclaimed() | receiver.Rejected():
                    events.append(effect)
                case sender.Done() | sender.Failed():
                    events.append(effect)
        return events

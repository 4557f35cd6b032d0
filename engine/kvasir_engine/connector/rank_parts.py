"""One lease of the parts that several ranks hold and write: pure. A part is a pair of ranks, one of each worker.

A lease is settled when all its parts are. It is fenced as soon as one part fails, which stops the others, and it is
reclaimed when the last part has ended with a proof. On the prefill side a push is done when every part has it.
A loan has parts too: one for each pair of ranks that reads.
With one rank on both sides a part is the lease, and its events pass as they are.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

from kvasir_engine.connector import receiver, sender
from kvasir_engine.connector.notifications import Complete
from kvasir_engine.connector.sender import Key, Push

Part = tuple[int, str]
"""Our rank and the agent of the peer's."""

HolderEvent = receiver.Settled | receiver.Fenced | receiver.Reclaimed | receiver.Rejected
WriterEvent = sender.Done | sender.Failed
Event = HolderEvent | WriterEvent


@dataclass(frozen=True)
class StopParts:
    """Revoke or withdraw what is left of the lease on every rank: one of its parts has failed."""

    lease: int | Key
    reason: str


@dataclass
class _Grant:
    open: set[Part]
    loan: bool = False
    settled: list[Complete] = field(default_factory=list)
    failed: receiver.Fenced | receiver.Reclaimed | None = None


class GrantedParts:
    """The leases that this worker granted, on all its ranks."""

    def __init__(self) -> None:
        self._grants: dict[int, _Grant] = {}

    def grant(self, lease: int, parts: Iterable[Part]) -> None:
        """A lease is granted in these parts."""
        self._grants[lease] = _Grant(set(parts))

    def lend(self, loan: int, parts: Iterable[Part]) -> None:
        """A loan is given in these parts. Each is given back by itself, and the loan with the last."""
        self._grants[loan] = _Grant(set(parts), loan=True)

    def received(self, rank: int, event: HolderEvent) -> list[HolderEvent | StopParts]:
        """An event of a part, as rank `rank` reports it: what that means for the lease."""
        if isinstance(event, receiver.Rejected):
            return [event]
        grant = self._grants[event.lease]
        part = rank, event.writer
        others = grant.open - {part}
        effects: list[HolderEvent | StopParts] = []
        if isinstance(event, receiver.Settled):
            grant.settled.append(event.complete)
        elif grant.failed is None and not (grant.loan and _given_back(event)):
            grant.failed = event
            if others or isinstance(event, receiver.Fenced):
                effects.append(receiver.Fenced(event.lease, event.code, reason=event.reason))
            if others:
                effects.append(StopParts(event.lease, event.reason))
        if not isinstance(event, receiver.Fenced):
            grant.open.remove(part)
            if not others:
                del self._grants[event.lease]
                effects.append(self._end(grant, event))
        return effects

    @staticmethod
    def _end(grant: _Grant, last: receiver.Settled | receiver.Reclaimed) -> HolderEvent:
        proof = last.proof if isinstance(last, receiver.Reclaimed) else "acknowledged"
        if grant.failed is not None:
            return receiver.Reclaimed(last.lease, proof, grant.failed.reason, grant.failed.code)
        if isinstance(last, receiver.Reclaimed):
            return receiver.Reclaimed(last.lease, proof, last.reason, last.code)
        if any(complete != grant.settled[0] for complete in grant.settled):
            return receiver.Reclaimed(last.lease, proof, "the prefill worker's ranks do not agree on the prompt")
        return receiver.Settled(last.lease, grant.settled[0])


def _given_back(event: receiver.Fenced | receiver.Reclaimed) -> bool:
    """Whether a reader has said that it reads no more."""
    return isinstance(event, receiver.Reclaimed) and event.proof == "acknowledged"


@dataclass
class _Pushing:
    parts: frozenset[Part]
    open: set[Part]
    left: dict[Push, set[Part]] = field(default_factory=dict)  # the parts that have not ended a push
    failed: str = ""


class PushedParts:
    """The leases of others that this worker's ranks write, or read, under. The key names the holder's rank 0."""

    def __init__(self) -> None:
        self._leases: dict[Key, _Pushing] = {}
        self._lease_of: dict[Key, Key] = {}

    def open(self, key: Key, parts: Iterable[Part]) -> None:
        """A lease is open in these parts."""
        pushing = self._leases[key] = _Pushing(frozenset(parts), set(parts))
        for _, agent in pushing.parts:
            self._lease_of[agent, key[1]] = key

    def knows(self, agents: Iterable[str], lease: int) -> bool:
        """Whether a part of a lease with this number is open with one of these agents."""
        return any((agent, lease) in self._lease_of for agent in agents)

    def push(self, key: Key, push: Push) -> None:
        """`push`, of all layers or of the last, is to end in every part."""
        pushing = self._leases.get(key)
        if pushing is not None:
            pushing.left[push] = set(pushing.parts)

    def received(self, rank: int, event: WriterEvent) -> list[WriterEvent | StopParts]:
        """An event of a part, as rank `rank` reports it: what that means for the lease."""
        key = self._lease_of[event.key]
        pushing, part = self._leases[key], (rank, event.key[0])
        effects: list[WriterEvent | StopParts] = []
        if isinstance(event, sender.Failed):
            pushing.open.remove(part)
            if pushing.open and not pushing.failed:
                effects.append(StopParts(key, event.reason))
            pushing.failed = pushing.failed or event.reason
        else:
            left = pushing.left[event.push]
            left.remove(part)
            if event.push.complete is not None:
                pushing.open.remove(part)
            if not left:
                del pushing.left[event.push]
                effects.append(sender.Done(key, event.push))
        if not pushing.open:
            del self._leases[key]
            for _, agent in pushing.parts:
                self._lease_of.pop((agent, key[1]), None)  # an agent that several of our ranks write to
            if pushing.failed:
                effects.append(sender.Failed(key, pushing.failed))
        return effects

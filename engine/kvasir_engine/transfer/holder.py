"""The decode side of a lease, as a pure state machine: who may still write into my pages?

    open    -> settled   the writer's `Complete` arrived: the pages are the request's
    open    -> fenced    aborted or expired: nobody wants the pages, but the writer may still write
    open    -> stopped   the writer says it stopped, or is dead
    fenced  -> stopped   likewise, or its `Complete` came late

A fenced lease asks its writer again and again to stop; a timeout alone never frees a page. Each input returns
the effects that the caller must carry out, in order.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from kvasir_engine.transfer.messages import Complete, Release, Stopped

RELEASE_INTERVAL = 0.25

Proof = Literal["acknowledged", "writer_died", "never_connected"]


@dataclass(frozen=True)
class Settled:
    """The pages hold the prompt's KV and nobody writes them any more."""

    lease: int
    complete: Complete


@dataclass(frozen=True)
class Fenced:
    """The request of this lease has failed, for `reason`; its pages wait for the proof."""

    lease: int
    reason: str


@dataclass(frozen=True)
class Reclaimed:
    """The proof that the writer has stopped. `reason` says why it stopped, if the request was still wanted."""

    lease: int
    proof: Proof
    reason: str = ""


@dataclass(frozen=True)
class Ask:
    """Send `message` to the peer `agent`."""

    agent: str
    message: Release


@dataclass(frozen=True)
class Rejected:
    """A message that fits no lease of ours: stale epoch, stranger, duplicate."""

    agent: str
    lease: int
    why: str


Effect = Settled | Fenced | Reclaimed | Ask | Rejected


@dataclass
class _Lease:
    writer: str
    deadline: float
    pages: int
    fenced: bool = False
    asked: float = 0.0


class Holder:
    """All leases that this worker has granted and that still matter. Times are seconds of one monotonic clock."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self._leases: dict[int, _Lease] = {}

    def __len__(self) -> int:
        return len(self._leases)

    @property
    def fenced(self) -> int:
        """Leases that wait for a proof."""
        return sum(lease.fenced for lease in self._leases.values())

    def writers(self) -> set[str]:
        """Agents that may still write here."""
        return {lease.writer for lease in self._leases.values()}

    def grant(self, lease: int, writer: str, pages: int, deadline: float) -> None:
        """Open `lease` of `pages` pages for the agent `writer`."""
        if lease in self._leases:
            raise ValueError(f"lease {lease} was granted already")
        self._leases[lease] = _Lease(writer, deadline, pages)

    def revoke(self, lease: int, now: float) -> Iterable[Effect]:
        """The request was aborted. Idempotent; a lease that has ended is left alone."""
        held = self._leases.get(lease)
        if held is None or held.fenced:
            return []
        return self._fence(lease, held, "aborted", now)

    def received(self, agent: str, message: Complete | Stopped) -> Iterable[Effect]:
        """A writer's word."""
        held = self._leases.get(message.lease)
        if message.epoch != self.epoch:
            return [Rejected(agent, message.lease, f"stale epoch {message.epoch}, mine is {self.epoch}")]
        if held is None:
            return [Rejected(agent, message.lease, "no such lease")]
        if held.writer != agent:
            return [Rejected(agent, message.lease, f"the lease is {held.writer}'s")]
        del self._leases[message.lease]
        if isinstance(message, Stopped):
            return [Reclaimed(message.lease, "acknowledged", message.reason)]
        if held.fenced:
            return [Reclaimed(message.lease, "acknowledged")]
        if message.pages != held.pages:
            why = f"the writer wrote {message.pages} pages of {held.pages}"
            return [Reclaimed(message.lease, "acknowledged", why)]
        return [Settled(message.lease, message)]

    def died(self, agent: str) -> Iterable[Effect]:
        """The transport reports the agent's death."""
        gone = [lease for lease, held in self._leases.items() if held.writer == agent]
        for lease in gone:
            del self._leases[lease]
        return [Reclaimed(lease, "writer_died", "the prefill worker died") for lease in gone]

    def tick(self, now: float) -> Iterable[Effect]:
        """Time passed: fence what has expired, ask again the writers that have not answered."""
        effects: list[Effect] = []
        for lease, held in self._leases.items():
            if not held.fenced and now >= held.deadline:
                effects += self._fence(lease, held, "expired", now)
            elif held.fenced and now >= held.asked + RELEASE_INTERVAL:
                held.asked = now
                effects.append(Ask(held.writer, Release(lease, self.epoch)))
        return effects

    def _fence(self, lease: int, held: _Lease, reason: str, now: float) -> list[Effect]:
        held.fenced, held.asked = True, now
        return [Fenced(lease, reason), Ask(held.writer, Release(lease, self.epoch))]

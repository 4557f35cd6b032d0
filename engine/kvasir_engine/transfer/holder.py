"""The decode side of a lease, as a pure state machine: who may still write into my pages?

    open    -> settled   the writer's `Complete` arrived, and every page's digest was right
    open    -> fenced    aborted, expired, or the writer is silent: nobody wants the pages, but it may still write
    open    -> stopped   the writer says it stopped, or is dead
    fenced  -> stopped   likewise, or its `Complete` came late

A fenced lease asks its writer again and again to stop; a timeout alone never frees a page. Each input returns
the effects that the caller must carry out, in order.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from kvasir_engine.transfer.messages import Complete, Ping, Release, Stopped, Written

RELEASE_INTERVAL = 0.25
PING_INTERVAL = 0.25
SILENCE = 2.0
"""Seconds without a word after which a writer is fenced: it may be stopped, or cut off."""

Proof = Literal["acknowledged", "writer_died", "never_connected"]
Code = Literal["handoff_failed", "kv_digest_mismatch", "lease_aborted", "lease_expired", "lease_writer_silent"]


@dataclass(frozen=True)
class Settled:
    """The pages hold the prompt's KV and nobody writes them any more."""

    lease: int
    complete: Complete


@dataclass(frozen=True)
class Fenced:
    """The request of this lease has failed; its pages wait for the proof."""

    lease: int
    code: Code


@dataclass(frozen=True)
class Reclaimed:
    """The proof that the writer has stopped. `reason` says why, if the request was still wanted."""

    lease: int
    proof: Proof
    reason: str = ""
    code: Code = "handoff_failed"


@dataclass(frozen=True)
class Verify:
    """Compare `layers` of `pages` with `digests` and report with `verified`."""

    lease: int
    pages: tuple[int, ...]
    layers: range
    digests: tuple[int, ...]


@dataclass(frozen=True)
class Ask:
    """Send `message` to the peer `agent`."""

    agent: str
    message: Release | Ping


@dataclass(frozen=True)
class Rejected:
    """A message that fits no lease of ours: stale epoch, stranger, duplicate."""

    agent: str
    lease: int
    why: str


Effect = Settled | Fenced | Reclaimed | Verify | Ask | Rejected


@dataclass
class _Lease:
    writer: str
    deadline: float
    pages: tuple[int, ...]
    fenced: bool = False
    asked: float = 0.0
    written: int = 0  # pages the writer has announced, all layers of them
    layer: int = 0  # layers of the next `group` pages that it has announced
    group: int = 0
    announced: int = 0  # pieces of pages
    verified: int = 0  # pieces whose digests were right


class Holder:
    """All leases that this worker has granted and that still matter. Times are seconds of one monotonic clock.

    Its pages have `layers` layers. With `digests`, what is written counts only once its digest was right.
    """

    def __init__(self, epoch: int, layers: int, digests: bool = True) -> None:
        self.epoch = epoch
        self._layers = layers
        self.digests = digests
        self._leases: dict[int, _Lease] = {}
        self._heard: dict[str, float] = {}
        self._pinged: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._leases)

    @property
    def fenced(self) -> int:
        """Leases that wait for a proof."""
        return sum(lease.fenced for lease in self._leases.values())

    def grant(self, lease: int, writer: str, pages: Iterable[int], now: float, seconds: float) -> None:
        """Open `lease` of `pages` for the agent `writer`."""
        if lease in self._leases:
            raise ValueError(f"lease {lease} was granted already")
        self._leases[lease] = _Lease(writer, now + seconds, tuple(pages))
        self._heard.setdefault(writer, now)
        if not any(held.writer == writer for known, held in self._leases.items() if known != lease):
            self._heard[writer] = now

    def revoke(self, lease: int, now: float) -> Iterable[Effect]:
        """The request was aborted. Idempotent; a lease that has ended is left alone."""
        held = self._leases.get(lease)
        if held is None or held.fenced:
            return []
        return self._fence(lease, held, "lease_aborted", now)

    def heard(self, agent: str, now: float) -> None:
        """Any message at all came from `agent`."""
        self._heard[agent] = now

    def received(self, agent: str, message: Complete | Written | Stopped) -> Iterable[Effect]:
        """A writer's word."""
        held = self._leases.get(message.lease)
        if message.epoch != self.epoch:
            return [Rejected(agent, message.lease, f"stale epoch {message.epoch}, mine is {self.epoch}")]
        if held is None:
            return [Rejected(agent, message.lease, "no such lease")]
        if held.writer != agent:
            return [Rejected(agent, message.lease, f"the lease is {held.writer}'s")]
        if isinstance(message, Written):
            return self._written(agent, message, held)
        del self._leases[message.lease]
        if isinstance(message, Stopped):
            return [Reclaimed(message.lease, "acknowledged", message.reason)]
        if held.fenced:
            return [Reclaimed(message.lease, "acknowledged")]
        total = len(held.pages)
        if message.pages != total or held.written != total:
            why = f"the writer wrote {min(message.pages, held.written)} pages of {total}"
            return [Reclaimed(message.lease, "acknowledged", why)]
        if self.digests and held.verified != held.announced:
            why = f"{held.announced - held.verified} of {held.announced} pieces are not what {agent} sent"
            return [Reclaimed(message.lease, "acknowledged", why, "kv_digest_mismatch")]
        return [Settled(message.lease, message)]

    def verified(self, lease: int, right: int) -> None:
        """So many pieces of a `Verify` had the right digest."""
        held = self._leases.get(lease)
        if held is not None:
            held.verified += right

    def died(self, agent: str) -> Iterable[Effect]:
        """The transport reports the agent's death."""
        gone = [lease for lease, held in self._leases.items() if held.writer == agent]
        for lease in gone:
            del self._leases[lease]
        self._forget(agent)
        return [Reclaimed(lease, "writer_died", "the prefill worker died") for lease in gone]

    def tick(self, now: float) -> Iterable[Effect]:
        """Time passed: fence what has expired or whose writer is silent, and ask those that have not answered."""
        effects: list[Effect] = []
        waiting: set[str] = set()
        for lease, held in self._leases.items():
            if held.fenced:
                if now >= held.asked + RELEASE_INTERVAL:
                    held.asked = now
                    effects.append(Ask(held.writer, Release(lease, self.epoch)))
            elif now >= held.deadline:
                effects += self._fence(lease, held, "lease_expired", now)
            elif now >= self._heard[held.writer] + SILENCE:
                effects += self._fence(lease, held, "lease_writer_silent", now)
            else:
                waiting.add(held.writer)
        for writer in waiting:
            if now >= self._pinged.get(writer, 0.0) + PING_INTERVAL:
                self._pinged[writer] = now
                effects.append(Ask(writer, Ping(0, self.epoch)))
        return effects

    def _written(self, agent: str, message: Written, held: _Lease) -> Iterable[Effect]:
        first, count, layers = message.first, len(message.digests), range(*message.layers)
        pages = held.pages[first : first + count]
        if first != held.written or len(pages) != count or (held.layer and count != held.group):
            why = f"pages {first} to {first + count} of {len(held.pages)}, {held.written} were written"
            return [Rejected(agent, message.lease, why)]
        if not layers or layers.start != held.layer or layers.stop > self._layers:
            why = f"layers {layers.start} to {layers.stop} of {self._layers}, {held.layer} were written"
            return [Rejected(agent, message.lease, why)]
        held.layer, held.group = layers.stop, count
        held.announced += count
        if held.layer == self._layers:
            held.written += count
            held.layer = 0
        if held.fenced or not self.digests:
            return []
        return [Verify(message.lease, pages, layers, tuple(message.digests))]

    def _fence(self, lease: int, held: _Lease, code: Code, now: float) -> list[Effect]:
        held.fenced, held.asked = True, now
        return [Fenced(lease, code), Ask(held.writer, Release(lease, self.epoch))]

    def _forget(self, agent: str) -> None:
        self._heard.pop(agent, None)
        self._pinged.pop(agent, None)

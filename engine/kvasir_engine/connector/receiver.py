"""The decode side of a lease, as a pure state machine: who may still write into my pages?

    open    -> settled   the writer's `Complete` arrived, and every page's digest was right
    open    -> fenced    aborted, expired, or the writer is silent: nobody wants the pages, but it may still write
    open    -> stopped   the writer says it stopped, or is dead
    fenced  -> stopped   likewise, or its `Complete` came late

A fenced lease asks its writer again and again to stop; a timeout alone never frees a page. Each input returns
the effects that the caller must carry out, in order.

This is one rank's side: where several ranks of the writer write to it under a lease, each has its own part of it,
with a state of its own, and `rank_parts.py` makes one lease of all parts of all ranks. Pages are counted in the
blocks of `layout.py`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import msgspec

from kvasir_engine.connector.notifications import Complete, Ping, Pong, Release, Stopped, Written

RELEASE_INTERVAL = 0.25
PING_INTERVAL = 0.25
SILENCE = 2.0
"""Seconds of unanswered pings after which a writer is fenced: it may be stopped, or cut off."""

Proof = Literal["acknowledged", "writer_died", "never_connected"]
Code = Literal["handoff_failed", "kv_digest_mismatch", "lease_aborted", "lease_expired", "lease_writer_silent"]


class Settled(msgspec.Struct, frozen=True, tag=True):
    """The pages hold the prompt's KV and nobody writes them any more. `writer`: whose part, empty for all."""

    lease: int
    complete: Complete
    writer: str = ""


class Fenced(msgspec.Struct, frozen=True, tag=True):
    """The request of this lease has failed; its pages wait for the proof. `reason` as in Reclaimed."""

    lease: int
    code: Code
    writer: str = ""
    reason: str = ""


class Reclaimed(msgspec.Struct, frozen=True, tag=True):
    """The proof that the writer has stopped. `reason` says why, if the request was still wanted."""

    lease: int
    proof: Proof
    reason: str = ""
    code: Code = "handoff_failed"
    writer: str = ""


@dataclass(frozen=True)
class Verify:
    """Compare `layers` of `pages` with `digests` and report with `verified`."""

    lease: int
    writer: str
    pages: tuple[int, ...]
    layers: range
    digests: tuple[int, ...]


@dataclass(frozen=True)
class NotifyWriter:
    """Send `message` to the peer `agent`."""

    agent: str
    message: Release | Ping


class Rejected(msgspec.Struct, frozen=True, tag=True):
    """A message that fits no lease: stale epoch, stranger, wrong nonce, duplicate."""

    agent: str
    lease: int
    why: str


Effect = Settled | Fenced | Reclaimed | Verify | NotifyWriter | Rejected


@dataclass
class _Part:
    deadline: float
    pages: tuple[int, ...]
    nonce: int = 0
    fenced: bool = False
    asked: float = 0.0
    unanswered: int = 0  # pings of the writer since this part was granted, or since the writer was last heard
    written: int = 0  # pages the writer has announced, all layers of them
    layer: int = 0  # layers of the next `group` pages that it has announced
    group: int = 0
    announced: int = 0  # pieces of pages
    verified: int = 0  # pieces whose digests were right
    loan: bool = False  # to read: only `Stopped` or death ends it


_Key = tuple[int, str]  # lease, writer's agent


class Receiver:
    """All parts of leases that this rank has granted and that still matter. Times: seconds of one monotonic clock.

    Its pages have `layers` layers. With `digests`, what is written counts only once its digest was right.

    A writer's silence is counted in pings that it did not answer, for each part since it was granted. So neither
    what was between two leases nor a holder that stood still itself is the writer's silence.
    """

    def __init__(self, epoch: int, layers: int, digests: bool = True) -> None:
        self.epoch = epoch
        self._layers = layers
        self.digests = digests
        self._parts: dict[_Key, _Part] = {}
        self._pinged: dict[str, float] = {}  # the writers that were pinged just now, and when

    def __len__(self) -> int:
        return len(self._parts)

    def knows(self, agent: str) -> bool:
        """Whether a part is the agent's."""
        return any(writer == agent for _, writer in self._parts)

    @property
    def fenced(self) -> int:
        """Parts that wait for a proof."""
        return sum(part.fenced for part in self._parts.values())

    def grant(
        self, lease: int, writer: str, pages: Iterable[int], now: float, seconds: float, nonce: int = 0
    ) -> None:
        """Open `lease` of `pages` for the agent `writer`, whose words count only with the `nonce`."""
        key = lease, writer
        if key in self._parts:
            raise ValueError(f"lease {lease} was granted to {writer} already")
        self._parts[key] = _Part(now + seconds, tuple(pages), nonce)

    def lend(self, loan: int, reader: str, now: float, seconds: float, nonce: int = 0) -> None:
        """Open `loan` for the agent `reader`. `Stopped` or its death ends it; nothing settles it."""
        self.grant(loan, reader, (), now, seconds, nonce)
        self._parts[loan, reader].loan = True

    def has(self, lease: int, agent: str) -> bool:
        """Whether the agent's part of a lease or loan has not ended."""
        return (lease, agent) in self._parts

    def wants(self, lease: int, agent: str) -> bool:
        """Whether the agent may go on, or begin. A writer that asks while it is fenced must not be told to begin:
        what it said before, that it writes no more, may arrive after its question."""
        part = self._parts.get((lease, agent))
        return part is not None and not part.fenced

    def revoke(self, lease: int, now: float) -> Iterable[Effect]:
        """The request was aborted. Idempotent; a part that has ended is left alone."""
        open_ = [key for key, part in self._parts.items() if key[0] == lease and not part.fenced]
        return [effect for key in open_ for effect in self._fence(key, "lease_aborted", now)]

    def heard(self, agent: str, message: Ping | Pong) -> Iterable[Effect]:
        """The agent lives, if it is who has the lease or loan that it names: only its nonce says so."""
        part = self._parts.get((message.lease, agent))
        if part is None or message.epoch != self.epoch:
            return []
        if part.nonce != message.nonce:
            return [_wrong_nonce(agent, message.lease)]
        self._lives(agent)
        return []

    def received(self, agent: str, message: Complete | Written | Stopped) -> Iterable[Effect]:
        """A writer's word."""
        lease = message.lease
        if message.epoch != self.epoch:
            return [Rejected(agent, lease, f"stale epoch {message.epoch}, mine is {self.epoch}")]
        part = self._parts.get((lease, agent))
        if part is None:
            writers = [writer for known, writer in self._parts if known == lease]
            why = f"the lease is {writers[0]}'s" if writers else "no such lease"
            return [Rejected(agent, lease, why)]
        if part.nonce != message.nonce:
            return [_wrong_nonce(agent, lease)]
        self._lives(agent)
        if part.loan and not isinstance(message, Stopped):
            return [Rejected(agent, lease, "the lease is to read, not to write")]
        if isinstance(message, Written):
            return self._written(agent, message, part)
        del self._parts[lease, agent]
        if isinstance(message, Stopped):
            return [Reclaimed(lease, "acknowledged", message.reason, writer=agent)]
        if part.fenced:
            return [Reclaimed(lease, "acknowledged", writer=agent)]
        total = len(part.pages)
        if message.pages != total or part.written != total:
            why = f"the writer wrote {min(message.pages, part.written)} pages of {total}"
            return [Reclaimed(lease, "acknowledged", why, writer=agent)]
        if self.digests and part.verified != part.announced:
            why = f"{part.announced - part.verified} of {part.announced} pieces are not what {agent} sent"
            return [Reclaimed(lease, "acknowledged", why, "kv_digest_mismatch", agent)]
        return [Settled(lease, message, agent)]

    def verified(self, lease: int, writer: str, right: int) -> None:
        """So many pieces of a `Verify` had the right digest."""
        part = self._parts.get((lease, writer))
        if part is not None:
            part.verified += right

    def died(self, agent: str) -> Iterable[Effect]:
        """The transport reports the agent's death."""
        gone = [lease for lease, writer in self._parts if writer == agent]
        for lease in gone:
            del self._parts[lease, agent]
        self._pinged.pop(agent, None)
        return [Reclaimed(lease, "writer_died", "the prefill worker died", writer=agent) for lease in gone]

    def tick(self, now: float) -> Iterable[Effect]:
        """Time passed: fence what has expired or whose writer is silent, and ask those that have not answered."""
        effects: list[Effect] = []
        self._pinged = {writer: at for writer, at in self._pinged.items() if now < at + PING_INTERVAL}
        due: dict[str, tuple[int, int]] = {}
        for key, part in self._parts.items():
            lease, writer = key
            if part.fenced:
                if now >= part.asked + RELEASE_INTERVAL:
                    part.asked = now
                    effects.append(NotifyWriter(writer, Release(lease, self.epoch, nonce=part.nonce)))
            elif now >= part.deadline:
                effects += self._fence(key, "lease_expired", now)
            elif writer in self._pinged:
                continue
            elif part.unanswered * PING_INTERVAL >= SILENCE:
                effects += self._fence(key, "lease_writer_silent", now)
            else:
                part.unanswered += 1
                due[writer] = lease, part.nonce
        for writer, (lease, nonce) in due.items():
            self._pinged[writer] = now
            effects.append(NotifyWriter(writer, Ping(lease, self.epoch, nonce)))
        return effects

    def _lives(self, writer: str) -> None:
        """The writer has said something: whatever it was pinged by is answered."""
        for (_, known), part in self._parts.items():
            if known == writer:
                part.unanswered = 0

    def _written(self, agent: str, message: Written, part: _Part) -> Iterable[Effect]:
        first, count, layers = message.first, len(message.digests), range(*message.layers)
        pages = part.pages[first : first + count]
        if first != part.written or len(pages) != count or (part.layer and count != part.group):
            why = f"pages {first} to {first + count} of {len(part.pages)}, {part.written} were written"
            return [Rejected(agent, message.lease, why)]
        if not layers or layers.start != part.layer or layers.stop > self._layers:
            why = f"layers {layers.start} to {layers.stop} of {self._layers}, {part.layer} were written"
            return [Rejected(agent, message.lease, why)]
        part.layer, part.group = layers.stop, count
        part.announced += count
        if part.layer == self._layers:
            part.written += count
            part.layer = 0
        if part.fenced or not self.digests:
            return []
        return [Verify(message.lease, agent, pages, layers, tuple(message.digests))]

    def _fence(self, key: _Key, code: Code, now: float) -> list[Effect]:
        lease, writer = key
        part = self._parts[key]
        part.fenced, part.asked = True, now
        return [Fenced(lease, code, writer), NotifyWriter(writer, Release(lease, self.epoch, nonce=part.nonce))]


def _wrong_nonce(agent: str, lease: int) -> Rejected:
    return Rejected(agent, lease, "wrong nonce: it is not from who has the lease")

"""The prefill side of a lease, as a pure state machine: what may I still write into another worker's pages?

    open      -> done      all writes have ended, and `Complete` is sent
    open      -> stopping  withdrawn, released by the holder, or past the deadline by our clock
    stopping  -> stopped   the writes under way have ended; then, and only then, `Stopped` is sent

A few writes of a lease may be under way at a time. `Written` is sent when a page's last layer and all writes before
it have ended, so neither it nor `Complete` overtakes bytes. A lease that ended leaves a tombstone: a `Release` that
arrives before the prompt does refuses the prompt. Each input returns the effects that the caller must carry out,
in order.
"""

from collections import OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from kvasir_engine.transfer.messages import Complete, Release, Stopped

TOMBSTONES = 65536
WINDOW = 8
"""Most writes of a lease under way at once."""

Key = tuple[str, int]  # holder's agent, lease id


@dataclass(frozen=True, eq=False)
class Push:
    """Pages to copy: ours to theirs, one to one, of one layer or (`layer` None) of all.

    `last`: with it, all layers of its pages are pushed. `final`: and all pages of the lease. `complete` comes by
    itself, when there is nothing to copy any more.
    """

    local: tuple[int, ...] = ()
    remote: tuple[int, ...] = ()
    layer: int | None = None
    last: bool = True
    final: bool = False
    complete: Complete | None = None


@dataclass(frozen=True)
class Post:
    """Start writing `push` for lease `key`; report its end with `ended`."""

    key: Key
    push: Push


@dataclass(frozen=True)
class Announce:
    """Tell the holder that the pages of `push`, which are the lease's from place `first` on, are written."""

    key: Key
    epoch: int
    first: int
    push: Push


@dataclass(frozen=True)
class Done:
    """The pages of `push`, all layers, have been written and are no longer read."""

    key: Key
    push: Push


@dataclass(frozen=True)
class Failed:
    """The lease has ended early: none of its pages is read or written any more."""

    key: Key
    reason: str


@dataclass(frozen=True)
class Tell:
    """Send `message` to the peer `agent`."""

    agent: str
    message: Stopped | Complete


Effect = Post | Announce | Done | Failed | Tell


@dataclass
class _Lease:
    epoch: int
    deadline: float
    queue: deque[Push] = field(default_factory=deque)
    posted: list[Push] = field(default_factory=list)
    announced: int = 0
    stopping: str = ""


class Writer:
    """All leases under which this worker may write. Times are seconds of one monotonic clock."""

    def __init__(self) -> None:
        self._leases: dict[Key, _Lease] = {}
        self._ended: OrderedDict[tuple[str, int, int], str] = OrderedDict()

    def __len__(self) -> int:
        return len(self._leases)

    def open(self, key: Key, epoch: int, deadline: float) -> Iterable[Effect]:
        """Begin to write under a lease. Fails at once if the lease has ended already."""
        ended = self._ended.get((*key, epoch))
        if key in self._leases or ended is not None:
            return [Failed(key, ended or "the lease is in use")]
        self._leases[key] = _Lease(epoch, deadline)
        return []

    def push(self, key: Key, push: Push, now: float) -> Iterable[Effect]:
        """More is computed. Ignored when the lease is ending or has ended: `Failed` says so."""
        lease = self._leases.get(key)
        if lease is None or lease.stopping:
            return []
        lease.queue.append(push)
        return self._advance(key, lease, now)

    def ended(self, key: Key, push: Push, ok: bool, now: float) -> Iterable[Effect]:
        """A write under way has ended."""
        lease = self._leases.get(key)
        if lease is None or push not in lease.posted:
            return []
        lease.posted.remove(push)
        if not ok:
            lease.stopping = lease.stopping or "a write failed"
        effects: list[Effect] = []
        if push.last and not lease.stopping:
            effects += [Announce(key, lease.epoch, lease.announced, push), Done(key, push)]
            lease.announced += len(push.local)
        return effects + self._advance(key, lease, now)

    def withdraw(self, key: Key, reason: str, now: float) -> Iterable[Effect]:
        """The request was aborted here. Idempotent."""
        lease = self._leases.get(key)
        if lease is None or lease.stopping:
            return []
        lease.stopping = reason
        return self._advance(key, lease, now)

    def released(self, agent: str, message: Release, now: float) -> Iterable[Effect]:
        """The holder wants its pages back. Answered with `Stopped` in any case, at once or after the last write."""
        key = (agent, message.lease)
        lease = self._leases.get(key)
        if lease is None or lease.epoch != message.epoch:
            self._remember((*key, message.epoch), "released by the decode worker")
            return [Tell(agent, Stopped(message.lease, message.epoch, "unknown or ended"))]
        return self.withdraw(key, "released by the decode worker", now)

    def died(self, agent: str) -> Iterable[Effect]:
        """The transport reports the holder's death; writes under way have ended with it."""
        gone = [key for key in self._leases if key[0] == agent]
        for key in gone:
            self._bury(key, self._leases[key], "the decode worker died")
        return [Failed(key, "the decode worker died") for key in gone]

    def tick(self, now: float) -> Iterable[Effect]:
        """Time passed: leases past their deadline stop, whatever the holder thinks."""
        late = [k for k, lease in self._leases.items() if now >= lease.deadline and not lease.stopping]
        return [effect for key in late for effect in self.withdraw(key, "the lease expired", now)]

    def _advance(self, key: Key, lease: _Lease, now: float) -> list[Effect]:
        if not lease.stopping and now >= lease.deadline:
            lease.stopping = "the lease expired"
        if lease.stopping:
            if lease.posted:
                return []
            self._bury(key, lease, lease.stopping)
            return [Failed(key, lease.stopping), Tell(key[0], Stopped(key[1], lease.epoch, lease.stopping))]
        effects: list[Effect] = []
        while lease.queue and len(lease.posted) < WINDOW:
            push = lease.queue[0]
            # A page's last layer waits for the layers before it, so that its end is the page's.
            if lease.posted and (push.last or push.complete is not None):
                break
            lease.queue.popleft()
            if push.complete is not None:
                self._bury(key, lease, "the lease is complete")
                return [*effects, Tell(key[0], push.complete), Done(key, push)]
            lease.posted.append(push)
            effects.append(Post(key, push))
            if push.last:
                break
        return effects

    def _bury(self, key: Key, lease: _Lease, reason: str) -> None:
        del self._leases[key]
        self._remember((*key, lease.epoch), reason)

    def _remember(self, tombstone: tuple[str, int, int], reason: str) -> None:
        self._ended[tombstone] = reason
        if len(self._ended) > TOMBSTONES:
            self._ended.popitem(last=False)

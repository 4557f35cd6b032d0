"""The prefill side of a lease, as a pure state machine: what may I still write into another worker's pages?

    open      -> done      all writes have ended, and `Complete` is sent
    open      -> stopping  withdrawn, released by the holder, or past the deadline by our clock
    stopping  -> stopped   the writes under way have ended; then, and only then, `Stopped` is sent

A few writes of a lease may be under way at a time. Each is announced with `Written` once it and all writes before
it have ended, so neither that nor `Complete` overtakes bytes. Layers that are computed faster than they are written
go together: some layers of a page are one piece of memory, and cost less than a write each. A lease that ended
leaves a tombstone. A `Release` that arrives before the prompt refuses the prompt, as long as it is remembered: who
says it cannot be known, so it never takes a tombstone's place. Whom it does not refuse the holder refuses, who is
asked before the first byte. Each input returns the effects that the caller must carry out, in order.
"""

from collections import OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice

import msgspec

from kvasir_engine.connector.notifications import Complete, Ping, Release, Stopped
from kvasir_engine.connector.receiver import Rejected

TOMBSTONES = 65536
"""Of leases that were open here."""
EARLY = 4096
"""Releases of leases that were not: anybody may have sent them."""
PING_INTERVAL = 0.25
WINDOW = 8
"""Most writes of a lease under way at once."""
PIECES = 256
"""Most layers of pages that go in one write where layers go together: it bounds how long a post can block."""

Key = tuple[str, int]  # holder's agent, lease id
_Tombstone = tuple[str, int, int, int]  # the same, epoch, nonce


class Push(msgspec.Struct, frozen=True, eq=False, weakref=True):
    """Pages to copy: ours to theirs, one to one, of one layer or (`layer` None) of all. Layers come in order.

    Pages are counted in the blocks of `layout.py`. `number` names the push between the ranks of a worker.
    `final`: with it, all pages of the lease are pushed. `complete` comes by itself, when there is nothing to copy
    any more.
    """

    local: tuple[int, ...] = ()
    remote: tuple[int, ...] = ()
    layer: int | None = None
    final: bool = False
    complete: Complete | Stopped | None = None
    number: int = 0


LayerPush = tuple[Key, Push]
"""The push of a lease's last layer, from which those of the earlier layers follow."""


@dataclass(frozen=True)
class Post:
    """Start writing `layers` of the pages of `push` for lease `key`, or reading them; `ended` reports its end."""

    key: Key
    push: Push
    layers: range
    reads: bool = False


@dataclass(frozen=True)
class Announce:
    """Tell the holder that `layers` of the pages of `push`, the lease's from place `first` on, are written."""

    key: Key
    epoch: int
    first: int
    push: Push
    layers: range
    nonce: int = 0


@dataclass(frozen=True)
class Done:
    """The pages of `push`, all layers, have been written and are no longer read."""

    key: Key
    push: Push


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The lease has ended early: none of its pages is read or written any more."""

    key: Key
    reason: str


@dataclass(frozen=True)
class NotifyHolder:
    """Send `message` to the peer `agent`."""

    agent: str
    message: Stopped | Complete | Ping


Effect = Post | Announce | Done | Failed | NotifyHolder | Rejected


@dataclass
class _Write:
    push: Push
    layers: range
    ended: bool = False


@dataclass
class _Lease:
    epoch: int
    deadline: float
    nonce: int = 0
    queue: deque[Push] = field(default_factory=deque)
    posted: deque[_Write] = field(default_factory=deque)  # and not announced
    announced: int = 0
    stopping: str = ""
    reading: bool = False


class Sender:
    """All leases under which this worker may write its pages of `layers` layers.

    Times are seconds of one monotonic clock.
    """

    def __init__(self, layers: int) -> None:
        self._layers = layers
        self._leases: dict[Key, _Lease] = {}
        self._ended: OrderedDict[_Tombstone, str] = OrderedDict()
        self._early: OrderedDict[_Tombstone, str] = OrderedDict()
        self._pinged: dict[str, float] = {}
        self._together: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._leases)

    def together(self, agent: str, layers: int) -> None:
        """From now on so many layers go to the agent in one write, and those of a write are all computed first."""
        self._together[agent] = layers

    def knows(self, agent: str) -> bool:
        """Whether a lease is the agent's."""
        return any(holder == agent for holder, _ in self._leases)

    def nonce_of(self, key: Key) -> int | None:
        """That of a lease or loan that is open; None of another."""
        lease = self._leases.get(key)
        return None if lease is None else lease.nonce

    def open(
        self, key: Key, epoch: int, deadline: float, reading: bool = False, nonce: int = 0
    ) -> Iterable[Effect]:
        """Begin to write under a lease, or to read under a loan. Fails at once if it has ended already.

        What is pushed under a loan is read, from `remote` to `local`; nothing is announced.
        """
        tombstone = (*key, epoch, nonce)
        ended = self._ended.get(tombstone, self._early.get(tombstone))
        if key in self._leases or ended is not None:
            return [Failed(key, ended or "the lease is in use")]
        self._leases[key] = _Lease(epoch, deadline, nonce, reading=reading)
        return []

    def push(self, key: Key, push: Push, now: float) -> Iterable[Effect]:
        """More is computed. Ignored when the lease is ending or has ended: `Failed` says so."""
        lease = self._leases.get(key)
        if lease is None or lease.stopping:
            return []
        lease.queue.append(push)
        return self._advance(key, lease, now)

    def ended(self, key: Key, push: Push, ok: bool, now: float) -> Iterable[Effect]:
        """A write under way has ended. `push` as posted."""
        lease = self._leases.get(key)
        write = None if lease is None else next((each for each in lease.posted if each.push is push), None)
        if lease is None or write is None:
            return []
        write.ended = True
        if not ok:
            lease.stopping = lease.stopping or ("a read failed" if lease.reading else "a write failed")
        effects: list[Effect] = []
        while lease.posted and lease.posted[0].ended:
            write = lease.posted.popleft()
            if lease.stopping:
                continue
            if not lease.reading:
                effects.append(Announce(key, lease.epoch, lease.announced, write.push, write.layers, lease.nonce))
            if write.layers.stop == self._layers:
                effects.append(Done(key, write.push))
                lease.announced += len(write.push.local)
        return effects + self._advance(key, lease, now)

    def withdraw(self, key: Key, reason: str, now: float) -> Iterable[Effect]:
        """The request was aborted here. Idempotent."""
        lease = self._leases.get(key)
        if lease is None or lease.stopping:
            return []
        lease.stopping = reason
        return self._advance(key, lease, now)

    def released(self, agent: str, message: Release, now: float) -> Iterable[Effect]:
        """The holder wants its pages back. Answered with `Stopped` in any case, at once or after the last write.

        Who does not know the nonce of a lease is not its holder. That of a lease that is not known is remembered:
        the prompt that comes with another one is not refused.
        """
        key = (agent, message.lease)
        lease = self._leases.get(key)
        if lease is None or lease.epoch != message.epoch:
            early = (*key, message.epoch, message.nonce)
            _remember(self._early, early, "released by the decode worker", EARLY)
            said = Stopped(message.lease, message.epoch, "unknown or ended", message.nonce)
            return [NotifyHolder(agent, said)]
        if lease.nonce != message.nonce:
            return [Rejected(agent, message.lease, "wrong nonce: it is not from who granted the lease")]
        return self.withdraw(key, "released by the decode worker", now)

    def died(self, agent: str) -> Iterable[Effect]:
        """The transport reports the holder's death; writes under way have ended with it."""
        gone = [key for key in self._leases if key[0] == agent]
        for key in gone:
            self._bury(key, self._leases[key], "the decode worker died")
        self._pinged.pop(agent, None)
        self._together.pop(agent, None)
        return [Failed(key, "the decode worker died") for key in gone]

    def tick(self, now: float) -> Iterable[Effect]:
        """Time passed: leases past their deadline stop, whatever the holder thinks. Lenders are pinged.

        A reader waits for its lender's word before it reads: the lender's death, which is seen when it is told
        something, must not have to wait for the deadline.
        """
        late = [k for k, lease in self._leases.items() if now >= lease.deadline and not lease.stopping]
        effects = [effect for key in late for effect in self.withdraw(key, "the lease expired", now)]
        lenders = {agent: (loan, lease) for (agent, loan), lease in self._leases.items() if lease.reading}
        for agent, (loan, lease) in lenders.items():
            if now >= self._pinged.get(agent, 0.0) + PING_INTERVAL:
                self._pinged[agent] = now
                effects.append(NotifyHolder(agent, Ping(loan, lease.epoch, lease.nonce)))
        return effects

    def _advance(self, key: Key, lease: _Lease, now: float) -> list[Effect]:
        if not lease.stopping and now >= lease.deadline:
            lease.stopping = "the lease expired"
        if lease.stopping:
            if lease.posted:
                return []
            self._bury(key, lease, lease.stopping)
            said = Stopped(key[1], lease.epoch, lease.stopping, lease.nonce)
            return [Failed(key, lease.stopping), NotifyHolder(key[0], said)]
        effects: list[Effect] = []
        while lease.queue and len(lease.posted) < WINDOW:
            push = lease.queue[0]
            if push.complete is not None:
                if lease.posted:
                    break
                self._bury(key, lease, "the lease is complete")
                return [*effects, NotifyHolder(key[0], push.complete), Done(key, push)]
            write = self._next_write(lease.queue, self._together.get(key[0], 1))
            if write is None:
                break
            lease.posted.append(write)
            effects.append(Post(key, write.push, write.layers, lease.reading))
        return effects

    def _next_write(self, queue: deque[Push], together: int) -> _Write | None:
        """Take the next push from the queue, and with it the next layers of the same pages that are there.

        None while some of the layers that are to go `together` are not.
        """
        push = queue[0]
        if push.layer is None:
            return _Write(queue.popleft(), range(self._layers))
        # The layer that comes next is never another page's: those begin with layer 0.
        there = 1
        for following in islice(queue, 1, None):
            if following.layer != push.layer + there:
                break
            there += 1
        wanted = min((push.layer // together + 1) * together, self._layers) - push.layer
        if there < wanted and there == len(queue):
            return None
        count = min(there, max(wanted, PIECES // max(1, len(push.local))))
        layers = range(push.layer, push.layer + count)
        for _ in layers:
            push = queue.popleft()
        return _Write(push, layers)

    def _bury(self, key: Key, lease: _Lease, reason: str) -> None:
        del self._leases[key]
        _remember(self._ended, (*key, lease.epoch, lease.nonce), reason, TOMBSTONES)


def _remember(ended: OrderedDict[_Tombstone, str], tombstone: _Tombstone, reason: str, most: int) -> None:
    ended[tombstone] = reason
    if len(ended) > most:
        ended.popitem(last=False)

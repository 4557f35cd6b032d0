"""Two engines and the wire between their transfer threads, one event at a time, on a clock that tests turn.

The lease machines are the real ones; what `Handoff` does on a thread with NIXL happens here when a test says so.
A write spoils a page when it begins and copies when it ends, so whoever reads or reuses a page under it is caught.
"""

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from toy import LAYERS, LateRunner, ToyRunner

from kvasir_engine.connector import notifications, receiver, sender
from kvasir_engine.connector.commands import AnyCommand, Grant, Lend, Open, Read, Revoke, Withdraw
from kvasir_engine.connector.kv_connector import KVConnector
from kvasir_engine.connector.receiver import Receiver
from kvasir_engine.connector.sender import Key, Push, Sender
from kvasir_engine.connector.stats import TransferStats
from kvasir_engine.connector.transfer_thread import TransferThread
from kvasir_engine.core.engine import Engine
from kvasir_engine.core.grammar_service import GrammarService
from kvasir_engine.core.scheduler import Limits
from kvasir_engine.kv.pages import Owner
from kvasir_engine.protocol import Endpoint, Fingerprint, Region

FINGERPRINT = Fingerprint("toy", "", "int64", "toy", 4, 1, 1, 1, "toy")


class Worker:
    """An engine with a transfer side that waits to be moved."""

    def __init__(
        self,
        network: "Network",
        role: Any,
        name: str,
        pages: int,
        limits: Limits,
        overlap: bool = False,
        grammars: GrammarService | None = None,
    ) -> None:
        self.network = network
        self.name = name
        self.runner = (LateRunner if overlap else ToyRunner)(pages, limits.page_size)
        epoch = network.next_epoch()
        region = Region(self.runner.pool.address, pages, self.runner.pool.page_bytes)
        self.endpoint = Endpoint(f"{name}-{epoch}", epoch, b"", region, FINGERPRINT)
        self.holder, self.writer = Receiver(epoch, LAYERS), Sender(LAYERS)
        self.commands: deque[Callable[[float], Iterable[Any]]] = deque()
        self.events: deque[Any] = deque()
        self.writes: list[tuple[Key, Push, range]] = []
        self.lent: dict[Key, dict[int, int]] = {}  # digests that came with loans to us
        self.stats = TransferStats()
        self.reads: dict[Key, list[Push]] = {}  # loans that we read under; what waits for their digests
        connector = KVConnector(self)  # type: ignore[arg-type]
        self.engine = Engine(self.runner, role, limits, 64, epoch, connector, overlap=overlap, grammars=grammars)  # type: ignore[arg-type]
        network.workers[self.endpoint.agent] = self

    # -- the interface of TransferThread

    push_layers = TransferThread.push_layers

    def is_alive(self) -> bool:
        return True

    def command(self, command: AnyCommand) -> None:
        self.commands.append(lambda now: self._obey(command, now))

    def push(self, key: Key, push: Push) -> None:
        def command(now: float) -> Iterable[Any]:
            if key in self.reads and key not in self.lent:
                self.reads[key].append(push)
                return []
            return self.writer.push(key, push, now)

        self.commands.append(command)

    def _obey(self, command: AnyCommand, now: float) -> Iterable[Any]:
        match command:
            case Grant(lease, to):
                if to.agent not in self.network.workers:
                    return [receiver.Reclaimed(lease.id, "writer_died", "dead", writer=to.agent)]
                self.holder.grant(lease.id, to.agent, lease.pages, now, lease.seconds, lease.nonce)
                return []
            case Revoke(granted):
                return self.holder.revoke(granted, now)
            case Open(to, lease):
                key = (to.agent, lease.id)
                if to.agent not in self.network.workers:
                    return [sender.Failed(key, "dead")]
                return self.writer.open(key, lease.epoch, now + lease.seconds, nonce=lease.nonce)
            case Withdraw(key, reason):
                return self.writer.withdraw(key, reason, now)
            case Lend(loan, to):
                if to.agent not in self.network.workers:
                    return [receiver.Reclaimed(loan.id, "writer_died", "dead", writer=to.agent)]
                self.holder.lend(loan.id, to.agent, now, loan.seconds, loan.nonce)
                digests = self.digests(loan.pages, range(LAYERS))
                self._send(to.agent, notifications.Lent(loan.id, loan.epoch, loan.pages, digests, loan.nonce))
                return []
            case Read(to, loan):
                key = (to.agent, loan.id)
                self.reads[key] = []
                if to.agent not in self.network.workers:
                    return [sender.Failed(key, "dead")]
                return self.writer.open(key, loan.epoch, now + loan.seconds, True, loan.nonce)

    # -- what a test can make happen

    def obey(self) -> None:
        """The transfer thread takes its commands."""
        while self.commands:
            self._apply(self.commands.popleft()(self.network.now))

    def hear(self) -> None:
        """The next message from any peer arrives."""
        inbox = self.network.inbox(self.endpoint.agent)
        if inbox:
            sender, message = inbox.popleft()
            self.obey()
            match message:
                case notifications.Release():
                    self._apply(self.writer.released(sender, message, self.network.now))
                case notifications.Ping(lease, epoch, nonce):
                    if self.holder.has(lease, sender):
                        self._apply(self.holder.heard(sender, message, self.network.now))
                    self._send(sender, notifications.Pong(lease, epoch, nonce))
                case notifications.Pong():
                    self._apply(self.holder.heard(sender, message, self.network.now))
                case notifications.Lent(lease, _, pages, digests):
                    self.lent[sender, lease] = dict(zip(pages, digests, strict=True))
                    waiting = self.reads.get((sender, lease), [])
                    while waiting:
                        self._apply(self.writer.push((sender, lease), waiting.pop(0), self.network.now))
                case _:
                    self._apply(self.holder.received(sender, message, self.network.now))

    def end_write(self, place: int = 0) -> None:
        """A write under way ends well: its bytes are there."""
        key, push, layers = self.writes.pop(place)
        target = self.network.workers.get(key[0])
        if target is None:
            self._apply(self.writer.died(key[0]))
            return
        if key in self.reads:
            for mine, theirs in zip(push.local, push.remote, strict=True):
                self.runner.pool.tensor[mine] = target.runner.pool.tensor[theirs]
            right = self.digests(push.local, layers) == [self.lent[key][page] for page in push.remote]
            self._apply(self.writer.ended(key, push, right, self.network.now))
            return
        for mine, theirs in zip(push.local, push.remote, strict=True):
            target.runner.pool.tensor[theirs, _slice(layers)] = self.runner.pool.tensor[mine, _slice(layers)]
        self._apply(self.writer.ended(key, push, True, self.network.now))

    def tick(self) -> None:
        """The transfer thread looks at the clock."""
        self._apply([*self.holder.tick(self.network.now), *self.writer.tick(self.network.now)])

    def learn(self) -> None:
        """The engine takes what its transfer thread reported."""
        while self.events:
            self.engine.reported(0, self.events.popleft())

    def check(self) -> None:
        """Raise unless every page has its owner, and what is read or written by a write has the right one."""
        self.engine.check()
        for key, push, _ in self.writes:
            if key in self.reads:
                self.check_read(key, push)
                continue
            for page in push.local:
                assert self.engine.cache.pool.owner(page) is Owner.HELD, f"page {page} is read, and nobody holds it"
            target = self.network.workers.get(key[0])
            if target is not None:
                for page in push.remote:
                    owner = target.engine.cache.pool.owner(page)
                    assert owner in (Owner.LEASED, Owner.FENCED), f"page {page} is written, and is {owner.name}"

    def check_read(self, key: Key, push: Push) -> None:
        """Raise unless what a read under way reads is held and as it was lent, and what it writes is held."""
        for page in push.local:
            assert self.engine.cache.pool.owner(page) is Owner.HELD, f"page {page} is read into, nobody holds it"
        target = self.network.workers.get(key[0])
        if target is not None:
            for page in push.remote:
                assert target.engine.cache.pool.owner(page) is Owner.HELD, f"page {page} is lent, nobody holds it"
            lent = [self.lent[key][page] for page in push.remote]
            assert target.digests(push.remote, range(LAYERS)) == lent, "what is lent has changed"

    def peer_died(self, agent: str) -> None:
        """The transport reports a death."""
        self.writes = [write for write in self.writes if write[0][0] != agent]
        self._apply([*self.holder.died(agent), *self.writer.died(agent)])

    def _apply(self, effects: Iterable[Any]) -> None:
        for effect in effects:
            match effect:
                case sender.Post(key, push, layers):
                    self.writes.append((key, push, layers))
                    if key in self.reads:
                        for page in push.local:
                            self.runner.pool.tensor[page] = -1
                        continue
                    target = self.network.workers.get(key[0])
                    if target is not None:  # the write has begun: what it writes to is not what it was
                        for page in push.remote:
                            target.runner.pool.tensor[page, _slice(layers)] = -1
                case sender.Announce((agent, lease), epoch, first, push, layers, nonce):
                    digests = self.digests(push.local, layers)
                    span = layers.start, layers.stop
                    self._send(agent, notifications.Written(lease, epoch, first, span, digests, nonce))
                case receiver.Verify(lease, agent, pages, layers, digests):
                    right = sum(a == b for a, b in zip(self.digests(pages, layers), digests, strict=True))
                    self.holder.verified(lease, agent, right)
                case receiver.NotifyWriter(agent, message) | sender.NotifyHolder(agent, message):
                    self._send(agent, message)
                case _:
                    if isinstance(effect, sender.Failed) or (
                        isinstance(effect, sender.Done) and effect.push.complete is not None
                    ):
                        self.reads.pop(effect.key, None)
                        self.lent.pop(effect.key, None)
                    self.events.append(effect)

    def _send(self, agent: str, message: notifications.AnyMessage) -> None:
        if agent in self.network.workers:
            self.network.inbox(agent).append((self.endpoint.agent, message))
        else:
            self._apply([*self.holder.died(agent), *self.writer.died(agent)])

    def digests(self, pages: Iterable[int], layers: range) -> list[int]:
        """What these layers of the pages hold, as one number each page."""
        pool = self.runner.pool.tensor[:, _slice(layers)]
        return [hash(tuple(pool[page].flatten().tolist())) for page in pages]


def _slice(layers: range) -> slice:
    return slice(layers.start, layers.stop)


class Network:
    """The workers that live, and the messages between them."""

    def __init__(self) -> None:
        self.now = 0.0
        self.workers: dict[str, Worker] = {}
        self._inboxes: dict[str, deque[tuple[str, notifications.AnyMessage]]] = {}
        self._epochs = 0

    def next_epoch(self) -> int:
        self._epochs += 1
        return self._epochs

    def inbox(self, agent: str) -> deque[tuple[str, notifications.AnyMessage]]:
        return self._inboxes.setdefault(agent, deque())

    def kill(self, worker: Worker, seen: bool = True) -> None:
        """The process is gone, with its writes and what it had not sent. Not `seen`: until it is told something."""
        del self.workers[worker.endpoint.agent]
        self._inboxes.pop(worker.endpoint.agent, None)
        for other in self.workers.values():
            if seen:
                other.peer_died(worker.endpoint.agent)

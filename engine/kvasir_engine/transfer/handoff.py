"""A rank's transfer thread: owns the NIXL agent, carries out what the lease machines decide, reports events.

Other threads call the methods, which never block; the events come through `emit`, from this thread. Of a peer's
ranks it grants to, and writes to, those that its own rank has a part of the KV in common with; events name them.
"""

import contextlib
import logging
import queue
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, fields

import msgspec

from kvasir_engine import faults
from kvasir_engine.protocol import Endpoint, Lease, Loan
from kvasir_engine.transfer import holder, messages, writer
from kvasir_engine.transfer.agent import Agent, PeerDied, Refused, Transfer
from kvasir_engine.transfer.commands import AnyCommand, Grant, Lend, Open, Read, Revoke, Withdraw
from kvasir_engine.transfer.digest import Digester
from kvasir_engine.transfer.holder import Holder
from kvasir_engine.transfer.layout import Cut, block_numbers, block_tokens, pairs
from kvasir_engine.transfer.messages import AnyMessage, Complete, Lent, Ping, Pong, Release, Written
from kvasir_engine.transfer.writer import Key, Push, Writer

log = logging.getLogger("transfer")

BUSY_WAIT = 0.0005
IDLE_WAIT = 0.02
LOANS = 1024
POST_TIME = 0.001
"""Seconds of posting after which the thread looks around: where a post blocks for its copy, one is enough."""

DIED = "the worker at the other end died"

Event = holder.Settled | holder.Fenced | holder.Reclaimed | holder.Rejected | writer.Done | writer.Failed
_Effect = Event | holder.Ask | holder.Verify | writer.Post | writer.Announce | writer.Tell
_Effects = Iterable[_Effect]


@dataclass
class HandoffStats:
    """Counters since the start; read by the metrics collector from another thread. Times in seconds."""

    writes: int = 0
    descriptors: int = 0
    write_seconds: float = 0.0
    digests: int = 0
    digest_seconds: float = 0.0
    digest_failures: int = 0
    peers_died: int = 0
    handoffs: int = 0
    exposed_seconds: float = 0.0
    sent_bytes: int = 0
    received_bytes: int = 0
    read_bytes: int = 0
    read_seconds: float = 0.0

    @property
    def read_rate(self) -> float:
        """Bytes a second of reads, from posting them to knowing that they are right; 0 before the first."""
        return self.read_bytes / self.read_seconds if self.read_seconds else 0.0

    def __add__(self, other: "HandoffStats") -> "HandoffStats":
        """The counters of two ranks, added up."""
        names = [each.name for each in fields(self)]
        return HandoffStats(**{name: getattr(self, name) + getattr(other, name) for name in names})


@dataclass(frozen=True)
class _Pushed:
    """A push on its way to the thread, and when its last layer was computed."""

    key: Key
    push: Push
    computed: float


@dataclass(frozen=True)
class _LoanDigested:
    """The digests of a loan's pages are known."""

    loan: Loan
    reader: str
    digests: "Future[_Digests]"


class _Wake:
    """Only ends the wait for a command."""


@dataclass
class _Opened:
    """A lease of another worker: the parts of it that this rank writes, and when the prompt's last layer was."""

    parts: list[Key]
    computed: float = 0.0


@dataclass
class _Read:
    """A loan of another worker that we read under; nothing is read before the digests are here."""

    digests: dict[int, int] | None
    waiting: list[Push] = field(default_factory=list)


_Command = AnyCommand | _Pushed | _LoanDigested | _Wake


@dataclass(eq=False)
class _Write:
    """A write, or a read, under way. It has ended when its bytes are there and its digests known.

    Those of a read are computed (`digests` None until then) once its bytes are there.
    """

    transfer: Transfer
    digests: "Future[_Digests] | None"
    began: float
    ok: bool | None = None


@dataclass(frozen=True)
class _Digests:
    values: list[int]
    seconds: float


class Handoff(threading.Thread):
    """Runs until `stop`. `make_agent` is called on the thread, which then owns the agent.

    `digest` computes the digests of pages of our pool, those of what is written beside the copy; None where digests
    are off. `intake`, on ranks other than 0, returns rank 0's commands that have arrived.
    """

    def __init__(
        self,
        make_agent: Callable[[], Agent],
        emit: Callable[[Event], None],
        digest: Digester | None,
        rank: int = 0,
        intake: Callable[[], list[AnyCommand]] | None = None,
    ) -> None:
        super().__init__(name="kvasir-transfer", daemon=True)
        self._make_agent = make_agent
        self._emit = emit
        self._digest = digest
        self._rank = rank
        self._intake = intake
        self._commands: queue.SimpleQueue[_Command | None] = queue.SimpleQueue()
        self._beside = ThreadPoolExecutor(1, "kvasir-digest")
        self._posts: deque[writer.Post] = deque()  # decided and not begun
        self._underway: dict[tuple[Key, Push], _Write] = {}
        self._digested: dict[tuple[Key, Push], list[int]] = {}  # of writes that have ended
        self._progressed = False
        self._reads: dict[Key, _Read] = {}
        self._lent: OrderedDict[Key, dict[int, int]] = OrderedDict()  # digests of loans that nobody reads yet
        self._opened: dict[Key, _Opened] = {}
        self._opened_as: dict[Key, Key] = {}  # the lease that a part is of
        self._ready = threading.Event()
        self._error: BaseException | None = None
        self._agent: Agent
        self._holder: Holder
        self._writer: Writer
        self._layers: int
        self.endpoint: Endpoint
        self.stats = HandoffStats()

    def start(self) -> None:
        """Start the thread and wait for the agent. Raises what its creation raised."""
        super().start()
        self._ready.wait()
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """Deregister the pool and end the thread."""
        self._commands.put(None)
        self.join()

    def command(self, command: AnyCommand) -> None:
        """Carry out a command."""
        self._commands.put(command)

    # -- the decode side

    def grant(self, lease: Lease, to: Endpoint, tokens: int = 0) -> None:
        """`to` may write the pages of `lease`, `tokens` (0: all) of them, until proof that it has stopped."""
        self.command(Grant(lease, to, tokens))

    def revoke(self, lease: int) -> None:
        """The request of `lease` was aborted: `Reclaimed` follows when its writer is proven stopped."""
        self.command(Revoke(lease))

    # -- the prefill side

    def open(self, to: Endpoint, lease: Lease) -> Key:
        """Begin to write under `lease`. The key names it in every later call and event."""
        self.command(Open(to, lease))
        return to.agent, lease.id

    def push(self, key: Key, push: Push) -> None:
        """Copy pages, after the earlier pushes of this lease. `Done` follows for whole pages, or `Failed`."""
        self._commands.put(_Pushed(key, push, time.perf_counter()))

    def withdraw(self, key: Key, reason: str) -> None:
        """Write no more under the lease. `Failed` follows when the writes under way have ended."""
        self.command(Withdraw(key, reason))

    # -- the thread

    def run(self) -> None:
        try:
            self._agent = self._make_agent()
            self.endpoint = self._agent.endpoint
            self._layers = layers = self.endpoint.fingerprint.layers
            self._holder, self._writer = (
                Holder(self.endpoint.epoch, layers, self._digest is not None),
                Writer(layers),
            )
        except BaseException as error:
            self._error = error
            return
        finally:
            self._ready.set()
        try:
            while self._turn():
                pass
        except Exception:
            log.exception("the transfer thread ends; the worker is unhealthy from now on")
        finally:
            self._beside.shutdown(cancel_futures=True)
            self._agent.close()

    def _turn(self) -> bool:
        busy = len(self._holder) or len(self._writer)
        commands = self._waiting(0.0 if self._progressed else BUSY_WAIT if busy else IDLE_WAIT)
        self._progressed = False
        # What has arrived is fetched before the last commands, and looked at after them: a grant must be known
        # before its writer's word, and a lease be open before its pushes, which come another way than commands.
        arrived = self._agent.notifications()
        ahead: list[AnyCommand] = []
        if self._intake is None:
            commands += self._waiting(0.0)
        else:
            ahead = self._intake()
        for command in [*ahead, *commands]:
            if command is None:
                return False
            self._apply(self._obey(command, time.monotonic()))
        self._post_waiting()
        for agent, data in arrived:
            self._progressed = True
            self._apply(self._receive(agent, data, time.monotonic()))
        for (key, push), write in list(self._underway.items()):
            if (key, push) not in self._underway:  # its peer died with an earlier one of these
                continue
            try:
                if write.ok is None:
                    write.ok = self._agent.poll(key[0], write.transfer)
            except PeerDied:
                self._apply(self._died(key[0]))
                continue
            if write.ok is not None and write.digests is None:
                write.digests = self._digest_beside(push.local, range(self._layers), None)
            if write.ok is not None and write.digests is not None and write.digests.done():
                self._progressed = True
                del self._underway[key, push]
                digests = self._count(write.digests.result())
                if key in self._reads:
                    write.ok = write.ok and self._was_read(key, push, digests, write.began)
                else:
                    self._digested[key, push] = digests
                self._apply(self._writer.ended(key, push, write.ok, time.monotonic()))
        now = time.monotonic()
        self._apply([*self._holder.tick(now), *self._writer.tick(now)])
        return True

    def _waiting(self, seconds: float) -> list[_Command | None]:
        """The commands in the queue; of an empty one the next, if it comes in so many seconds."""
        commands: list[_Command | None] = []
        wait = seconds
        with contextlib.suppress(queue.Empty):
            while True:
                commands.append(self._commands.get(timeout=wait) if wait else self._commands.get_nowait())
                wait = 0.0
        return commands

    def _obey(self, command: _Command, now: float) -> _Effects:
        match command:
            case Grant(lease, to, tokens):
                return self._grant(lease, to, tokens, now)
            case Revoke(granted):
                return self._holder.revoke(granted, now)
            case Open(to, lease):
                return self._open(to, lease, now)
            case Withdraw(key, reason):
                parts = list(self._opened[key].parts) if key in self._opened else []
                return [effect for part in parts for effect in self._writer.withdraw(part, reason, now)]
            case _Pushed(key, push, computed):
                opened = self._opened.get(key)
                if opened is None:
                    return []
                if push.final:
                    opened.computed = computed
                if key in self._reads and self._reads[key].digests is None:
                    self._reads[key].waiting.append(push)
                    return []
                return [effect for part in list(opened.parts) for effect in self._writer.push(part, push, now)]
            case Lend(loan, to):
                return self._lend(loan, to, now)
            case _LoanDigested(loan, reader, digests):
                values = self._count(digests.result())
                if not self._holder.lends(loan.id, reader):
                    return []
                return self._send(reader, Lent(loan.id, loan.epoch, loan.pages, values))
            case Read(to, loan):
                return self._open_read(to, loan, now)
            case _Wake():
                return []

    def _grant(self, lease: Lease, to: Endpoint, tokens: int, now: float) -> _Effects:
        size = self.endpoint.fingerprint.page_size
        block = block_tokens(size, to.fingerprint.page_size)
        count = -(-tokens // block) if tokens else len(lease.pages) * size // block
        blocks = block_numbers(lease.pages, size // block, 0, count)
        effects: list[_Effect] = []
        for rank in self._partners(to, writes=True):
            agent = to.agent_of(rank)
            try:
                self._agent.connect(to, rank)
                self._holder.grant(lease.id, agent, blocks, now, lease.seconds)
            except PeerDied:
                effects.append(holder.Reclaimed(lease.id, "writer_died", DIED, writer=agent))
            except Refused as refused:
                effects.append(holder.Reclaimed(lease.id, "never_connected", str(refused), writer=agent))
        return effects

    def _open(self, to: Endpoint, lease: Lease, now: float) -> _Effects:
        key = to.agent, lease.id
        opened = self._opened.setdefault(key, _Opened([]))
        effects: list[_Effect] = []
        for rank in self._partners(to, writes=False):
            part = to.agent_of(rank), lease.id
            opened.parts.append(part)
            self._opened_as[part] = key
            try:
                self._agent.connect(to, rank)
                effects += self._writer.open(part, lease.epoch, now + lease.seconds)
            except PeerDied:
                effects.append(writer.Failed(part, DIED))
            except Refused as refused:
                effects.append(writer.Failed(part, str(refused)))
        return effects

    def _lend(self, loan: Loan, to: Endpoint, now: float) -> _Effects:
        try:
            self._agent.connect(to)
        except PeerDied:
            return [holder.Reclaimed(loan.id, "writer_died", DIED, writer=to.agent)]
        except Refused as refused:
            return [holder.Reclaimed(loan.id, "never_connected", str(refused), writer=to.agent)]
        self._holder.lend(loan.id, to.agent, now, loan.seconds)
        digests = self._digest_beside(tuple(loan.pages), range(self._layers), None)
        digests.add_done_callback(lambda done: self._commands.put(_LoanDigested(loan, to.agent, done)))
        return []

    def _open_read(self, to: Endpoint, loan: Loan, now: float) -> _Effects:
        key = to.agent, loan.id
        self._opened.setdefault(key, _Opened([])).parts.append(key)
        self._opened_as[key] = key
        self._reads[key] = _Read(self._lent.pop(key, None))
        try:
            self._agent.connect(to)
        except PeerDied:
            return [writer.Failed(key, DIED)]
        except Refused as refused:
            return [writer.Failed(key, str(refused))]
        return self._writer.open(key, loan.epoch, now + loan.seconds, reading=True)

    def _digests_came(self, key: Key, message: Lent, now: float) -> _Effects:
        digests = dict(zip(message.pages, message.digests, strict=True))
        read = self._reads.get(key)
        if read is None:
            self._lent[key] = digests
            if len(self._lent) > LOANS:
                self._lent.popitem(last=False)
            return []
        read.digests, waiting = digests, read.waiting
        read.waiting = []
        return [effect for push in waiting for effect in self._writer.push(key, push, now)]

    def _was_read(self, key: Key, push: Push, digests: list[int], began: float) -> bool:
        """Whether a read brought what was lent."""
        known = self._reads[key].digests or {}
        wrong = sum(known.get(page) != digest for page, digest in zip(push.remote, digests, strict=True))
        if wrong:
            self.stats.digest_failures += wrong
            log.error("digests of a read differ agent=%s lease=%d wrong=%d", *key, wrong)
        else:
            self.stats.read_bytes += len(push.local) * self.endpoint.region.page_bytes
            self.stats.read_seconds += time.perf_counter() - began
            faults.hit("prefill.read")
        return not wrong

    def _partners(self, peer: Endpoint, writes: bool) -> list[int]:
        """The ranks of `peer` that write to us, or that we write to."""
        ours, theirs = self.endpoint.fingerprint, peer.fingerprint
        if writes:
            return [from_ for from_, to in pairs(theirs, ours) if to == self._rank]
        return [to for from_, to in pairs(ours, theirs) if from_ == self._rank]

    def _receive(self, agent: str, data: bytes, now: float) -> _Effects:
        try:
            message = messages.decode(data)
        except msgspec.DecodeError as error:
            log.warning("unreadable notification agent=%s error=%s", agent, error)
            return []
        self._holder.heard(agent, now)
        match message:
            case Release(sender=sender):
                if sender is not None and sender.agent == agent:
                    try:
                        self._agent.meet(sender)
                    except (PeerDied, Refused) as error:
                        log.warning("cannot answer agent=%s reason=%s", agent, error)
                return self._writer.released(agent, message, now)
            case Ping(lease, epoch):
                return self._send(agent, Pong(lease, epoch))
            case Pong():
                return []
            case Lent(lease):
                return self._digests_came((agent, lease), message, now)
            case _:
                return self._holder.received(agent, message)

    def _apply(self, effects: _Effects) -> None:
        for effect in effects:
            match effect:
                case writer.Post():
                    self._posts.append(effect)
                case writer.Announce((agent, lease) as key, epoch, first, push, layers):
                    digests = self._digested.pop((key, push))
                    written = Written(lease, epoch, first, (layers.start, layers.stop), digests)
                    self._apply(self._send(agent, written))
                case holder.Verify():
                    faults.hit("decode.written")
                    self._verify(effect)
                case writer.Tell(agent, Complete() as complete):
                    faults.hit("prefill.completing")
                    self._apply(self._send(agent, complete))
                    faults.hit("prefill.completed")
                case holder.Ask(agent, Release() as release):
                    address = self.endpoint.address(0)
                    self._apply(self._send(agent, msgspec.structs.replace(release, sender=address)))
                case holder.Ask(agent, message) | writer.Tell(agent, message):
                    self._apply(self._send(agent, message))
                case _:
                    self._note(effect)
                    self._emit(effect)

    def _note(self, event: Event) -> None:
        match event:
            case writer.Failed(part, _):
                self._close(part)
            case writer.Done(part, push) if push.complete is not None:
                self._close(part)
            case writer.Done(part, push) if push.final:
                self.stats.exposed_seconds += time.perf_counter() - self._opened[self._opened_as[part]].computed
                self.stats.handoffs += 1
            case holder.Settled(_, complete, agent):
                cut = self._agent.received(agent)
                self.stats.received_bytes += complete.pages * cut.moved_bytes if cut is not None else 0

    def _close(self, part: Key) -> None:
        """A part of another worker's lease has ended."""
        for each in [each for each in self._digested if each[0] == part]:
            del self._digested[each]
        self._reads.pop(part, None)
        self._lent.pop(part, None)
        key = self._opened_as.pop(part, None)
        if key is not None:
            self._opened[key].parts.remove(part)
            if not self._opened[key].parts:
                del self._opened[key]

    def _post_waiting(self) -> None:
        until = time.monotonic() + POST_TIME
        while self._posts and time.monotonic() < until:
            post = self._posts.popleft()
            self._apply(self._post(post.key, post.push, post.layers))
            self._progressed = True

    def _post(self, key: Key, push: Push, layers: range) -> _Effects:
        began = time.perf_counter()
        try:
            if key in self._reads:
                transfer = self._agent.read(key[0], push.local, push.remote, layers)
                self._underway[key, push] = _Write(transfer, None, began)
                faults.hit("prefill.reading")
                return []
            digests = self._digest_beside(push.local, layers, self._agent.sent(key[0]))
            transfer = self._agent.write(key[0], push.local, push.remote, layers)
            self._underway[key, push] = _Write(transfer, digests, began)
        except PeerDied:
            return self._died(key[0])
        self.stats.writes += 1
        self.stats.descriptors += len(push.local)
        cut = self._agent.sent(key[0])
        if cut is not None:
            self.stats.sent_bytes += len(push.local) * cut.moved_bytes * len(layers) // cut.layers
        self.stats.write_seconds += time.perf_counter() - began
        faults.hit(self._pushed(push, layers))
        return []

    def _pushed(self, push: Push, layers: range) -> str:
        """The fault point of a write that was posted."""
        if layers.stop != self._layers:
            return "prefill.pushed_layer"
        return "prefill.pushed_last" if push.final else "prefill.pushed_chunk"

    def _send(self, agent: str, message: AnyMessage) -> _Effects:
        try:
            self._agent.notify(agent, messages.encode(message))
        except PeerDied:
            return self._died(agent)
        return []

    def _digest_beside(self, blocks: tuple[int, ...], layers: range, cut: Cut | None) -> "Future[_Digests]":
        """Begin to digest on the other thread; this one wakes when it is done."""
        if self._digest is None:
            digests: Future[_Digests] = Future()
            digests.set_result(_Digests([0] * len(blocks), 0.0))
        else:
            digests = self._beside.submit(self._digests, blocks, layers, cut)
            digests.add_done_callback(lambda _: self._commands.put(_Wake()))
        return digests

    def _digests(self, blocks: tuple[int, ...], layers: range, cut: Cut | None) -> _Digests:
        """On either thread."""
        assert self._digest is not None
        began = time.perf_counter()
        values = self._digest(blocks, layers, cut)
        return _Digests(values, time.perf_counter() - began)

    def _count(self, digests: _Digests) -> list[int]:
        if self._digest is not None:
            self.stats.digests += len(digests.values)
            self.stats.digest_seconds += digests.seconds
        return digests.values

    def _verify(self, verify: holder.Verify) -> None:
        lease, agent, total = verify.lease, verify.writer, len(verify.pages)
        digests = self._count(self._digests(verify.pages, verify.layers, self._agent.received(agent)))
        right = sum(a == b for a, b in zip(digests, verify.digests, strict=True))
        self._holder.verified(lease, agent, right)
        if right != total:
            self.stats.digest_failures += total - right
            log.error("digests differ lease=%d pages=%d wrong=%d", lease, total, total - right)

    def _died(self, agent: str) -> _Effects:
        """The transport's word that the peer is gone: a proof for the leases of both sides."""
        log.warning("peer died agent=%s", agent)
        self.stats.peers_died += 1
        for underway in [each for each in self._underway if each[0][0] == agent]:
            self._agent.cancel(self._underway.pop(underway).transfer)
        self._posts = deque(post for post in self._posts if post.key[0] != agent)
        self._agent.forget(agent)
        return [*self._holder.died(agent), *self._writer.died(agent)]

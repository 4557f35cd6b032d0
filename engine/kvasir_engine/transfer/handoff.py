"""The transfer thread: owns the NIXL agent, carries out what the lease machines decide, and reports what happened.

The engine's thread calls the methods, which never block; the events come through `emit`, from this thread.
"""

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import msgspec

from kvasir_engine import faults
from kvasir_engine.protocol import Endpoint, Lease
from kvasir_engine.transfer import holder, messages, writer
from kvasir_engine.transfer.agent import Agent, PeerDied, Refused, Transfer
from kvasir_engine.transfer.digest import Digester
from kvasir_engine.transfer.holder import Holder
from kvasir_engine.transfer.messages import AnyMessage, Complete, Ping, Pong, Release, Written
from kvasir_engine.transfer.writer import Key, Push, Writer

log = logging.getLogger("transfer")

BUSY_WAIT = 0.0005
IDLE_WAIT = 0.02
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


@dataclass(eq=False)
class _Write:
    """A write under way. It has ended when its bytes are there and its digests known."""

    transfer: Transfer
    digests: "Future[_Digests]"
    ok: bool | None = None


@dataclass(frozen=True)
class _Digests:
    values: list[int]
    seconds: float


class Handoff(threading.Thread):
    """Runs until `stop`. `make_agent` is called on the thread, which then owns the agent.

    `digest` computes the digests of pages of our pool, those of what is written beside the copy; None where digests
    are off.
    """

    def __init__(
        self, make_agent: Callable[[], Agent], emit: Callable[[Event], None], digest: Digester | None
    ) -> None:
        super().__init__(name="kvasir-transfer", daemon=True)
        self._make_agent = make_agent
        self._emit = emit
        self._digest = digest
        self._commands: queue.SimpleQueue[Callable[[float], _Effects] | None] = queue.SimpleQueue()
        self._beside = ThreadPoolExecutor(1, "kvasir-digest")
        self._posts: deque[writer.Post] = deque()  # decided and not begun
        self._underway: dict[tuple[Key, Push], _Write] = {}
        self._digested: dict[tuple[Key, Push], list[int]] = {}  # of writes that have ended
        self._progressed = False
        self._computed: dict[Key, float] = {}  # when the prompt's last layer was
        self._ready = threading.Event()
        self._error: BaseException | None = None
        self._agent: Agent
        self._holder: Holder
        self._writer: Writer
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

    # -- the decode side

    def grant(self, lease: Lease, to: Endpoint) -> None:
        """`to` may write the pages of `lease` until it expires, or until proof that it stopped."""

        def command(now: float) -> _Effects:
            try:
                self._agent.connect(to)
            except PeerDied:
                return [holder.Reclaimed(lease.id, "writer_died", DIED)]
            except Refused as refused:
                return [holder.Reclaimed(lease.id, "never_connected", str(refused))]
            self._holder.grant(lease.id, to.agent, lease.pages, now, lease.seconds)
            return []

        self._commands.put(command)

    def revoke(self, lease: int) -> None:
        """The request of `lease` was aborted: `Reclaimed` follows when its writer is proven stopped."""
        self._commands.put(lambda now: self._holder.revoke(lease, now))

    # -- the prefill side

    def open(self, to: Endpoint, lease: Lease) -> Key:
        """Begin to write under `lease`. The key names it in every later call and event."""
        key = (to.agent, lease.id)

        def command(now: float) -> _Effects:
            try:
                self._agent.connect(to)
            except PeerDied:
                return [writer.Failed(key, DIED)]
            except Refused as refused:
                return [writer.Failed(key, str(refused))]
            return self._writer.open(key, lease.epoch, now + lease.seconds)

        self._commands.put(command)
        return key

    def push(self, key: Key, push: Push) -> None:
        """Copy pages, after the earlier pushes of this lease. `Done` follows for whole pages, or `Failed`."""
        if push.final:
            self._computed[key] = time.perf_counter()
        self._commands.put(lambda now: self._writer.push(key, push, now))

    def withdraw(self, key: Key, reason: str) -> None:
        """Write no more under the lease. `Failed` follows when the writes under way have ended."""
        self._commands.put(lambda now: self._writer.withdraw(key, reason, now))

    # -- the thread

    def run(self) -> None:
        try:
            self._agent = self._make_agent()
            self.endpoint = self._agent.endpoint
            layers = self.endpoint.fingerprint.layers
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
        # All commands before any message: a grant must be known before its writer's word can arrive.
        busy = len(self._holder) or len(self._writer)
        wait: float | None = None if self._progressed else BUSY_WAIT if busy else IDLE_WAIT
        self._progressed = False
        while True:
            try:
                command = self._commands.get(timeout=wait) if wait else self._commands.get_nowait()
            except queue.Empty:
                break
            if command is None:
                return False
            wait = None
            self._apply(command(time.monotonic()))
        self._post_waiting()
        for agent, data in self._agent.notifications():
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
            if write.ok is not None and write.digests.done():
                self._progressed = True
                del self._underway[key, push]
                self._digested[key, push] = self._count(write.digests.result())
                self._apply(self._writer.ended(key, push, write.ok, time.monotonic()))
        now = time.monotonic()
        self._apply([*self._holder.tick(now), *self._writer.tick(now)])
        return True

    def _receive(self, agent: str, data: bytes, now: float) -> _Effects:
        try:
            message = messages.decode(data)
        except msgspec.DecodeError as error:
            log.warning("unreadable notification agent=%s error=%s", agent, error)
            return []
        self._holder.heard(agent, now)
        match message:
            case Release():
                return self._writer.released(agent, message, now)
            case Ping(lease, epoch):
                return self._send(agent, Pong(lease, epoch))
            case Pong():
                return []
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
                case holder.Verify(lease, pages, layers, digests):
                    faults.hit("decode.written")
                    self._verify(lease, pages, layers, digests)
                case writer.Tell(agent, Complete() as complete):
                    faults.hit("prefill.completing")
                    self._apply(self._send(agent, complete))
                    faults.hit("prefill.completed")
                case holder.Ask(agent, message) | writer.Tell(agent, message):
                    self._apply(self._send(agent, message))
                case _:
                    self._note(effect)
                    self._emit(effect)

    def _note(self, event: Event) -> None:
        match event:
            case writer.Failed(key, _):
                self._computed.pop(key, None)
                for each in [each for each in self._digested if each[0] == key]:
                    del self._digested[each]
            case writer.Done(key, push) if push.final:
                self.stats.exposed_seconds += time.perf_counter() - self._computed.pop(key)
                self.stats.handoffs += 1

    def _post_waiting(self) -> None:
        until = time.monotonic() + POST_TIME
        while self._posts and time.monotonic() < until:
            post = self._posts.popleft()
            self._apply(self._post(post.key, post.push, post.layers))
            self._progressed = True

    def _post(self, key: Key, push: Push, layers: range) -> _Effects:
        digests: Future[_Digests]
        if self._digest is None:
            digests = Future()
            digests.set_result(_Digests([0] * len(push.local), 0.0))
        else:
            digests = self._beside.submit(self._digests, push.local, layers)
            digests.add_done_callback(lambda _: self._commands.put(_wake))
        began = time.perf_counter()
        try:
            transfer = self._agent.write(key[0], push.local, push.remote, layers)
            self._underway[key, push] = _Write(transfer, digests)
        except PeerDied:
            return self._died(key[0])
        self.stats.writes += 1
        self.stats.descriptors += len(push.local)
        self.stats.write_seconds += time.perf_counter() - began
        faults.hit(self._pushed(push, layers))
        return []

    def _pushed(self, push: Push, layers: range) -> str:
        """The fault point of a write that was posted."""
        if layers.stop != self.endpoint.fingerprint.layers:
            return "prefill.pushed_layer"
        return "prefill.pushed_last" if push.final else "prefill.pushed_chunk"

    def _send(self, agent: str, message: AnyMessage) -> _Effects:
        try:
            self._agent.notify(agent, messages.encode(message))
        except PeerDied:
            return self._died(agent)
        return []

    def _digests(self, pages: tuple[int, ...], layers: range) -> _Digests:
        """On either thread."""
        assert self._digest is not None
        began = time.perf_counter()
        values = self._digest(pages, layers)
        return _Digests(values, time.perf_counter() - began)

    def _count(self, digests: _Digests) -> list[int]:
        if self._digest is not None:
            self.stats.digests += len(digests.values)
            self.stats.digest_seconds += digests.seconds
        return digests.values

    def _verify(self, lease: int, pages: tuple[int, ...], layers: range, digests: tuple[int, ...]) -> None:
        right = sum(a == b for a, b in zip(self._count(self._digests(pages, layers)), digests, strict=True))
        self._holder.verified(lease, right)
        if right != len(pages):
            self.stats.digest_failures += len(pages) - right
            log.error("digests differ lease=%d pages=%d wrong=%d", lease, len(pages), len(pages) - right)

    def _died(self, agent: str) -> _Effects:
        """The transport's word that the peer is gone: a proof for the leases of both sides."""
        log.warning("peer died agent=%s", agent)
        self.stats.peers_died += 1
        for underway in [each for each in self._underway if each[0][0] == agent]:
            del self._underway[underway]
        self._posts = deque(post for post in self._posts if post.key[0] != agent)
        self._agent.forget(agent)
        return [*self._holder.died(agent), *self._writer.died(agent)]


def _wake(now: float) -> _Effects:
    """A command that only ends the wait for one."""
    return []

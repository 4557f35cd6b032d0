"""The transfer thread: owns the NIXL agent, carries out what the lease machines decide, and reports what happened.

The engine's thread calls the methods, which never block; the events come through `emit`, from this thread.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterable

import msgspec

from kvasir_engine.protocol import Endpoint, Lease
from kvasir_engine.transfer import holder, messages, writer
from kvasir_engine.transfer.agent import Agent, PeerDied, Refused, Transfer
from kvasir_engine.transfer.holder import Holder
from kvasir_engine.transfer.writer import Key, Push, Writer

log = logging.getLogger("transfer")

BUSY_WAIT = 0.0005
IDLE_WAIT = 0.02

DIED = "the worker at the other end died"

Event = holder.Settled | holder.Fenced | holder.Reclaimed | holder.Rejected | writer.Done | writer.Failed
_Effect = Event | holder.Ask | writer.Post | writer.Tell


class Handoff(threading.Thread):
    """Runs until `stop`. `make_agent` is called on the thread, which then owns the agent."""

    def __init__(self, make_agent: Callable[[], Agent], emit: Callable[[Event], None]) -> None:
        super().__init__(name="kvasir-transfer", daemon=True)
        self._make_agent = make_agent
        self._emit = emit
        self._commands: queue.SimpleQueue[Callable[[float], Iterable[_Effect]] | None] = queue.SimpleQueue()
        self._writer = Writer()
        self._underway: dict[Key, Transfer] = {}
        self._ready = threading.Event()
        self._error: BaseException | None = None
        self._agent: Agent
        self._holder: Holder
        self.endpoint: Endpoint

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

        def command(now: float) -> Iterable[_Effect]:
            try:
                self._agent.connect(to)
            except PeerDied:
                return [holder.Reclaimed(lease.id, "writer_died", DIED)]
            except Refused as refused:
                return [holder.Reclaimed(lease.id, "never_connected", str(refused))]
            self._holder.grant(lease.id, to.agent, len(lease.pages), now + lease.seconds)
            return []

        self._commands.put(command)

    def revoke(self, lease: int) -> None:
        """The request of `lease` was aborted: `Reclaimed` follows when its writer is proven stopped."""
        self._commands.put(lambda now: self._holder.revoke(lease, now))

    # -- the prefill side

    def open(self, to: Endpoint, lease: Lease) -> Key:
        """Begin to write under `lease`. The key names it in every later call and event."""
        key = (to.agent, lease.id)

        def command(now: float) -> Iterable[_Effect]:
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
        """Copy pages, after the earlier pushes of this lease. `Done` follows, or `Failed` for the lease."""
        self._commands.put(lambda now: self._writer.push(key, push, now))

    def withdraw(self, key: Key, reason: str) -> None:
        """Write no more under the lease. `Failed` follows when the write under way has ended."""
        self._commands.put(lambda now: self._writer.withdraw(key, reason, now))

    # -- the thread

    def run(self) -> None:
        try:
            self._agent = self._make_agent()
            self.endpoint = self._agent.endpoint
            self._holder = Holder(self.endpoint.epoch)
        except BaseException as error:
            self._error = error
            return
        finally:
            self._ready.set()
        try:
            while self._turn():
                pass
        finally:
            self._agent.close()

    def _turn(self) -> bool:
        # All commands before any message: a grant must be known before its writer's word can arrive.
        wait: float | None = BUSY_WAIT if len(self._holder) or self._underway else IDLE_WAIT
        while True:
            try:
                command = self._commands.get(timeout=wait) if wait else self._commands.get_nowait()
            except queue.Empty:
                break
            if command is None:
                return False
            wait = None
            self._apply(command(time.monotonic()))
        for agent, data in self._agent.notifications():
            self._apply(self._receive(agent, data))
        for key, transfer in list(self._underway.items()):
            try:
                ok = self._agent.poll(key[0], transfer)
            except PeerDied:
                self._apply(self._died(key[0]))
                continue
            if ok is not None and self._underway.pop(key, None) is not None:
                self._apply(self._writer.ended(key, ok, time.monotonic()))
        now = time.monotonic()
        self._apply([*self._holder.tick(now), *self._writer.tick(now)])
        return True

    def _receive(self, agent: str, data: bytes) -> Iterable[_Effect]:
        try:
            message = messages.decode(data)
        except msgspec.DecodeError as error:
            log.warning("unreadable notification agent=%s error=%s", agent, error)
            return []
        if isinstance(message, messages.Release):
            return self._writer.released(agent, message, time.monotonic())
        return self._holder.received(agent, message)

    def _apply(self, effects: Iterable[_Effect]) -> None:
        for effect in effects:
            try:
                match effect:
                    case writer.Post(key, push):
                        data = b"" if push.complete is None else messages.encode(push.complete)
                        self._underway[key] = self._agent.write(key[0], push.local, push.remote, data)
                    case holder.Ask(agent, message) | writer.Tell(agent, message):
                        self._agent.notify(agent, messages.encode(message))
                    case _:
                        self._emit(effect)
            except PeerDied as died:
                self._apply(self._died(str(died)))

    def _died(self, agent: str) -> list[_Effect]:
        """The transport's word that the peer is gone: a proof for the leases of both sides."""
        log.warning("peer died agent=%s", agent)
        for key in [key for key in self._underway if key[0] == agent]:
            del self._underway[key]
        self._agent.forget(agent)
        return [*self._holder.died(agent), *self._writer.died(agent)]

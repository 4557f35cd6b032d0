"""A rank's transfer thread: owns the NIXL agent, carries out what the lease machines decide, reports events.

Other threads call the methods, which never block; the events come through `emit`, from this thread. What the thread
does is in `lease_executor.py`.
"""

import contextlib
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass

from kvasir_engine.connector.commands import AnyCommand
from kvasir_engine.connector.digest_thread import DigestThread
from kvasir_engine.connector.digester import Digester
from kvasir_engine.connector.fabric_rate import ANY_FABRIC, FabricRate
from kvasir_engine.connector.lease_executor import LeaseExecutor
from kvasir_engine.connector.link_probe import LinkProbes
from kvasir_engine.connector.nixl_agent import NixlAgent
from kvasir_engine.connector.rank_parts import Event
from kvasir_engine.connector.sender import Key, LayerPush, Push
from kvasir_engine.connector.stats import TransferStats
from kvasir_engine.protocol import Endpoint
from kvasir_engine.status_reports import LinkReport
from kvasir_engine.supervisor import Ended

log = logging.getLogger("transfer")

BUSY_WAIT = 0.0005
IDLE_WAIT = 0.02


@dataclass(frozen=True)
class _Pushed:
    """A push on its way to the thread, and when its last layer was computed."""

    key: Key
    push: Push
    computed: float


class _Wake:
    """Only ends the wait for a command."""


@dataclass(frozen=True)
class _After:
    """What follows waits for so many of rank 0's commands."""

    commands: int


_Command = AnyCommand | _Pushed | _After | _Wake


class TransferThread(threading.Thread):
    """Runs until `stop`. `make_agent` is called on the thread, which then owns the agent.

    `digest` computes the digests of pages of our pool, those of what is written while it is copied; None where
    digests are off. `ended` hears of any end but by `stop`. `intake`, on ranks other than 0, returns rank 0's
    commands that have arrived. `fabric`: what carries the KV, as far as known. Without `start`, the caller of
    `begin` and then `step` again and again is the thread; `clock` says the time, and `digest_thread` digests.
    """

    def __init__(
        self,
        make_agent: Callable[[], NixlAgent],
        emit: Callable[[Event], None],
        digest: Digester | None,
        rank: int = 0,
        intake: Callable[[], list[AnyCommand]] | None = None,
        ended: Ended | None = None,
        fabric: FabricRate = ANY_FABRIC,
        clock: Callable[[], float] = time.monotonic,
        digest_thread: Executor | None = None,
    ) -> None:
        super().__init__(name="kvasir-transfer", daemon=True)
        self._make_agent = make_agent
        self._emit = emit
        self._rank = rank
        self._ended = ended
        self._intake = intake
        self._clock = clock
        self._verifies = digest is not None
        self._taken = 0  # of rank 0's commands
        self._held: deque[_Command | None] = deque()
        self._commands: queue.SimpleQueue[_Command | None] = queue.SimpleQueue()
        self.stats = TransferStats()
        self._digests = DigestThread(digest, self.stats, lambda: self._commands.put(_Wake()), digest_thread)
        self._ready = threading.Event()
        self._error: BaseException | None = None
        self._agent: NixlAgent
        self._executor: LeaseExecutor
        self.endpoint: Endpoint
        self._fabric = fabric
        self._probes: LinkProbes | None = None

    @property
    def links(self) -> Mapping[str, LinkReport]:
        """The links to other workers' agents, as they were measured. From any thread."""
        return {} if self._probes is None else self._probes.links

    _stopping = False

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

    def push(self, key: Key, push: Push) -> None:
        """Copy pages, after the earlier pushes of this lease. `Done` follows for whole pages, or `Failed`."""
        self._commands.put(_Pushed(key, push, time.perf_counter()))

    def push_layers(self, pushes: list[LayerPush]) -> Callable[[int], None]:
        """Push pages layer by layer while a step computes them. The result is to hear of each layer."""

        def on_layer(layer: int) -> None:
            for key, last in pushes:
                if layer == last.layer:
                    self.push(key, last)
                else:
                    self.push(key, Push(last.local, last.remote, layer))

        return on_layer

    def after(self, commands: int) -> None:
        """What is pushed from now on waits until `intake` has returned so many commands in all.

        Pushes and commands come to a rank by two connections, and over a network either may be late.
        """
        self._commands.put(_After(commands))

    # -- the thread

    def run(self) -> None:
        try:
            self.begin()
        except BaseException as error:
            self._error = error
            return
        finally:
            self._ready.set()
        why = "the transfer thread ended"
        try:
            self._carry()
        except BaseException as error:
            log.exception("the transfer thread ends; the worker is unhealthy from now on")
            why = f"the transfer thread failed: {type(error).__name__}: {error}"
        finally:
            try:
                self._digests.close()
                self._agent.close()
            finally:
                if not self._stopping and self._ended is not None:
                    self._ended(why)

    def begin(self) -> None:
        """Make the agent, on the calling thread."""
        self._agent = agent = self._make_agent()
        self.endpoint = agent.endpoint
        self._executor = LeaseExecutor(
            agent, self._rank, self._digests, self._verifies, self.stats, self._emit, self._fabric, self._clock
        )
        self._probes = self._executor.probes

    @property
    def busy(self) -> bool:
        """Whether a lease or a loan is open, or a command waits."""
        return self._executor.busy or bool(self._held)

    def step(self, wait: float) -> bool:
        """Go round once; wait so many seconds for a command, if there is none. Whether there was anything to do."""
        self._held += self._waiting(wait)
        # What has arrived is fetched before the last commands, and looked at after them: a grant must be known
        # before its writer's word, and a lease be open before its pushes, which come another way than commands.
        arrived = self._agent.notifications()
        if self._intake is None:
            self._held += self._waiting(0.0)
        else:
            for ahead in self._intake():
                self._taken += 1
                self._executor.obey(ahead)
        for command in self._due():
            match command:
                case None:
                    self._stopping = True
                    return False
                case _Pushed(key, push, computed):
                    self._executor.push(key, push, computed)
                case _Wake() | _After():
                    pass
                case _:
                    self._executor.obey(command)
        return self._executor.turn(arrived)

    def _carry(self) -> None:
        progressed = False
        while not self._stopping:
            progressed = self.step(0.0 if progressed else BUSY_WAIT if self.busy else IDLE_WAIT)

    def _due(self) -> Iterator[_Command | None]:
        """What came, in order, up to what has to wait."""
        while self._held:
            if isinstance(first := self._held[0], _After) and first.commands > self._taken:
                return
            yield self._held.popleft()

    def _waiting(self, seconds: float) -> list[_Command | None]:
        """The commands in the queue; of an empty one the next, if it comes in so many seconds."""
        commands: list[_Command | None] = []
        wait = seconds
        with contextlib.suppress(queue.Empty):
            while True:
                commands.append(self._commands.get(timeout=wait) if wait else self._commands.get_nowait())
                wait = 0.0
        return commands

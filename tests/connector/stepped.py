"""The product's transfer thread without a thread: it goes round when a test says so, on the fake NIXL and clock."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any, ParamSpec, TypeVar

from fake_nixl import Transfer, Wire

from kvasir_engine.connector.commands import AnyCommand
from kvasir_engine.connector.digester import Digester
from kvasir_engine.connector.nixl_agent import NixlAgent
from kvasir_engine.connector.rank_parts import Event
from kvasir_engine.connector.transfer_thread import TransferThread
from kvasir_engine.protocol import Fingerprint, Region

P, T = ParamSpec("P"), TypeVar("T")

ROUNDS = 8
"""More than what has come takes from its message, or its end, to its last consequence."""


class HeldExecutor(Executor):
    """Does nothing until it is told to."""

    def __init__(self) -> None:
        self._calls: deque[Callable[[], None]] = deque()

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """As Executor has it."""
        future: Future[T] = Future()
        self._calls.append(lambda: future.set_result(fn(*args, **kwargs)))
        return future

    def run(self, calls: int | None = None) -> bool:
        """Do the next so many of what was submitted, or all. Whether there was anything."""
        count = len(self._calls) if calls is None else min(calls, len(self._calls))
        for _ in range(count):
            self._calls.popleft()()
        return count > 0

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """As Executor has it."""


class SteppedThread(TransferThread):
    """One rank's transfer thread. `begun` has what happened to leases, in order."""

    def __init__(
        self,
        wire: Wire,
        epoch: int,
        region: Region,
        fingerprint: Fingerprint,
        clock: Callable[[], float],
        digester: Digester | None,
        rank: int = 0,
        intake: Callable[[], list[AnyCommand]] | None = None,
    ) -> None:
        self.wire = wire
        self.events: deque[Event] = deque()
        self.digesting = HeldExecutor()
        super().__init__(
            lambda: NixlAgent(epoch, region, fingerprint, rank, wire.nixl),
            self.events.append,
            digester,
            rank,
            intake,
            clock=clock,
            digest_thread=self.digesting,
        )
        self.begin()

    @property
    def agent(self) -> str:
        """The name of its agent."""
        return self.endpoint.agent

    def is_alive(self) -> bool:
        """It could be stepped."""
        return True

    def turn(self) -> None:
        """Go round until nothing is left to do, with what has arrived and ended, or only a link is being timed."""
        for _ in range(ROUNDS):
            if not (self.step(0.0) or self.digesting.run()):
                return

    def hear(self, by: str | None = None) -> None:
        """The next message arrives."""
        self.wire.deliver(self.agent, by)
        self.turn()

    @property
    def transfers(self) -> list[Transfer]:
        """What it has under way."""
        return self.wire.of(self.agent)

    def end(self, place: int = 0, ok: bool = True) -> None:
        """A transfer under way ends, and is seen to have."""
        self.wire.end(self.transfers[place], ok)
        self.turn()

    @property
    def quiet(self) -> bool:
        """Whether nothing is open, posted or waited for, in what the machines or the executor keep."""
        return not self.busy and not self.kept

    @property
    def kept(self) -> dict[str, Any]:
        """What the executor keeps of leases that have not ended, by its name; of those that all have, nothing."""
        executor = self._executor
        parts: dict[str, Any] = {
            "copies": executor._copies._copies,
            "posts": executor._copies._posts,
            "open leases": executor._open_leases._leases,
            "lease of parts": executor._open_leases._lease_of,
            "reads": executor._reads._reads,
            "unconfirmed": executor._unconfirmed._parts,
            "pending loans": executor._pending_loans._parts,
            "digested": executor._digested,
        }
        return {name: part for name, part in parts.items() if part}

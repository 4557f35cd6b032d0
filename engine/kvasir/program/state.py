"""A state of a program: its text, variables and forks. Appending returns at once; steps are executed in order."""

import concurrent.futures
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar

from kvasir.program.endpoint import Endpoint
from kvasir.program.errors import ProgramError
from kvasir.program.expressions import Begin, End, Expression, Gen, Role, Select, Step, steps_of
from kvasir.program.state_executor import StateExecutor, StateSnapshot, TakeSnapshot
from kvasir.program.transcript import Transcript
from kvasir.program.variable import Generated, Variable
from kvasir.program.waiting import wait_done


@dataclass(frozen=True)
class ProgramUsage:
    """The tokens of all calls of a program."""

    calls: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0

    @property
    def hit_rate(self) -> float:
        """The share of prompt tokens that came from the server's cache, 0 to 1."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0


T = TypeVar("T")


@dataclass
class _Family:
    """A state and all its forks. `raised`: the errors that have been raised to some reader."""

    states: "list[State]" = field(default_factory=list)
    raised: set[str] = field(default_factory=set)


class State:
    """`s += ...` returns at once; reading a variable waits for it. For one thread or task at a time.

    `s["name"]` is a variable's text; if a name is written twice, the last one counts. `returned` is what the
    program's function returned.
    """

    def __init__(self, endpoint: Endpoint, start: StateSnapshot | None = None) -> None:
        begun: concurrent.futures.Future[StateSnapshot] = concurrent.futures.Future()
        begun.set_result(start or StateSnapshot())
        self._begin(endpoint, begun, {}, _Family())

    def _begin(
        self,
        endpoint: Endpoint,
        start: "concurrent.futures.Future[StateSnapshot]",
        variables: dict[str, Variable],
        family: "_Family",
    ) -> None:
        self.returned: Any = None
        self._failure: str | None = None
        self._listening: list[Callable[[], None]] = []
        self._endpoint, self._variables, self._own = endpoint, variables, list[Variable]()
        self._executor = StateExecutor(endpoint.thread.calls, start, endpoint.url)
        self._family = family
        family.states.append(self)

    # -- appending

    def __iadd__(self, expression: Expression | str) -> Self:
        steps: list[tuple[Step | TakeSnapshot, Variable | None]] = []
        for step in steps_of(expression):
            variable = Variable(step.name) if isinstance(step, Gen | Select) else None
            steps.append((step, variable))
            if variable is not None:
                self._variables[variable.name] = variable
                self._own.append(variable)
        while self._listening:
            self._listening.pop()()
        self._endpoint.thread.call(self._executor.append, steps)
        return self

    @contextlib.contextmanager
    def _role(self, role: Role) -> Iterator[None]:
        self._endpoint.thread.call(self._executor.append, [(Begin(role), None)])
        yield
        self._endpoint.thread.call(self._executor.append, [(End(), None)])

    def system(self) -> contextlib.AbstractContextManager[None]:
        """A system message: what is appended within `with`."""
        return self._role("system")

    def user(self) -> contextlib.AbstractContextManager[None]:
        """A user's message: what is appended within `with`."""
        return self._role("user")

    def assistant(self) -> contextlib.AbstractContextManager[None]:
        """The assistant's message: what is appended within `with`."""
        return self._role("assistant")

    def fork(self, number: int) -> "Forks":
        """`number` states that continue from here, each on its own. They can read the variables written so far."""
        if number < 1:
            raise ValueError(f"a fork needs 1 state at least, not {number}")
        start = self._snapshot(number)
        return Forks(self._child(start) for _ in range(number))

    def _child(self, start: "concurrent.futures.Future[StateSnapshot]") -> "State":
        child = State.__new__(State)
        child._begin(self._endpoint, start, dict(self._variables), self._family)
        return child

    # -- reading, waiting

    def __getitem__(self, name: str) -> str:
        return self.meta(name).text

    async def get(self, name: str) -> str:
        """The variable's text, for asyncio. Raises KeyError if nothing writes it, ProgramError if its call
        failed."""
        return (await self.get_meta(name)).text

    def meta(self, name: str) -> Generated:
        """The variable's text, its tokens and times, and how it was chosen. Raises as `get`."""
        return self._raised(self._variable(name).ended)

    async def get_meta(self, name: str) -> Generated:
        """`meta`, for asyncio."""
        variable = self._variable(name)
        await wait_done(variable.ended)
        return self._raised(variable.ended)

    def next_variable(self, over: "concurrent.futures.Future[None]") -> "concurrent.futures.Future[None]":
        """A future that is done when a further variable is appended, or the program is `over`."""
        appended: concurrent.futures.Future[None] = concurrent.futures.Future()
        lock = threading.Lock()

        def hear(*_: object) -> None:
            with lock:
                if not appended.done():
                    appended.set_result(None)

        self._listening.append(hear)
        over.add_done_callback(hear)
        return appended

    def __contains__(self, name: str) -> bool:
        return name in self._variables

    def stream(self, name: str) -> Iterator[str]:
        """The variable's pieces as they come. Raises as `get`."""
        variable, read = self._variable(name), 0
        while True:
            variable.more_than(read).result()
            ended, pieces = variable.ended.done(), variable.pieces[read:]
            read += len(pieces)
            yield from pieces
            if ended:
                self._raised(variable.ended)
                return

    async def astream(self, name: str) -> AsyncIterator[str]:
        """`stream`, for asyncio."""
        variable, read = self._variable(name), 0
        while True:
            await wait_done(variable.more_than(read))
            ended, pieces = variable.ended.done(), variable.pieces[read:]
            read += len(pieces)
            for piece in pieces:
                yield piece
            if ended:
                self._raised(variable.ended)
                return

    def wait(self) -> Transcript:
        """Wait until all that was appended is done; returns the text or messages so far. Raises ProgramError."""
        return self._raised(self._snapshot()).transcript

    async def await_all(self) -> Transcript:
        """`wait`, for asyncio."""
        snapshot = self._snapshot()
        await wait_done(snapshot)
        return self._raised(snapshot).transcript

    @property
    def error(self) -> str | None:
        """Why this state failed, or `None`. In a batch that includes what the function raised."""
        return self._failure or self._executor.error

    def fail(self, error: Exception) -> None:
        """Note that the program's function raised `error`."""
        self._failure = str(error) if isinstance(error, ProgramError) else f"{type(error).__name__}: {error}"

    @property
    def usage(self) -> ProgramUsage:
        """The tokens of all calls that have ended, those of forks included."""
        done = [
            each.ended.result()
            for state in self._family.states
            for each in state._own
            if each.ended.done() and not each.ended.exception()
        ]
        return ProgramUsage(
            sum(each.calls for each in done),
            sum(each.prompt_tokens for each in done),
            sum(each.cached_tokens for each in done),
            sum(each.completion_tokens for each in done),
        )

    def cancel(self, reason: str = "the program was cancelled") -> None:
        """End all calls of the program, those of forks included. Waiting readers get a ProgramError."""
        for state in list(self._family.states):
            with contextlib.suppress(ProgramError):  # a closed endpoint has ended them
                self._endpoint.thread.call(state._executor.cancel, reason)

    def finish(self) -> None:
        """Wait until all states of the program are done. Raises ProgramError for an error that no reader got."""
        for state in self._family.states:  # no new forks: the function has returned
            snapshot = state._snapshot()
            concurrent.futures.wait([snapshot])
            error = snapshot.exception()
            if error is not None and str(error) not in self._family.raised:
                state._raised(snapshot)

    async def afinish(self) -> None:
        """`finish`, for asyncio."""
        for state in self._family.states:
            snapshot = state._snapshot()
            await wait_done(snapshot)
            error = snapshot.exception()
            if error is not None and str(error) not in self._family.raised:
                state._raised(snapshot)

    def _snapshot(self, forks: int = 0) -> "concurrent.futures.Future[StateSnapshot]":
        taken: concurrent.futures.Future[StateSnapshot] = concurrent.futures.Future()
        self._endpoint.thread.call(self._executor.append, [(TakeSnapshot(taken, forks), None)])
        return taken

    def _variable(self, name: str) -> Variable:
        try:
            return self._variables[name]
        except KeyError:
            known = ", ".join(self._variables) or "none"
            raise KeyError(f"no variable {name!r}; there are {known}") from None

    def _raised(self, future: "concurrent.futures.Future[T]") -> T:
        """The future's result. Each reader gets an exception of its own."""
        try:
            return future.result()
        except ProgramError as error:
            self._family.raised.add(str(error))
            raise ProgramError(str(error)) from None


class Forks(list[State]):
    """The states of one fork, in order."""

    def join(self) -> None:
        """Wait until all that was appended to them is done. Raises the first state's ProgramError."""
        for each, snapshot in [(each, each._snapshot()) for each in self]:
            each._raised(snapshot)

    async def ajoin(self) -> None:
        """`join`, for asyncio."""
        snapshots = [(each, each._snapshot()) for each in self]
        for each, snapshot in snapshots:
            await wait_done(snapshot)
            each._raised(snapshot)

    def values(self, name: str) -> list[str]:
        """The variable's text in each state."""
        return [each[name] for each in self]

    async def avalues(self, name: str) -> list[str]:
        """`values`, for asyncio."""
        return [await each.get(name) for each in self]

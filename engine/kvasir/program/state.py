"""A state of a program: what was said, the variables, and forks. Things are appended at once and done in order."""

import concurrent.futures
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar

from kvasir.program.endpoint import Endpoint
from kvasir.program.errors import ProgramError
from kvasir.program.expressions import Begin, End, Expression, Gen, Role, Select, Step, steps_of
from kvasir.program.track import Mark, Track, TrackPoint
from kvasir.program.transcript import Transcript
from kvasir.program.variable import Generated, Variable
from kvasir.program.waiting import until


@dataclass(frozen=True)
class ProgramUsage:
    """What the calls of a program have cost together."""

    calls: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0

    @property
    def hit_rate(self) -> float:
        """The share of the prompts' tokens that came out of the server's cache."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0


T = TypeVar("T")


@dataclass
class _Family:
    """A state and all that was forked from it. `told`: the errors that somebody has read."""

    states: "list[State]" = field(default_factory=list)
    told: set[str] = field(default_factory=set)


class State:
    """`s += ...` returns at once; reading a variable waits for it. For one thread or task at a time.

    The names are those of the variables; of one that is written twice the last counts. `returned` is what the
    program's function returned.
    """

    def __init__(self, endpoint: Endpoint, start: TrackPoint | None = None) -> None:
        begun: concurrent.futures.Future[TrackPoint] = concurrent.futures.Future()
        begun.set_result(start or TrackPoint())
        self._begin(endpoint, begun, {}, _Family())

    def _begin(
        self,
        endpoint: Endpoint,
        start: "concurrent.futures.Future[TrackPoint]",
        variables: dict[str, Variable],
        family: "_Family",
    ) -> None:
        self.returned: Any = None
        self._failure: str | None = None
        self._listening: list[Callable[[], None]] = []
        self._endpoint, self._variables, self._own = endpoint, variables, list[Variable]()
        self._track = Track(endpoint.thread.calls, start, endpoint.url)
        self._family = family
        family.states.append(self)

    # -- saying

    def __iadd__(self, expression: Expression | str) -> Self:
        steps: list[tuple[Step | Mark, Variable | None]] = []
        for step in steps_of(expression):
            variable = Variable(step.name) if isinstance(step, Gen | Select) else None
            steps.append((step, variable))
            if variable is not None:
                self._variables[variable.name] = variable
                self._own.append(variable)
        while self._listening:
            self._listening.pop()()
        self._endpoint.thread.call(self._track.append, steps)
        return self

    @contextlib.contextmanager
    def _role(self, role: Role) -> Iterator[None]:
        self._endpoint.thread.call(self._track.append, [(Begin(role), None)])
        yield
        self._endpoint.thread.call(self._track.append, [(End(), None)])

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
        """So many states that go on from here, each by itself. They read the variables there are."""
        if number < 1:
            raise ValueError(f"a fork needs 1 state at least, not {number}")
        start = self._mark(number)
        return Forks(self._child(start) for _ in range(number))

    def _child(self, start: "concurrent.futures.Future[TrackPoint]") -> "State":
        child = State.__new__(State)
        child._begin(self._endpoint, start, dict(self._variables), self._family)
        return child

    # -- reading, waiting

    def __getitem__(self, name: str) -> str:
        return self.meta(name).text

    async def get(self, name: str) -> str:
        """The variable, for asyncio. Raises KeyError where nothing writes it, ProgramError where it failed."""
        return (await self.get_meta(name)).text

    def meta(self, name: str) -> Generated:
        """What a variable is, cost, and how it was chosen. Raises as `get`."""
        return self._raised(self._variable(name).ended)

    async def get_meta(self, name: str) -> Generated:
        """`meta`, for asyncio."""
        variable = self._variable(name)
        await until(variable.ended)
        return self._raised(variable.ended)

    def next_variable(self, over: "concurrent.futures.Future[None]") -> "concurrent.futures.Future[None]":
        """Done when the next variable is there, or the program is `over`."""
        heard: concurrent.futures.Future[None] = concurrent.futures.Future()
        lock = threading.Lock()

        def hear(*_: object) -> None:
            with lock:
                if not heard.done():
                    heard.set_result(None)

        self._listening.append(hear)
        over.add_done_callback(hear)
        return heard

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
            await until(variable.more_than(read))
            ended, pieces = variable.ended.done(), variable.pieces[read:]
            read += len(pieces)
            for piece in pieces:
                yield piece
            if ended:
                self._raised(variable.ended)
                return

    def wait(self) -> Transcript:
        """Until all that was appended is done: what has been said. Raises ProgramError."""
        return self._raised(self._mark()).transcript

    async def await_all(self) -> Transcript:
        """`wait`, for asyncio."""
        mark = self._mark()
        await until(mark)
        return self._raised(mark).transcript

    @property
    def error(self) -> str | None:
        """Why this state came to an end before its time; of a batch also what the function raised."""
        return self._failure or self._track.error

    def fail(self, error: Exception) -> None:
        """The program's function has ended with this."""
        self._failure = str(error) if isinstance(error, ProgramError) else f"{type(error).__name__}: {error}"

    @property
    def usage(self) -> ProgramUsage:
        """Of all calls of the program that have ended, its forks' included."""
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
        """End all calls of the program, its forks' included; whoever waits for one gets a ProgramError."""
        for state in list(self._family.states):
            with contextlib.suppress(ProgramError):  # closed: they have ended
                self._endpoint.thread.call(state._track.cancel, reason)

    def finish(self) -> None:
        """Until all states of the program are done. Raises ProgramError for an error that nobody has read."""
        for state in self._family.states:  # what they fork meanwhile, nobody does: the function has returned
            mark = state._mark()
            concurrent.futures.wait([mark])
            error = mark.exception()
            if error is not None and str(error) not in self._family.told:
                state._raised(mark)

    async def afinish(self) -> None:
        """`finish`, for asyncio."""
        for state in self._family.states:
            mark = state._mark()
            await until(mark)
            error = mark.exception()
            if error is not None and str(error) not in self._family.told:
                state._raised(mark)

    def _mark(self, forks: int = 0) -> "concurrent.futures.Future[TrackPoint]":
        reached: concurrent.futures.Future[TrackPoint] = concurrent.futures.Future()
        self._endpoint.thread.call(self._track.append, [(Mark(reached, forks), None)])
        return reached

    def _variable(self, name: str) -> Variable:
        try:
            return self._variables[name]
        except KeyError:
            known = ", ".join(self._variables) or "none"
            raise KeyError(f"no variable {name!r}; there are {known}") from None

    def _raised(self, future: "concurrent.futures.Future[T]") -> T:
        """Its result; an error is raised anew for each reader."""
        try:
            return future.result()
        except ProgramError as error:
            self._family.told.add(str(error))
            raise ProgramError(str(error)) from None


class Forks(list[State]):
    """The states of one fork, in their order."""

    def join(self) -> None:
        """Until all that was appended to them is done. Raises ProgramError, the first of theirs."""
        for each, mark in [(each, each._mark()) for each in self]:
            each._raised(mark)

    async def ajoin(self) -> None:
        """`join`, for asyncio."""
        marks = [(each, each._mark()) for each in self]
        for each, mark in marks:
            await until(mark)
            each._raised(mark)

    def values(self, name: str) -> list[str]:
        """The variable of each."""
        return [each[name] for each in self]

    async def avalues(self, name: str) -> list[str]:
        """`values`, for asyncio."""
        return [await each.get(name) for each in self]

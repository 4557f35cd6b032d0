"""A function that says a program, and the ways to run it: at once, in the background, many times, with asyncio."""

import asyncio
import concurrent.futures
import inspect
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from kvasir.program.endpoint import Endpoint
from kvasir.program.errors import ProgramError
from kvasir.program.prefix_gate import PrefixGate
from kvasir.program.state import State
from kvasir.program.track import TrackPoint
from kvasir.program.waiting import until
from kvasir_engine.interruptible import run_interruptible
from kvasir_engine.supervisor import ExpectedEnd, start_thread


class Program:
    """A function whose first parameter is the state; made by `program`."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._signature = inspect.signature(function)
        self._is_async = inspect.iscoroutinefunction(function)
        self.__name__ = getattr(function, "__name__", "program")
        self.__doc__ = function.__doc__

    def run(self, endpoint: Endpoint, **arguments: Any) -> State:
        """Run it, and wait for all that it has appended, forks included.

        Raises what the function raises, and ProgramError for a failed call that the function has not heard of.
        """
        self._check([arguments])
        state = State(endpoint)
        if self._is_async:
            run_interruptible(self._arun(state, arguments))
        else:
            self._run(state, arguments)
        return state

    async def arun(self, endpoint: Endpoint, **arguments: Any) -> State:
        """`run`, for asyncio; a function that is not async runs in a thread. Who is cancelled cancels its calls."""
        self._check([arguments])
        state = State(endpoint)
        await self._arun(state, arguments)
        return state

    def start(self, endpoint: Endpoint, **arguments: Any) -> "Running":
        """Run it in the background, so that its variables can be read as they are written."""
        self._check([arguments])
        state = State(endpoint)
        return Running(state, lambda: self._run(state, arguments))

    def run_batch(
        self,
        endpoint: Endpoint,
        batch: Sequence[Mapping[str, Any]],
        *,
        parallel: int = 16,
        share_prefix: bool = True,
    ) -> list[State]:
        """Run it for each arguments of `batch`, `parallel` at a time, and give their states in that order.

        One that failed has an `error`, and the others go on. With `share_prefix` the first call of all goes ahead
        until its first token, so that the others find in the server's cache what they have in common with it.
        """
        states = self._states(endpoint, batch, parallel, share_prefix)
        if self._is_async:
            run_interruptible(self._arun_all(states, batch, parallel))
            return states
        with ThreadPoolExecutor(parallel, "kvasir-program") as threads:
            work = [
                threads.submit(self._run_in_batch, state, each) for state, each in zip(states, batch, strict=True)
            ]
            try:
                concurrent.futures.wait(work)
            except BaseException:
                for each in work:
                    each.cancel()
                for state in states:
                    state.cancel()
                raise
        for each in work:
            each.result()
        return states

    async def arun_batch(
        self,
        endpoint: Endpoint,
        batch: Sequence[Mapping[str, Any]],
        *,
        parallel: int = 16,
        share_prefix: bool = True,
    ) -> list[State]:
        """`run_batch`, for asyncio."""
        states = self._states(endpoint, batch, parallel, share_prefix)
        await self._arun_all(states, batch, parallel)
        return states

    def _states(
        self, endpoint: Endpoint, batch: Sequence[Mapping[str, Any]], parallel: int, share_prefix: bool
    ) -> list[State]:
        if parallel < 1:
            raise ValueError(f"parallel has to be 1 at least, not {parallel}")
        self._check(batch)
        start = TrackPoint(gates=(PrefixGate(),)) if share_prefix and len(batch) > 1 else TrackPoint()
        return [State(endpoint, start) for _ in batch]

    def _check(self, batch: Sequence[Mapping[str, Any]]) -> None:
        """Raise TypeError before anything runs, rather than in the midst of it."""
        for arguments in batch:
            try:
                self._signature.bind(None, **arguments)
            except TypeError as error:
                raise TypeError(f"program {self.__name__}: {error}") from None

    def _run(self, state: State, arguments: Mapping[str, Any]) -> None:
        if self._is_async:
            run_interruptible(self._arun(state, arguments))
            return
        try:
            state.returned = self._function(state, **arguments)
            state.finish()
        except BaseException:
            state.cancel()
            raise

    def _run_in_batch(self, state: State, arguments: Mapping[str, Any]) -> None:
        try:
            self._run(state, arguments)
        except Exception as error:
            state.fail(error)

    async def _arun(self, state: State, arguments: Mapping[str, Any]) -> None:
        if not self._is_async:
            await _in_thread(lambda: self._run(state, arguments), state)
            return
        try:
            state.returned = await self._function(state, **arguments)
            await state.afinish()
        except BaseException:
            state.cancel()
            raise

    async def _arun_all(self, states: list[State], batch: Sequence[Mapping[str, Any]], parallel: int) -> None:
        free = asyncio.Semaphore(parallel)

        async def one(state: State, arguments: Mapping[str, Any]) -> None:
            async with free:
                try:
                    await self._arun(state, arguments)
                except Exception as error:
                    state.fail(error)

        async with asyncio.TaskGroup() as group:
            for state, arguments in zip(states, batch, strict=True):
                group.create_task(one(state, arguments))


def program(function: Callable[..., Any]) -> Program:
    """Make a program of a function, async or not, whose first parameter is the state."""
    return Program(function)


class Running:
    """A program that runs in a thread of its own."""

    def __init__(self, state: State, work: Callable[[], None]) -> None:
        self.state = state
        self._done: concurrent.futures.Future[None] = concurrent.futures.Future()
        start_thread(lambda: self._run(work), "kvasir-program-run", self._ended)

    def result(self, timeout: float | None = None) -> State:
        """The state, once all is done. Raises as `Program.run`, and TimeoutError."""
        self._done.result(timeout)
        return self.state

    async def aresult(self) -> State:
        """`result`, for asyncio."""
        await until(self._done)
        return self.result()

    def stream(self, name: str) -> Iterator[str]:
        """A variable's pieces; the program may not have come to it yet. Raises KeyError if it never does."""
        while not self._is_there(name, heard := self.state.next_variable(self._done)):
            heard.result()
        yield from self.state.stream(name)

    async def astream(self, name: str) -> AsyncIterator[str]:
        """`stream`, for asyncio."""
        while not self._is_there(name, heard := self.state.next_variable(self._done)):
            await until(heard)
        async for piece in self.state.astream(name):
            yield piece

    def cancel(self) -> None:
        """End its calls; what waits for one of them gets a ProgramError."""
        self.state.cancel()

    def _is_there(self, name: str, _: object) -> bool:
        """Whether the variable is; what would tell of it was made before, so that nothing is missed."""
        if name in self.state:
            return True
        if self._done.done():
            self._done.result()
            raise KeyError(f"the program has ended without a variable {name!r}")
        return False

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self._done.set_exception(error)
        else:
            self._done.set_result(None)
        raise ExpectedEnd

    def _ended(self, reason: str) -> None:
        if not self._done.done():
            self._done.set_exception(ProgramError(reason))


async def _in_thread(work: Callable[[], None], state: State) -> None:
    """Do it in a thread; who is cancelled meanwhile cancels the state's calls, and waits for the thread's end."""
    with ThreadPoolExecutor(1, "kvasir-program") as thread:
        future = thread.submit(work)
        try:
            await until(future)
        except BaseException:
            state.cancel()
            raise
        future.result()

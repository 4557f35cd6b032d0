"""A function that defines a program, and the ways to run it: at once, in the background, as a batch, with
asyncio."""

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
from kvasir.program.state_executor import StateSnapshot
from kvasir.program.waiting import wait_done
from kvasir_engine.interruptible import run_interruptible
from kvasir_engine.supervisor import ExpectedEnd, start_thread


class Program:
    """A program, made by `program` from a function whose first parameter is the state."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._signature = inspect.signature(function)
        self._is_async = inspect.iscoroutinefunction(function)
        self.__name__ = getattr(function, "__name__", "program")
        self.__doc__ = function.__doc__

    def run(self, endpoint: Endpoint, **arguments: Any) -> State:
        """Run the program, and wait until all that it appended is done, forks included.

        Raises what the function raises, and ProgramError for a failed call whose error the function did not get.
        """
        self._check([arguments])
        state = State(endpoint)
        if self._is_async:
            run_interruptible(self._arun(state, arguments))
        else:
            self._run(state, arguments)
        return state

    async def arun(self, endpoint: Endpoint, **arguments: Any) -> State:
        """`run`, for asyncio. A function that is not async runs in a thread. Cancellation cancels the program's
        calls."""
        self._check([arguments])
        state = State(endpoint)
        await self._arun(state, arguments)
        return state

    def start(self, endpoint: Endpoint, **arguments: Any) -> "Running":
        """Run the program in the background. Its variables can be read while they are written."""
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
        """Run the program once for each element of `batch`, `parallel` at a time; returns the states in that order.

        A run that failed has an `error`; the others continue. With `share_prefix` all other calls wait until the
        very first call has its first token, so that they find their common prefix in the server's cache.
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
        start = StateSnapshot(gates=(PrefixGate(),)) if share_prefix and len(batch) > 1 else StateSnapshot()
        return [State(endpoint, start) for _ in batch]

    def _check(self, batch: Sequence[Mapping[str, Any]]) -> None:
        """Raise TypeError for wrong arguments before anything runs."""
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
    """Make a program from a function, async or not, whose first parameter is the state."""
    return Program(function)


class Running:
    """A program that runs in a thread of its own."""

    def __init__(self, state: State, work: Callable[[], None]) -> None:
        self.state = state
        self._done: concurrent.futures.Future[None] = concurrent.futures.Future()
        start_thread(lambda: self._run(work), "kvasir-program-run", self._ended)

    def result(self, timeout: float | None = None) -> State:
        """Wait for the end; returns the state. Raises as `Program.run`, and TimeoutError."""
        self._done.result(timeout)
        return self.state

    async def aresult(self) -> State:
        """`result`, for asyncio."""
        await wait_done(self._done)
        return self.result()

    def stream(self, name: str) -> Iterator[str]:
        """The pieces of a variable, which may not be appended yet. Raises KeyError if it never is."""
        while not self._is_there(name, appended := self.state.next_variable(self._done)):
            appended.result()
        yield from self.state.stream(name)

    async def astream(self, name: str) -> AsyncIterator[str]:
        """`stream`, for asyncio."""
        while not self._is_there(name, appended := self.state.next_variable(self._done)):
            await wait_done(appended)
        async for piece in self.state.astream(name):
            yield piece

    def cancel(self) -> None:
        """End the program's calls. Waiting readers get a ProgramError."""
        self.state.cancel()

    def _is_there(self, name: str, _: object) -> bool:
        """Whether the variable is appended. The future of the next one is created first, so that none is missed."""
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
    """Run `work` in a thread. Cancellation cancels the state's calls, and waits for the end of the thread."""
    with ThreadPoolExecutor(1, "kvasir-program") as thread:
        future = thread.submit(work)
        try:
            await wait_done(future)
        except BaseException:
            state.cancel()
            raise
        future.result()

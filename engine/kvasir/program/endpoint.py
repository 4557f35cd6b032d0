"""The endpoint that programs call, and the thread whose event loop makes all calls."""

import asyncio
import concurrent.futures
import contextlib
import threading
import weakref
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any, Self

from kvasir.program.errors import ProgramError
from kvasir.program.selection import Selector
from kvasir_engine.client.chunks import AnswerEvent
from kvasir_engine.client.connection import CallError, EndpointConnection
from kvasir_engine.client.endpoint import CallTimeouts, EndpointAddress, address_of
from kvasir_engine.supervisor import ExpectedEnd, start_thread

Observe = Callable[[str, dict[str, Any]], None]
CLOSE_SECONDS = 10.0
_AGAIN = frozenset({"connect", "http_429", "http_503"})
_LONGEST_PAUSE = 10.0


class Calls:
    """Makes the calls of one endpoint in one event loop, at most `most` at a time. Calls that did not begin are
    retried."""

    def __init__(
        self,
        address: EndpointAddress,
        timeouts: CallTimeouts,
        model: str | None,
        extra: Mapping[str, Any],
        most: int,
        retries: int,
        observe: Observe | None,
    ) -> None:
        self._observe = observe
        self.selector = Selector()
        self._connection = EndpointConnection(address, timeouts)
        self._model, self._extra, self._retries = model, dict(extra), retries
        self._free, self._asking = asyncio.Semaphore(most), asyncio.Lock()

    async def __aenter__(self) -> Self:
        await self._connection.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._connection.__aexit__()

    async def ask(self, path: str, body: dict[str, Any]) -> bytes:
        """The body of an answer that is not streamed. Raises CallError and ProgramError."""
        whole = await self._whole(path, body)
        async with self._free:
            for attempt in range(self._retries + 1):
                try:
                    return await self._connection.ask(path, whole)
                except CallError as error:
                    await self._pause(error, attempt)
        raise AssertionError("the last attempt returns or raises")

    async def stream(self, path: str, body: dict[str, Any]) -> AsyncGenerator[AnswerEvent, None]:
        """The events of a streamed answer. Raises CallError and ProgramError."""
        whole = {**await self._whole(path, body), "stream": True, "stream_options": {"include_usage": True}}
        async with self._free:
            for attempt in range(self._retries + 1):
                begun = False
                try:
                    async with contextlib.aclosing(self._connection.stream(path, whole)) as events:
                        async for event in events:
                            begun = True
                            yield event
                    return
                except CallError as error:
                    if begun:
                        raise
                    await self._pause(error, attempt)

    async def _whole(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        async with self._asking:
            if self._model is None:
                names = await self._connection.models()
                if not names:
                    raise ProgramError("the endpoint serves no model")
                self._model = names[0]
        if self._observe is not None:
            self._observe(path, body)
        return {"model": self._model, **self._extra, **body}

    async def _pause(self, error: CallError, attempt: int) -> None:
        if error.kind not in _AGAIN or attempt == self._retries:
            raise error
        await asyncio.sleep(min(error.retry_after or 0.25 * 2**attempt, _LONGEST_PAUSE))


class LoopThread:
    """An event loop in a thread of its own, with the `Calls` that `make` gives."""

    def __init__(self, make: Callable[[], Calls]) -> None:
        self._lock, self._closed = threading.Lock(), False
        self.loop = asyncio.new_event_loop()
        self._begun: concurrent.futures.Future[Calls] = concurrent.futures.Future()
        self._leave = asyncio.Event()
        self._thread = start_thread(lambda: self._run(make), "kvasir-program", self._ended)
        self.calls = self._begun.result()

    def call(self, function: Callable[..., object], *arguments: Any) -> None:
        """Call `function` in the loop, in order. Raises ProgramError when the loop is closed."""
        with self._lock:  # calls before the end are cancelled with all others; none comes after it
            if self._closed:
                raise ProgramError("the endpoint is closed")
            self.loop.call_soon_threadsafe(function, *arguments)

    def close(self) -> None:
        """End all calls, and the thread. Waiting readers get the error that the endpoint is closed."""
        with self._lock:
            if not self._closed:
                self._closed = True
                with contextlib.suppress(RuntimeError):  # the loop failed
                    self.loop.call_soon_threadsafe(self._leave.set)
        if threading.current_thread() is not self._thread:
            self._thread.join(CLOSE_SECONDS)

    def _run(self, make: Callable[[], Calls]) -> None:
        with asyncio.Runner(loop_factory=lambda: self.loop) as runner:
            runner.run(self._serve(make))
        raise ExpectedEnd

    async def _serve(self, make: Callable[[], Calls]) -> None:
        try:
            calls = make()
            await calls.__aenter__()
        except BaseException as error:
            self._begun.set_exception(error)
            raise ExpectedEnd from None
        self._begun.set_result(calls)
        try:
            await self._leave.wait()
        finally:
            running = asyncio.all_tasks() - {asyncio.current_task()}
            for task in running:
                task.cancel("the endpoint was closed")
            await asyncio.gather(*running, return_exceptions=True)
            await calls.__aexit__()

    def _ended(self, reason: str) -> None:
        if not self._begun.done():
            self._begun.set_exception(ProgramError(reason))


class Endpoint:
    """An OpenAI-compatible endpoint for programs; close it, or use it in a `with`.

    `url` may end in `/v1` or not. `model` is by default the first of `/v1/models`, `api_key` the variable
    KVASIR_API_KEY or OPENAI_API_KEY. The fields of `extra_body` go into every request. At most `concurrency` calls
    run at a time. Every wait is bounded, in seconds: `connect_timeout` for a connection, `idle_timeout` between two
    bytes, `timeout` for a whole call. A call that finds no server, or an overloaded one (429, 503), is retried
    `retries` times. `observe` gets the path and body of each call, in another thread. Raises UserError.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        api_key: str | None = None,
        extra_body: Mapping[str, Any] | None = None,
        concurrency: int = 64,
        timeout: float = 600.0,
        idle_timeout: float = 120.0,
        connect_timeout: float = 10.0,
        retries: int = 2,
        observe: Observe | None = None,
    ) -> None:
        if concurrency < 1 or retries < 0:
            raise ValueError("concurrency has to be 1 at least, and retries 0")
        address = address_of(url, api_key)
        timeouts = CallTimeouts(connect_timeout, idle_timeout, timeout)
        extra = dict(extra_body or {})
        self.url = address.base
        self._thread = LoopThread(lambda: Calls(address, timeouts, model, extra, concurrency, retries, observe))
        self._finalizer = weakref.finalize(self, self._thread.close)

    @property
    def thread(self) -> LoopThread:
        """The thread that makes the calls."""
        return self._thread

    def close(self) -> None:
        """End all programs that still use the endpoint."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

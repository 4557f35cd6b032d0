"""Executes the steps that were appended to one state of a program, in order, in the endpoint's event loop."""

import asyncio
import concurrent.futures
import contextlib
import time
from collections import deque
from dataclasses import dataclass, field, replace

from kvasir.program.endpoint import Calls
from kvasir.program.errors import ProgramError
from kvasir.program.expressions import Begin, End, Gen, Select, Step
from kvasir.program.prefix_gate import PrefixGate
from kvasir.program.transcript import Transcript, gen_body
from kvasir.program.variable import Generated, Variable
from kvasir.program.waiting import wait_done
from kvasir_engine.client.chunks import CallUsage
from kvasir_engine.client.connection import CallError

GATED_CHARACTERS = 1000
"""With more text than this that no call has sent yet, forks wait until the first of them has cached it."""


@dataclass(frozen=True)
class StateSnapshot:
    """The state between two steps, from which a fork continues. `called`: how many characters a call has sent
    already. `gates`: those that the next call has to pass."""

    transcript: Transcript = field(default_factory=Transcript)
    called: int = 0
    gates: tuple[PrefixGate, ...] = ()

    def forked(self, forks: int) -> "StateSnapshot":
        """The snapshot from which each of `forks` forks continues."""
        gated = forks > 1 and self.transcript.length - self.called > GATED_CHARACTERS
        return replace(self, gates=(*self.gates, PrefixGate())) if gated else self


@dataclass(frozen=True)
class TakeSnapshot:
    """A step that sets `taken` to the snapshot at its place; with `forks`, to the one for so many forks."""

    taken: "concurrent.futures.Future[StateSnapshot]"
    forks: int = 0


class StateExecutor:
    """Executes steps from the snapshot `start` on. After an error it executes nothing more, and all later steps
    fail."""

    def __init__(self, calls: Calls, start: "concurrent.futures.Future[StateSnapshot]", url: str) -> None:
        self.point = StateSnapshot()
        self.error: str | None = None
        self._calls, self._url = calls, url
        self._start: concurrent.futures.Future[StateSnapshot] | None = start
        self._queue: deque[tuple[Step | TakeSnapshot, Variable | None]] = deque()
        self._task: asyncio.Task[None] | None = None

    def append(self, steps: list[tuple[Step | TakeSnapshot, Variable | None]]) -> None:
        """Execute these steps after all earlier ones."""
        self._queue.extend(steps)
        if self.error is not None:
            self._fail(self.error)
        elif self._task is None:
            self._task = asyncio.create_task(self._work())

    def cancel(self, reason: str) -> None:
        """Stop; all steps that have not ended fail with `reason`."""
        if self._task is not None:
            self._task.cancel(reason)
        elif self.error is None:
            self._fail(reason)

    async def _work(self) -> None:
        try:
            if self._start is not None:
                await wait_done(self._start)
                self.point = self._start.result()
                self._start = None
            while self._queue:
                await self._do(*self._queue[0])
                self._queue.popleft()
        except asyncio.CancelledError as error:
            self._fail(error.args[0] if error.args else "the endpoint was closed")
        except ProgramError as error:
            self._fail(str(error))
        except Exception as error:
            self._fail(f"{self._at()}: {type(error).__name__}: {error}")
        finally:
            self._task = None

    async def _do(self, step: Step | TakeSnapshot, variable: Variable | None) -> None:
        point = self.point
        match step:
            case str():
                self.point = replace(point, transcript=point.transcript.add(step))
            case Begin(role):
                self.point = replace(point, transcript=point.transcript.begin(role))
            case End():
                self.point = replace(point, transcript=point.transcript.end())
            case TakeSnapshot(taken, forks):
                taken.set_result(point.forked(forks))
            case Gen() | Select():
                assert variable is not None
                try:
                    async with _Passage(point.gates) as passage:
                        generated = await (
                            self._gen(step, variable, passage)
                            if isinstance(step, Gen)
                            else self._select(step, variable)
                        )
                except CallError as error:
                    raise ProgramError(f"{self._at()}: {self._url}: {error.kind}: {error}") from None
                except ProgramError as error:
                    raise ProgramError(f"{self._at()}: {error}") from None
                transcript = point.transcript.add(generated.text)
                self.point = StateSnapshot(transcript, transcript.length)
                variable.end(generated)

    async def _gen(self, gen: Gen, variable: Variable, passage: "_Passage") -> Generated:
        began, first = time.monotonic(), 0.0
        finish, usage, pieces = "", CallUsage(), list[str]()
        transcript = self.point.transcript
        async with contextlib.aclosing(self._calls.stream(transcript.path, gen_body(transcript, gen))) as events:
            async for event in events:
                usage = event.usage or usage
                for choice in event.choices[:1]:
                    finish = choice.finish_reason or finish
                    if choice.generated and not first:
                        first = time.monotonic() - began
                        passage.open()
                    if choice.content:
                        pieces.append(choice.content)
                        variable.write(choice.content)
        if not finish:
            raise ProgramError("the stream ended without a reason to finish")
        counts = (usage.prompt_tokens, usage.cached, usage.completion_tokens or 0)
        return Generated("".join(pieces), finish, *counts, 1, time.monotonic() - began, first)

    async def _select(self, select: Select, variable: Variable) -> Generated:
        began = time.monotonic()
        found = await self._calls.selector.select(self._calls.ask, self.point.transcript, select)
        variable.write(found.choice)
        seconds = time.monotonic() - began
        counts = (found.prompt_tokens, found.cached_tokens, found.completion_tokens, found.calls)
        return Generated(found.choice, "stop", *counts, seconds, seconds, found.method, found.scores)

    def _at(self) -> str:
        step = self._queue[0][0] if self._queue else None
        return f"{type(step).__name__.lower()} {step.name!r}" if isinstance(step, Gen | Select) else "the program"

    def _fail(self, reason: str) -> None:
        self.error = self.error or reason
        while self._queue:
            step, variable = self._queue.popleft()
            if variable is not None:
                variable.fail(self.error)
            elif isinstance(step, TakeSnapshot) and not step.taken.done():
                step.taken.set_exception(ProgramError(self.error))


class _Passage:
    """Passes gates one after another. The gates that this call leads open at the latest when it ends."""

    def __init__(self, gates: tuple[PrefixGate, ...]) -> None:
        self._gates, self._led = gates, list[PrefixGate]()

    async def __aenter__(self) -> "_Passage":
        try:
            for gate in self._gates:
                if await gate.enter():
                    self._led.append(gate)
        except BaseException:
            self.open()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        self.open()

    def open(self) -> None:
        """Open the gates that this call leads."""
        for gate in self._led:
            gate.open()

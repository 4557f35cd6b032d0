"""The engine's thread. It takes commands between steps, and sends each router one frame a step."""

import logging
import queue
import threading
import time
from collections.abc import Callable, Collection, Iterable
from itertools import groupby

from msgspec import structs

from kvasir_engine.core.engine import Engine
from kvasir_engine.core.step_meter import StepMeter
from kvasir_engine.kv.pages import Owner
from kvasir_engine.protocol import (
    ALIVE,
    COUNTS,
    Alive,
    CacheEvent,
    CacheEvents,
    Delta,
    Leased,
    Load,
    Step,
    ToRouter,
)
from kvasir_engine.supervisor import Ended

log = logging.getLogger("worker")

Sink = Callable[[list[ToRouter]], None]
Command = Callable[[Engine], None]

STALLED_AFTER = 60.0
ALIVE_SECONDS = 2.0
"""Between two frames that say which requests there are, while there are any."""
MOST_FRAME_SCORES = 8192
"""Scores of prompts' tokens in one frame: a few megabytes, of which a router reads 256."""
PREFILL_TOKENS = 32
"""A step that computes so many tokens is a prefill: its rate is worth noting."""
FENCED_SHARE, FENCED_SECONDS = 0.25, 30.0
"""With more of the pool than this share fenced for so long, no proof will come; a new process helps."""


class FenceWatch:
    """Detects that too many of a pool's `size` pages are fenced for too long."""

    def __init__(self, size: int) -> None:
        self._most = FENCED_SHARE * size
        self._since: float | None = None

    def stuck(self, fenced: int, now: float) -> bool:
        """Whether that is so, given the number of `fenced` pages at `now` (seconds of a monotonic clock)."""
        if fenced <= self._most:
            self._since = None
        elif self._since is None:
            self._since = now
        return self._since is not None and now >= self._since + FENCED_SECONDS


class EngineThread(threading.Thread):
    """Runs `engine` until `stop`. Sinks are called from this thread and must not block.

    On any other end `ended` and every session get the reason. `check_pages`: check after every step and command
    that every page has exactly one owner; if not, the thread ends with an error.
    """

    def __init__(self, engine: Engine, check_pages: bool = False, ended: Ended | None = None) -> None:
        super().__init__(name="kvasir-engine", daemon=True)
        self.engine = engine
        self._check_pages = check_pages
        self._fences = FenceWatch(engine.cache.pool.size)
        self._inbox: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._ended = ended
        self._over: str | None = None
        self._hear_end: dict[int, Ended] = {}
        self._sinks: dict[int, Sink] = {}
        self._alive: set[int] = set()  # sessions that want to hear which requests there are
        self._said_alive = 0.0
        self._uncounted: set[int] = set()  # sessions that do not know `Delta.cached`
        self._sessions = 0
        self._sessions_lock = threading.Lock()
        self._events = 0
        self._load = Load()
        self.meter = StepMeter()
        self._turn_began: float | None = None
        engine.grammars.wake = self._wake

    # -- from any thread

    def post(self, command: Command) -> None:
        """Run `command` between two steps."""
        self._inbox.put(command)

    def attach(self, sink: Sink, ended: Ended = lambda reason: None, speaks: Collection[str] = (COUNTS,)) -> int:
        """Open a session. Its sink gets a snapshot of the cache first. `speaks` are its
        router's capabilities: with ALIVE it also gets the list of its requests.

        `ended` gets the reason when this thread ends, from any thread.
        """
        with self._sessions_lock:
            self._sessions += 1
            session = self._sessions
            over = self._over
            if over is None:
                self._hear_end[session] = ended
        if over is not None:
            ended(over)
            return session

        def command(engine: Engine) -> None:
            self._sinks[session] = sink
            if COUNTS not in speaks:
                self._uncounted.add(session)
            if ALIVE in speaks:
                self._alive.add(session)
            sink([self._snapshot(), Step([], engine.load())])

        self.post(command)
        return session

    def detach(self, session: int) -> None:
        """Close a session and abort its requests."""

        with self._sessions_lock:
            self._hear_end.pop(session, None)

        def command(engine: Engine) -> None:
            self._sinks.pop(session, None)
            self._alive.discard(session)
            self._uncounted.discard(session)
            engine.close_session(session)

        self.post(command)

    def resync(self, session: int) -> None:
        """Send the session a snapshot of the cache."""

        def command(engine: Engine) -> None:
            if session in self._sinks:
                self._sinks[session]([self._snapshot()])

        self.post(command)

    def stop(self) -> None:
        """End the thread after the step under way."""
        self._inbox.put(None)
        self.join()
        if self.engine.grammars.service is not None:
            self.engine.grammars.service.close()

    def _wake(self) -> None:
        self.post(lambda engine: None)

    def unhealthy_reason(self) -> str | None:
        """Why this thread serves no requests, or `None`."""
        if not self.is_alive():
            return "the engine's thread is gone"
        if self.engine.connector is not None and not self.engine.connector.is_alive():
            return "the transfer thread is gone"
        fenced = self.engine.cache.pool.count(Owner.FENCED)
        if self._fences.stuck(fenced, time.monotonic()):
            return f"{fenced} pages wait for proof that their writers have stopped"
        began = self._turn_began
        if began is not None and time.monotonic() - began > STALLED_AFTER:
            return f"a step takes more than {STALLED_AFTER:.0f} s"
        return None

    # -- on this thread

    def run(self) -> None:
        reason = "the engine's thread ended"
        try:
            self._run()
        except BaseException as error:
            log.exception("the engine's thread fails")
            reason = f"the engine's thread failed: {type(error).__name__}: {error}"
        with self._sessions_lock:
            self._over, hearing = reason, list(self._hear_end.values())
            self._hear_end.clear()
        for ended in hearing:
            ended(reason)
        if not self._stopping and self._ended is not None:
            self._ended(reason)

    def _run(self) -> None:
        idle = True
        while True:
            self._turn_began = None
            command = self._next(wait=idle)
            self._turn_began = time.monotonic()
            while command is not None:
                command(self.engine)
                command = self._next(wait=False)
            if self._stopping:
                return
            idle = not (self.engine.busy and self._step())
            if self._check_pages and not self._conserved():
                return
            self._flush()
            self._say_alive(time.monotonic())

    _stopping = False

    def _next(self, wait: bool) -> Command | None:
        try:
            # Who waits for something from elsewhere is told now and then that it is not forgotten.
            command = self._inbox.get(wait, ALIVE_SECONDS if self.engine.jobs else None)
        except queue.Empty:
            return None
        if command is None:
            self._stopping = True
        return command

    def _step(self) -> bool:
        began, computed = time.perf_counter(), self.engine.stats.computed_tokens
        try:
            return self.engine.step()
        except Exception:
            log.exception("a step failed; the requests in it fail, the engine goes on")
            self.engine.fail_all("internal_error", "a step failed; the worker's log says why")
            return True
        finally:
            seconds = time.perf_counter() - began
            self.engine.stats.steps += 1
            self.engine.stats.step_seconds += seconds
            computed = self.engine.stats.computed_tokens - computed
            self.meter.step(seconds, computed)
            if computed >= PREFILL_TOKENS:
                rate = self.engine.prefill_rate or computed / seconds
                self.engine.prefill_rate = 0.8 * rate + 0.2 * computed / seconds

    def _conserved(self) -> bool:
        try:
            self.engine.check()
        except AssertionError:
            log.exception("pages are not conserved; the worker is unhealthy from now on")
            return False
        return True

    def _flush(self) -> None:
        load = self.engine.load()
        out = self.engine.drain()
        self.meter.computed(sum(_first_tokens(items) for items in out.values()))
        events = list(_runs(self.engine.cache.tree.log.drain()))
        shared: list[ToRouter] = []
        if events:
            self._events += 1
            shared.append(CacheEvents(self._events, events))
        for session, sink in self._sinks.items():
            frames = shared + list(_frames(out.get(session, ()), load, session not in self._uncounted))
            if load != self._load and not any(isinstance(frame, Step) for frame in frames):
                frames.append(Step([], load))
            if frames:
                sink(frames)
        self._load = load

    def _say_alive(self, now: float) -> None:
        if not self._alive or now < self._said_alive + ALIVE_SECONDS or not self.engine.jobs:
            return
        self._said_alive = now
        for session in self._alive:
            self._sinks[session]([Alive([request for owner, request in self.engine.jobs if owner == session])])

    def _snapshot(self) -> CacheEvents:
        hashes = list(self.engine.cache.tree.hashes())
        return CacheEvents(self._events, [CacheEvent(stored=hashes)] if hashes else [], snapshot=True)


def _runs(entries: Iterable[tuple[bool, int]]) -> Iterable[CacheEvent]:
    """The log's entries as runs of stored or evicted pages, in order."""
    for stored, run in groupby(entries, key=lambda entry: entry[0]):
        hashes = [hash_ for _, hash_ in run]
        yield CacheEvent(stored=hashes) if stored else CacheEvent(evicted=hashes)


def _first_tokens(items: Iterable[Delta | Leased]) -> int:
    return sum(isinstance(each, Delta) and each.index == 0 and bool(each.tokens) for each in items)


def _frames(items: Iterable[Delta | Leased], load: Load, counts: bool) -> Iterable[ToRouter]:
    """The frames of a session: leases first, since other workers wait for them, then the tokens of all streams in
    one."""
    items = list(items)
    yield from (item for item in items if isinstance(item, Leased))
    deltas = [item for item in items if isinstance(item, Delta)]
    if deltas:
        if not counts:
            deltas = [structs.replace(delta, cached=0) for delta in deltas]
        yield from (Step(some, load) for some in _shares(deltas))


def _shares(deltas: list[Delta]) -> Iterable[list[Delta]]:
    """The deltas in order, divided into lists with a limited number of scores each."""
    some: list[Delta] = []
    scores = 0
    for delta in deltas:
        scores += len(delta.prompt_logprobs)
        if some and delta.prompt_logprobs and scores > MOST_FRAME_SCORES:
            yield some
            some, scores = [], len(delta.prompt_logprobs)
        some.append(delta)
    yield some

"""Measures a router's sequences for the operator's scaling planner. The clock is an argument."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kvasir_engine.rolling_window import Window
from kvasir_engine.status_reports import COST_SECONDS, LOAD_SECONDS, RouterLoad


class LoadMeter:
    """The measurements of one router. Not thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._arrivals = Window(LOAD_SECONDS, clock)
        self._ttft = Window(LOAD_SECONDS, clock)
        self._itl = Window(LOAD_SECONDS, clock)
        self._decode = Window(COST_SECONDS, clock)
        self._held = 0
        self._released = 0
        self._running = 0
        self._idle_since = clock()

    @property
    def held(self) -> int:
        """Requests that wait for the first worker."""
        return self._held

    @contextmanager
    def hold(self) -> Iterator["HeldRequest"]:
        """Count a held request. It counts as arrived now, not when it and the others are released."""
        self._arrivals.add()
        self._held += 1
        hold = HeldRequest()
        try:
            yield hold
        finally:
            self._held -= 1
            self._released += hold.released
            self._rest()

    @contextmanager
    def sequence(self) -> Iterator["Stopwatch"]:
        """Measure a sequence while it is generated."""
        if self._released:
            self._released -= 1  # it was counted when it came
        else:
            self._arrivals.add()
        self._running += 1
        watch = Stopwatch(self._clock, self._ttft, self._itl)
        try:
            yield watch
        finally:
            self._running -= 1
            self._rest()
            if watch.decoded is not None:
                self._decode.add(watch.decoded)

    def report(self) -> RouterLoad:
        """The load at this moment."""
        return RouterLoad(
            seconds=self._arrivals.covers,
            arrivals=self._arrivals.sum().count,
            held=self._held,
            idle=0.0 if self._held or self._running else self._clock() - self._idle_since,
            ttft=self._ttft.sum(),
            itl=self._itl.sum(),
            decode=self._decode.sum(),
        )

    def _rest(self) -> None:
        self._idle_since = self._clock()


class HeldRequest:
    """A request that is held; `released` says whether it went to a worker."""

    released = False


class Stopwatch:
    """Times the tokens of one sequence."""

    def __init__(self, clock: Callable[[], float], ttft: Window, itl: Window) -> None:
        self._clock = clock
        self._ttft = ttft
        self._itl = itl
        self._began = clock()
        self._first: float | None = None
        self._last = 0.0

    def tokens(self, count: int) -> None:
        """Note that so many tokens arrived together."""
        if not count:
            return
        now = self._clock()
        if self._first is None:
            self._first = now
            self._ttft.add(now - self._began)
        else:
            self._itl.add(now - self._last, count)
        self._last = now

    @property
    def decoded(self) -> float | None:
        """Seconds from the first token to the last; `None` if there was none."""
        return None if self._first is None else self._last - self._first

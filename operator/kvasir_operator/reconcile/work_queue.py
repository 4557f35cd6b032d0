"""A queue of things to reconcile: each at most once at a time, with a growing delay after failures."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

import msgspec

from kvasir_operator.cluster.interface import ClusterError

log = logging.getLogger("kvasir.queue")

Key = TypeVar("Key")


class RequeueDelays(msgspec.Struct, frozen=True):
    """Delays in seconds: `settle` gathers bursts of events, `base` doubles up to `cap` after failures in a row, and
    `resync` brings a thing back though nothing happened, should a watch have missed something."""

    settle: float = 0.05
    base: float = 0.5
    cap: float = 30.0
    resync: float = 300.0

    def delay(self, failures: int) -> float:
        """The delay after the `failures`-th failure in a row, from 1."""
        return min(self.cap, self.base * 2.0 ** (failures - 1))


class WorkQueue(Generic[Key]):
    """Calls `handle` for the keys that are added, `parallel` at a time. To be used in one event loop.

    A key that is added while it is handled is handled once more afterwards. `handle` returns False when the key's
    thing is gone and needs no resync; when it raises, the key comes back after a delay.
    """

    def __init__(
        self, handle: Callable[[Key], Awaitable[bool]], parallel: int = 8, delays: RequeueDelays | None = None
    ) -> None:
        self._handle = handle
        self._delays = delays or RequeueDelays()
        self._slots = asyncio.Semaphore(parallel)
        self._dirty: set[Key] = set()
        self._tasks: dict[Key, asyncio.Task[None]] = {}
        self._backoffs: dict[Key, asyncio.Event] = {}
        self._resyncs: dict[Key, asyncio.TimerHandle] = {}
        self._later: dict[Key, asyncio.TimerHandle] = {}

    def add(self, key: Key, *, now: bool = False) -> None:
        """Have `key` handled soon; `now`: also when it just failed and would have to wait."""
        self._dirty.add(key)
        if key not in self._tasks:
            self._tasks[key] = asyncio.create_task(self._work(key), name=f"work on {key}")
        elif now and (backoff := self._backoffs.get(key)):
            backoff.set()

    def add_later(self, key: Key, seconds: float) -> None:
        """Have `key` handled in `seconds`, once, however often this is called until then: the soonest counts."""
        loop = asyncio.get_running_loop()
        if timer := self._later.get(key):
            if timer.when() <= loop.time() + seconds:
                return
            timer.cancel()
        self._later[key] = loop.call_later(seconds, self._add_now, key)

    def _add_now(self, key: Key) -> None:
        del self._later[key]
        self.add(key)

    async def close(self) -> None:
        """Stop; what is being handled is cancelled."""
        for timer in (*self._resyncs.values(), *self._later.values()):
            timer.cancel()
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _work(self, key: Key) -> None:
        failures, alive = 0, True
        try:
            while key in self._dirty:
                if failures:
                    await self._back_off(key, self._delays.delay(failures))
                await asyncio.sleep(self._delays.settle)
                self._dirty.discard(key)
                async with self._slots:
                    try:
                        alive = await self._handle(key)
                        failures = 0
                    except Exception as error:
                        failures += 1
                        self._dirty.add(key)
                        delay = self._delays.delay(failures)
                        bug = not isinstance(error, ClusterError)  # only then does a traceback help
                        log.warning("failed key=%s retry_seconds=%g reason=%s", key, delay, error, exc_info=bug)
        finally:
            del self._tasks[key]
        self._resync(key, alive)

    async def _back_off(self, key: Key, seconds: float) -> None:
        backoff = self._backoffs[key] = asyncio.Event()
        try:
            async with asyncio.timeout(seconds):
                await backoff.wait()
        except TimeoutError:
            pass
        finally:
            del self._backoffs[key]

    def _resync(self, key: Key, alive: bool) -> None:
        if timer := self._resyncs.pop(key, None):
            timer.cancel()
        if alive:
            self._resyncs[key] = asyncio.get_running_loop().call_later(self._delays.resync, self.add, key)

"""No task and no thread ends unseen: whatever runs in the background is started here, with who hears of its end.

A test refuses every other way to start one, but for tasks that their own function awaits.
"""

import asyncio
import logging
import os
import sys
import threading
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn

log = logging.getLogger("supervise")

Ended = Callable[[str], None]
"""Hears, in a few words, what has ended and why."""


class Supervisor:
    """The background tasks of one event loop. `ended` hears of each that ends and was not stopped here.

    `reason` is why the process serves no more, once a task without an `ended` of its own has ended.
    """

    def __init__(self, ended: Ended | None = None) -> None:
        self.reason: str | None = None
        self.over = asyncio.Event()
        """Set with `reason`."""
        self._ended = ended
        self._tasks: dict[asyncio.Task[Any], Ended] = {}

    def start(self, work: Coroutine[Any, Any, Any], name: str, ended: Ended | None = None) -> asyncio.Task[Any]:
        """Run `work`, which is not to end. If it does, by whatever reason, a line is logged, and `ended` hears it.

        Without `ended` the process is over.
        """
        task = asyncio.create_task(work, name=name)
        self._tasks[task] = ended or self.end
        task.add_done_callback(self._done)
        return task

    def end(self, reason: str) -> None:
        """The process serves no more."""
        if self.reason is None:
            self.reason = reason
            self.over.set()
            if self._ended is not None:
                self._ended(reason)

    async def stop(self, *tasks: asyncio.Task[Any]) -> None:
        """End these tasks, and wait until they have."""
        ending = tasks
        for task in ending:
            self._tasks.pop(task, None)
            task.cancel()
        await asyncio.gather(*ending, return_exceptions=True)

    def forget(self, task: "asyncio.Task[Any] | None") -> None:
        """The task is at its end, as it is meant to be."""
        self._tasks.pop(task, None)  # type: ignore[arg-type]

    @property
    def names(self) -> list[str]:
        """What runs."""
        return sorted(task.get_name() for task in self._tasks)

    def _done(self, task: asyncio.Task[Any]) -> None:
        ended = self._tasks.pop(task, None)
        if ended is None:
            return
        error = None if task.cancelled() else task.exception()
        reason = f"{task.get_name()} {_how(error, task.cancelled())}"
        log.error("task ended reason=%r", reason, exc_info=error)
        ended(reason)


def start_thread(work: Callable[[], object], name: str, ended: Ended) -> threading.Thread:
    """Run `work`, which is not to end but by leaving for good (`expected`). `ended` hears of any other end, from
    the thread."""
    thread = threading.Thread(target=watched(work, name, ended), name=name, daemon=True)
    thread.start()
    return thread


class ExpectedEnd(Exception):
    """Raised by a thread's work to end as it is meant to."""


def watched(work: Callable[[], object], name: str, ended: Ended) -> Callable[[], None]:
    """`work`, with `ended` to hear of its end."""

    def run() -> None:
        error: BaseException | None = None
        try:
            work()
        except ExpectedEnd:
            return
        except BaseException as raised:
            error = raised
        reason = f"{name} {_how(error, False)}"
        log.error("thread ended reason=%r", reason, exc_info=error)
        ended(reason)

    return run


def end_process(reason: str) -> NoReturn:
    """End this process at once, with one line that says why: its sockets close, so nobody waits for it."""
    sys.stderr.write(f"kvasir: error: {reason}\n")
    sys.stderr.flush()
    os._exit(1)


def _how(error: BaseException | None, cancelled: bool) -> str:
    if cancelled:
        return "was cancelled"
    return "ended" if error is None else f"failed: {type(error).__name__}: {error}"

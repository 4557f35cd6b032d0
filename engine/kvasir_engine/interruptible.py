"""`asyncio.run` for commands of a terminal: Ctrl-C is noticed at once, whatever the loop is doing."""

import asyncio
import contextlib
import signal
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


def run_interruptible(work: Coroutine[Any, Any, T], runner: asyncio.Runner | None = None) -> T:
    """What `work` returns, run by `runner` or a new one. Raises KeyboardInterrupt where Ctrl-C cancelled it.

    By a handler of the loop: that of `asyncio.Runner` is called only when the loop awakes, and a signal that comes
    just before the loop sleeps does not wake it. A second Ctrl-C does not wait for what `work` does at its end.
    A process that ignores SIGINT, as a shell's background job does, goes on ignoring it.
    """
    interrupts = 0

    async def watched() -> T:
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None

        def interrupted() -> None:
            nonlocal interrupts
            interrupts += 1
            if interrupts > 1:
                raise KeyboardInterrupt
            task.cancel()

        loop.add_signal_handler(signal.SIGINT, interrupted)
        try:
            return await work
        finally:
            loop.remove_signal_handler(signal.SIGINT)

    heeds = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    heeds = heeds and threading.current_thread() is threading.main_thread()
    with asyncio.Runner() if runner is None else contextlib.nullcontext(runner) as running:
        try:
            return running.run(watched() if heeds else work)
        except asyncio.CancelledError:
            if not interrupts:
                raise
            raise KeyboardInterrupt from None

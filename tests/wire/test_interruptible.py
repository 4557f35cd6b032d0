"""Ctrl-C ends what a command's loop does, whatever the loop is doing when it comes."""

import ast
import asyncio
import os
import selectors
import signal
import threading
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvasir_engine.interruptible import run_interruptible

ROOT = Path(__file__).parents[2]
PLAIN = {
    "engine/kvasir_engine/interruptible.py": "it is what others use",
    "engine/kvasir_engine/client/terminal/console.py": "its runner is given to run_interruptible",
    "engine/kvasir/program/endpoint.py": "in a thread",
    "engine/kvasir_engine/entrypoints/child_process.py": "a part of a server, which ignores Ctrl-C",
    "operator/kvasir_operator/local/cli.py": "the supervisor has handlers of the loop from its first line on",
    "operator/kvasir_operator/local/detached.py": "as there, and no terminal",
    "operator/kvasir_operator/reconcile/bounded_http.py": "in a thread, with a deadline",
}


@pytest.fixture(autouse=True)
def heeded() -> Iterator[None]:
    """As in a terminal: a shell's background job, which the tests may be, ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Asleep(selectors.DefaultSelector):
    """Says when its loop goes to sleep."""

    def __init__(self) -> None:
        super().__init__()
        self.now = threading.Event()

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None or timeout > 1:
            self.now.set()
        return super().select(timeout)


def interrupt() -> None:
    """Ctrl-C, as a thread of this process gets it: no call of the main thread is interrupted."""
    signal.pthread_kill(threading.get_ident(), signal.SIGINT)


def run(work: Coroutine[Any, Any, Any], asleep: Asleep) -> Any:
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(asleep)) as runner:
        return run_interruptible(work, runner)


async def forever(ends: list[str] | None = None) -> None:
    """Up to a bound that no test reaches."""
    try:
        async with asyncio.timeout(300):
            await asyncio.Event().wait()
    finally:
        if ends is not None:
            ends.append("cleaned up")


def test_ctrl_c_wakes_a_loop_whose_sleep_it_does_not_interrupt() -> None:
    asleep, ends = Asleep(), list[str]()

    def press() -> None:
        assert asleep.now.wait(300)
        interrupt()

    thread = threading.Thread(target=press)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        run(forever(ends), asleep)
    thread.join()
    assert ends == ["cleaned up"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_second_ctrl_c_does_not_wait_for_the_end_of_the_work() -> None:
    asleep, ends = Asleep(), list[str]()

    async def slow_to_end() -> None:
        try:
            await forever()
        finally:
            asleep.now.clear()
            await forever(ends)
            ends.append("waited for")

    def press() -> None:
        for _ in range(2):
            assert asleep.now.wait(300)
            asleep.now.clear()
            interrupt()

    thread = threading.Thread(target=press)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        run(slow_to_end(), asleep)
    thread.join()
    assert ends == ["cleaned up"]


def test_a_process_that_ignores_it_goes_on_ignoring_it() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    async def interrupted() -> str:
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.sleep(0)
        return "done"

    assert run_interruptible(interrupted()) == "done"
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_a_runner_goes_on_after_ctrl_c_and_errors_and_cancellations_are_their_own() -> None:
    async def interrupted() -> None:
        signal.raise_signal(signal.SIGINT)
        await forever()

    async def broken() -> None:
        raise ValueError("broken")

    async def cancelled() -> None:
        raise asyncio.CancelledError

    async def done() -> int:
        return 7

    with asyncio.Runner() as runner:
        with pytest.raises(KeyboardInterrupt):
            run_interruptible(interrupted(), runner)
        with pytest.raises(ValueError, match="broken"):
            run_interruptible(broken(), runner)
        with pytest.raises(asyncio.CancelledError):
            run_interruptible(cancelled(), runner)
        assert run_interruptible(done(), runner) == 7


def test_a_thread_has_no_ctrl_c_to_wait_for() -> None:
    async def done() -> int:
        return 7

    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(run_interruptible(done())))
    thread.start()
    thread.join(300)
    assert found == [7]


def test_no_command_runs_a_loop_that_notices_ctrl_c_only_when_it_awakes() -> None:
    found = set()
    for path in [*(ROOT / "engine").rglob("*.py"), *(ROOT / "operator").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Attribute(ast.Name("asyncio"), "run" | "Runner"):
                    found.add(str(path.relative_to(ROOT)))
    assert found == PLAIN.keys()

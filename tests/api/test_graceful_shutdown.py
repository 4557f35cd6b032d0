"""Draining: unready at once, done when nothing is in flight, at the deadline, or when it stops waiting."""

import asyncio
import json
import os
import socket
import stat
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import typer
from fastapi import FastAPI

from kvasir_engine.api.http import graceful_shutdown
from kvasir_engine.api.http.graceful_shutdown import GracefulShutdown
from kvasir_engine.api.http.server import check_port, serve
from kvasir_engine.api.lifecycle import Lifecycle
from kvasir_engine.entrypoints.drain import drain
from kvasir_engine.errors import UserError
from kvasir_engine.private_folders import RUN_VARIABLE, NotPrivate, drain_socket, run_folder


class Clock:
    """Stands in for `time` in who leaves: it goes on when the test says so."""

    def __init__(self) -> None:
        self.now = 100.0
        self._looks = 0

    def monotonic(self) -> float:
        self._looks += 1
        return self.now

    async def looked_at(self) -> None:
        """Wait until the time is seen as it is now: a turn looks at it twice."""
        enough = self._looks + 5
        async with asyncio.timeout(60):
            while self._looks < enough:  # noqa: ASYNC110
                await asyncio.sleep(0.005)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(graceful_shutdown, "time", clock)
    return clock


@asynccontextmanager
async def serving(leaving: GracefulShutdown) -> AsyncIterator[int]:
    """The port whose process hears of `leaving`."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        host, port = sock.getsockname()
        async with leaving.listening_at(drain_socket(host, port)):
            yield port


async def test_the_hook_returns_when_nothing_is_in_flight_and_not_before() -> None:
    lifecycle = Lifecycle()
    async with serving(GracefulShutdown(lifecycle, 600.0)) as port:
        with lifecycle.request():
            hook = asyncio.create_task(asyncio.to_thread(drain, "127.0.0.1", port, 0.0))
            async with asyncio.timeout(60):
                while not lifecycle.draining:  # noqa: ASYNC110
                    await asyncio.sleep(0.005)
            assert not hook.done()
        await asyncio.wait_for(hook, 60)


async def test_at_the_deadline_it_is_over_whatever_runs_and_the_second_wait_does_not_begin_anew(
    clock: Clock,
) -> None:
    lifecycle = Lifecycle()
    leaving = GracefulShutdown(lifecycle, 600.0)
    assert leaving.seconds_left is None
    with lifecycle.request():
        waiting = asyncio.create_task(leaving.done())
        await clock.looked_at()
        assert leaving.seconds_left == 600.0
        clock.now += 600.0
        assert await asyncio.wait_for(waiting, 60) == 1
        assert leaving.seconds_left == 0.0
        again = asyncio.create_task(leaving.done())
        await asyncio.sleep(0)
        assert again.done()
        assert again.result() == 1


async def test_another_reason_to_leave_is_as_good_as_a_signal() -> None:
    lifecycle, until = Lifecycle(), asyncio.Event()
    sock = socket.create_server(("127.0.0.1", 0))
    with lifecycle.request():
        served = asyncio.create_task(serve(FastAPI(), sock, GracefulShutdown(lifecycle, 600.0), until))
        until.set()
        async with asyncio.timeout(60):
            while not lifecycle.draining:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        assert not served.done()
    await asyncio.wait_for(served, 60)


async def test_a_second_signal_hurries() -> None:
    lifecycle = Lifecycle()
    leaving = GracefulShutdown(lifecycle, 600.0)
    with lifecycle.request():
        waiting = asyncio.create_task(leaving.done())
        await asyncio.sleep(0)
        leaving.stop_waiting()
        assert await asyncio.wait_for(waiting, 60) == 1


async def test_quiet_counts_from_the_last_request(clock: Clock) -> None:
    lifecycle = Lifecycle()
    leaving = GracefulShutdown(lifecycle, 600.0)
    waiting = asyncio.create_task(leaving.done(quiet=4.0))
    await clock.looked_at()
    clock.now += 3.0
    with lifecycle.request():
        await clock.looked_at()
    clock.now += 3.0
    await clock.looked_at()
    assert not waiting.done()
    clock.now += 1.0
    assert await asyncio.wait_for(waiting, 60) == 0


async def test_a_process_that_does_not_serve_has_nothing_to_drain() -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    await asyncio.to_thread(drain, "0.0.0.0", port, 0.0)


async def test_a_hook_that_is_refused_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    async with serving(GracefulShutdown(Lifecycle(), 1.0)) as port:
        with pytest.raises(typer.Exit):
            await asyncio.to_thread(drain, "127.0.0.1", port, -1.0)
    assert "answered" in capsys.readouterr().err


def test_a_folder_whose_path_is_too_long_for_a_socket_is_said_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(RUN_VARIABLE, str(tmp_path / ("long" * 30)))
    with pytest.raises(UserError, match="the path is too long; set KVASIR_RUN_DIR"):
        check_port("127.0.0.1", 0)


async def test_no_other_user_may_connect_to_the_socket() -> None:
    async with serving(GracefulShutdown(Lifecycle(), 1.0)) as port:
        path = drain_socket("127.0.0.1", port)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert not path.exists()


async def test_what_is_no_question_drains_nothing() -> None:
    lifecycle = Lifecycle()
    async with serving(GracefulShutdown(lifecycle, 600.0)) as port:
        for said in (b"POST /drain HTTP/1.1\n", b"\n", b'{"quiet": "x"}\n', b'{"quick": 1}\n', b"[" * 4000 + b"\n"):
            reader, writer = await asyncio.open_unix_connection(drain_socket("127.0.0.1", port))
            writer.write(said)
            assert "error" in json.loads(await reader.readline())
            writer.close()
    assert not lifecycle.draining


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda folder: folder.mkdir(mode=0o755), "has mode 0755, not 0700"),
        (lambda folder: folder.symlink_to("/tmp"), "is not a folder of its own"),
        (lambda folder: folder.write_text(""), "is not a folder of its own"),
    ],
)
def test_a_folder_that_others_could_write_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Path], None], reason: str
) -> None:
    folder = tmp_path / "run"
    spoil(folder)
    monkeypatch.setenv(RUN_VARIABLE, str(folder))
    with pytest.raises(NotPrivate, match=reason):
        run_folder()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a folder away")
def test_a_folder_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    folder.mkdir(mode=0o700)
    os.chown(folder, 65534, 65534)
    monkeypatch.setenv(RUN_VARIABLE, str(folder))
    with pytest.raises(NotPrivate, match="belongs to user 65534"):
        run_folder()

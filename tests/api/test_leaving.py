"""Draining: unready at once, done when nothing is in flight, at the deadline, or when told to hurry."""

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest
import typer
import uvicorn
from fastapi import FastAPI

from kvasir_engine.api.drain import drain
from kvasir_engine.api.leaving import Leaving, _same_machine
from kvasir_engine.api.lifecycle import Lifecycle
from kvasir_engine.api.server import serve


@asynccontextmanager
async def serving(leaving: Leaving) -> AsyncIterator[int]:
    """The port at which `leaving` can be asked for."""
    app = FastAPI()
    leaving.mount(app)
    with socket.create_server(("127.0.0.1", 0)) as sock:
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off"))
        running = asyncio.create_task(server.serve(sockets=[sock]))
        try:
            yield sock.getsockname()[1]
        finally:
            server.should_exit = True
            await running


async def test_the_hook_returns_when_nothing_is_in_flight_and_not_before() -> None:
    lifecycle = Lifecycle()
    async with serving(Leaving(lifecycle, 600.0)) as port:
        with lifecycle.request():
            hook = asyncio.create_task(asyncio.to_thread(drain, "127.0.0.1", port, 0.0))
            async with asyncio.timeout(10):
                while not lifecycle.draining:  # noqa: ASYNC110
                    await asyncio.sleep(0.005)
            await asyncio.sleep(0.2)
            assert not hook.done()
        await asyncio.wait_for(hook, 10)


async def test_at_the_deadline_it_is_over_whatever_runs_and_the_second_wait_does_not_begin_anew() -> None:
    lifecycle = Lifecycle()
    leaving = Leaving(lifecycle, 0.15)
    assert leaving.seconds_left is None
    with lifecycle.request():
        assert await leaving.done() == 1
        assert leaving.seconds_left == 0.0
        async with asyncio.timeout(0.1):
            assert await leaving.done() == 1


async def test_another_reason_to_leave_is_as_good_as_a_signal() -> None:
    lifecycle, until = Lifecycle(), asyncio.Event()
    sock = socket.create_server(("127.0.0.1", 0))
    with lifecycle.request():
        served = asyncio.create_task(serve(FastAPI(), sock, Leaving(lifecycle, 600.0), until))
        until.set()
        async with asyncio.timeout(10):
            while not lifecycle.draining:  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        assert not served.done()
    await asyncio.wait_for(served, 10)


async def test_a_second_signal_hurries() -> None:
    lifecycle = Lifecycle()
    leaving = Leaving(lifecycle, 600.0)
    with lifecycle.request():
        waiting = asyncio.create_task(leaving.done())
        await asyncio.sleep(0)
        leaving.hurry()
        assert await asyncio.wait_for(waiting, 10) == 1


async def test_quiet_counts_from_the_last_request() -> None:
    lifecycle = Lifecycle()
    leaving = Leaving(lifecycle, 600.0)
    waiting = asyncio.create_task(leaving.done(quiet=0.4))
    await asyncio.sleep(0.2)
    with lifecycle.request():
        await asyncio.sleep(0.3)
    ended = time.monotonic()
    assert await asyncio.wait_for(waiting, 10) == 0
    assert time.monotonic() - ended >= 0.3


async def test_a_process_that_does_not_serve_has_nothing_to_drain() -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    await asyncio.to_thread(drain, "0.0.0.0", port, 0.0)


async def test_a_hook_that_is_refused_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    async with serving(Leaving(Lifecycle(), 1.0)) as port:
        with pytest.raises(typer.Exit):
            await asyncio.to_thread(drain, "127.0.0.1", port, -1.0)
    assert "answered" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("client", "server", "allowed"),
    [
        (("127.0.0.1", 5), ("127.0.0.1", 8000), True),
        (("127.0.3.4", 5), ("127.0.3.4", 8000), True),
        (("10.1.2.3", 5), ("10.1.2.3", 8000), True),
        (("::1", 5), ("::1", 8000), True),
        (("10.1.2.4", 5), ("10.1.2.3", 8000), False),
        (None, ("10.1.2.3", 8000), False),
    ],
)
def test_only_this_machine_may_ask(client: tuple[str, int] | None, server: tuple[str, int], allowed: bool) -> None:
    assert _same_machine({"client": client, "server": server}) is allowed


async def test_a_stranger_is_refused_and_nothing_happens() -> None:
    app, lifecycle = FastAPI(), Lifecycle()
    Leaving(lifecycle, 600.0).mount(app)
    transport = httpx.ASGITransport(app, client=("10.9.9.9", 1))
    async with httpx.AsyncClient(transport=transport, base_url="http://10.1.1.1:8000") as http:
        assert (await http.post("/drain")).status_code == 403
    assert not lifecycle.draining

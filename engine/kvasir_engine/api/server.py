"""Serves an application on one socket until SIGTERM or SIGINT, then drains."""

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Iterator
from typing import Any

import uvicorn

from kvasir_engine.api.http import HttpProtocol
from kvasir_engine.api.leaving import Leaving
from kvasir_engine.errors import UserError

log = logging.getLogger("api")


class PortTaken(UserError):
    """The address cannot be listened on; the message is one sentence for the user."""


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises PortTaken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        sock = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise PortTaken(f"cannot listen on {host}:{port}: {reason}") from error
    # What is accepted inherits it. Without it a stream's first event waits for the client's acknowledgement of the
    # headers, 40 ms; asyncio sets it only on sockets that say which protocol they were made for.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def check_port(host: str, port: int) -> None:
    """Raise PortTaken if the address cannot be listened on now: before minutes of loading, and not after."""
    listen(host, port).close()


def end_at_sigterm() -> None:
    """Until `serve` runs, SIGTERM ends the process at once: there is nothing to finish.

    By default it does so too, but not to the first process of a container, which may load for minutes.
    """
    signal.signal(signal.SIGTERM, lambda *_: os._exit(128 + signal.SIGTERM))


class _Server(uvicorn.Server):
    """uvicorn without its own signal handling, which would not wait for the drain."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve(app: Any, sock: socket.socket, leaving: Leaving, until: asyncio.Event | None = None) -> None:
    """Serve the ASGI `app` until SIGTERM, SIGINT or `until`; then be unready, finish what is in flight, and return.

    What still runs at the deadline of `leaving` is cut off, as it is by a second signal.
    """
    config = uvicorn.Config(
        app, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=1, http=HttpProtocol
    )
    server = _Server(config)
    stop = asyncio.Event()

    def on_signal() -> None:
        if stop.is_set():
            leaving.hurry()
        stop.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    serving = asyncio.create_task(server.serve(sockets=[sock]))
    stopping = [asyncio.create_task(each.wait()) for each in (stop, until) if each is not None]
    try:
        await asyncio.wait({serving, *stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not serving.done() and (left := await leaving.done()):
            log.warning("cutting off requests inflight=%d", left)
        server.should_exit = True
        await serving
    finally:
        for each in stopping:
            each.cancel()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)

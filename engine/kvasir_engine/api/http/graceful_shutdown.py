"""Graceful shutdown: a process becomes unready at once, and ends when nothing is in flight or at its deadline.

SIGTERM begins it, and so does `kvasir drain` over a Unix socket, which answers when the process may be ended. The
latter is a pod's preStop hook; the SIGTERM after it finds nothing to wait for. No HTTP port offers it: a page in a
browser, or a sidecar, could otherwise take the process out of service.
"""

import asyncio
import contextlib
import logging
import os
import socket
import struct
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Protocol

import msgspec

log = logging.getLogger("api")

ASK_SECONDS = 5.0
_POLL_SECONDS = 0.05


class DrainRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The request of `kvasir drain`, one line of JSON."""

    quiet: Annotated[float, msgspec.Meta(ge=0)] = 0.0


class Drainable(Protocol):
    """A service that can stop accepting work, and counts the work in flight."""

    @property
    def inflight(self) -> int: ...

    def drain(self) -> None: ...


class GracefulShutdown:
    """The shutdown of `service`, which has `seconds` to finish its requests in flight."""

    def __init__(self, service: Drainable, seconds: float) -> None:
        self._service = service
        self._seconds = seconds
        self._deadline: float | None = None
        self._ended = asyncio.Event()

    def begin(self) -> None:
        """Become unready. The deadline counts from the first call."""
        if self._deadline is None:
            self._deadline = time.monotonic() + self._seconds
            log.info("draining inflight=%d", self._service.inflight)
            self._service.drain()

    def stop_waiting(self) -> None:
        """Make `done` return at once."""
        self._ended.set()

    @property
    def seconds_left(self) -> float | None:
        """Seconds to the deadline, at least 0; `None` while nothing has begun."""
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    async def done(self, quiet: float = 0.0) -> int:
        """Wait until nothing is in flight for `quiet` seconds, or the deadline; returns what is left."""
        self.begin()
        busy = time.monotonic()
        while not self._ended.is_set() and self.seconds_left:
            now = time.monotonic()
            busy = now if self._service.inflight else busy
            if not self._service.inflight and now - busy >= quiet:
                break
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ended.wait(), _POLL_SECONDS)
        return self._service.inflight

    @contextlib.asynccontextmanager
    async def listening_at(self, path: Path) -> AsyncIterator[None]:
        """Serve `kvasir drain` at the Unix socket `path`, which only this user may open. Raises OSError."""
        _remove(path)
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(str(path))
            os.chmod(path, 0o600)
            server = await asyncio.start_unix_server(self._answer, sock=sock, limit=4096)
            try:
                yield
            finally:
                server.close()
                _remove(path)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if _peer(writer.get_extra_info("socket")) in (0, os.geteuid()):
                writer.write(msgspec.json.encode(await self._handle(reader)) + b"\n")
        finally:
            writer.close()

    async def _handle(self, reader: asyncio.StreamReader) -> dict[str, object]:
        try:
            async with asyncio.timeout(ASK_SECONDS):
                ask = msgspec.json.decode(await reader.readline(), type=DrainRequest)
        except (ValueError, TimeoutError) as error:  # msgspec's are ValueErrors
            return {"error": f"{type(error).__name__}: {error}"[:200]}
        return {"inflight": await self.done(ask.quiet)}


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)


def _peer(sock: socket.socket) -> int:
    """The user at the other end of a Unix socket."""
    _pid, user, _group = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(user)

"""Accepts connections on one socket, also when the process has no file descriptor left."""

import asyncio
import contextlib
import errno
import logging
import os
import socket
import time
from collections.abc import Callable

log = logging.getLogger("api")

BATCH = 64  # connections that are accepted at once, before others of the loop's work
PAUSE_SECONDS = 0.5
TELL_SECONDS = 10.0
_EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}


class Acceptor:
    """Gives each connection a protocol of `make`.

    asyncio's own loop, out of descriptors, tries as often as the backlog is long, logs each try with a traceback,
    and schedules as many for the next second. This one has a spare descriptor: with it a connection that cannot be
    served is taken and closed, so its client learns of it. Where not even that is possible it pauses.
    """

    def __init__(self, sock: socket.socket, make: Callable[[], asyncio.Protocol]) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._make = make
        self._loop = asyncio.get_running_loop()
        self._spare: int | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._again: asyncio.TimerHandle | None = None
        self._shed = 0
        self._told = -TELL_SECONDS
        self._reopen()
        self._loop.add_reader(sock.fileno(), self._accept)

    def close(self) -> None:
        """Accept nothing more. Idempotent; the socket stays the caller's."""
        if self._again is not None:
            self._again.cancel()
        if self._sock.fileno() >= 0:
            self._loop.remove_reader(self._sock.fileno())
        if self._spare is not None:
            os.close(self._spare)
            self._spare = None

    def _accept(self) -> None:
        for _ in range(BATCH):
            try:
                conn, _address = self._sock.accept()
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                if error.errno not in _EXHAUSTED:
                    continue  # that connection's own: it has gone already
                if not self._refuse_one(error):
                    self._pause()
                    return
                continue
            conn.setblocking(False)
            task = self._loop.create_task(self._connect(conn))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _connect(self, conn: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(self._make, conn)
        except OSError as error:
            log.info("connection lost at once reason=%r", str(error))
            conn.close()
        except Exception:  # of this connection: the others go on
            log.exception("a connection could not be served")
            conn.close()

    def _refuse_one(self, error: OSError) -> bool:
        """Take one connection by the spare descriptor and close it. False: it cannot be."""
        self._tell(error)
        if self._spare is None:
            self._reopen()
        if self._spare is None:
            return False
        os.close(self._spare)
        self._spare = None
        try:
            with contextlib.suppress(BlockingIOError):
                self._sock.accept()[0].close()
        except OSError:
            return False
        self._shed += 1
        self._reopen()
        return self._spare is not None

    def _reopen(self) -> None:
        with contextlib.suppress(OSError):
            self._spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    def _tell(self, error: OSError) -> None:
        now = time.monotonic()
        if now - self._told >= TELL_SECONDS:
            self._told = now
            log.error("connections cannot be taken reason=%r closed=%d", error.strerror, self._shed)

    def _pause(self) -> None:
        self._loop.remove_reader(self._sock.fileno())
        self._again = self._loop.call_later(PAUSE_SECONDS, self._loop.add_reader, self._sock.fileno(), self._accept)

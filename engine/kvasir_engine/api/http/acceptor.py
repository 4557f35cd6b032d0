"""Accepts connections on one socket, also when the process has no file descriptor left."""

import asyncio
import contextlib
import errno
import logging
import os
import socket
import ssl
import time
from collections import Counter
from collections.abc import Callable

from kvasir_engine.tls import HANDSHAKE_SECONDS, Credentials, why_failed

log = logging.getLogger("api")

BATCH = 64  # connections that are accepted at once, before others of the loop's work
PAUSE_SECONDS = 0.5
LOG_SECONDS = 10.0
MOST_HANDSHAKES = 256  # at once: each holds memory, and has an end
MOST_OF_ADDRESS = 64  # of these: nobody keeps the others out by handshakes that do not end
_EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}


class Acceptor:
    """Gives each connection a protocol made by `make`.

    Without descriptors, asyncio's own loop retries as often as the backlog is long, logs each try with a traceback,
    and schedules as many for the next second. This acceptor keeps a spare descriptor, to accept and close a
    connection that cannot be served, so that its client learns of it. Where not even that is possible it pauses.
    """

    def __init__(
        self,
        sock: socket.socket,
        make: Callable[[], asyncio.Protocol],
        credentials: Credentials | None = None,
    ) -> None:
        """With `credentials` a connection gets its protocol only after a successful TLS handshake."""
        self._credentials = credentials
        sock.setblocking(False)
        self._sock = sock
        self._make = make
        self._loop = asyncio.get_running_loop()
        self._spare: int | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._handshakes: Counter[str] = Counter()  # by address
        self._again: asyncio.TimerHandle | None = None
        self._shed = 0
        self._logged_at = -LOG_SECONDS
        self._reopen()
        self._loop.add_reader(sock.fileno(), self._accept)

    def close(self) -> None:
        """Stop accepting. Idempotent; the caller closes the socket."""
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
                conn, address = self._sock.accept()
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                if error.errno not in _EXHAUSTED:
                    continue  # that connection's own: it has gone already
                if not self._refuse_one(error):
                    self._pause()
                    return
                continue
            peer = str(address[0]) if address else "this machine"  # a Unix socket's other end has no address
            if self._credentials is not None and not self._may_begin(peer):
                conn.close()
                continue
            conn.setblocking(False)
            task = self._loop.create_task(self._connect(conn, peer))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _may_begin(self, address: str) -> bool:
        """Whether the address may begin a handshake; counts it."""
        own, others = self._handshakes[address], self._handshakes.total()
        if others >= MOST_HANDSHAKES or own >= MOST_OF_ADDRESS:
            log.warning("refused address=%s reason='%d handshakes are under way, %d its own'", address, others, own)
            return False
        self._handshakes[address] += 1
        return True

    def _ended(self, address: str) -> None:
        self._handshakes[address] -= 1
        if not self._handshakes[address]:
            del self._handshakes[address]

    async def _connect(self, conn: socket.socket, address: str) -> None:
        credentials = self._credentials
        try:
            if credentials is None:
                await self._loop.connect_accepted_socket(self._make, conn)
                return
            await self._loop.connect_accepted_socket(
                self._make, conn, ssl=credentials.server, ssl_handshake_timeout=HANDSHAKE_SECONDS
            )
        except (ssl.SSLError, ConnectionError) as error:
            if credentials is None:
                log.info("connection lost at once reason=%r", str(error))
            else:
                log.warning("refused address=%s reason=%r", address, f"no TLS with it: {why_failed(error)}")
            conn.close()
        except OSError as error:
            log.info("connection lost at once reason=%r", str(error))
            conn.close()
        except Exception:
            log.exception("a connection was not served")
            conn.close()
        finally:
            if credentials is not None:
                self._ended(address)

    def _refuse_one(self, error: OSError) -> bool:
        """Accept one connection with the spare descriptor and close it. False if that fails."""
        self._log_failure(error)
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

    def _log_failure(self, error: OSError) -> None:
        now = time.monotonic()
        if now - self._logged_at >= LOG_SECONDS:
            self._logged_at = now
            log.error("connections cannot be taken reason=%r closed=%d", error.strerror, self._shed)

    def _pause(self) -> None:
        self._loop.remove_reader(self._sock.fileno())
        self._again = self._loop.call_later(PAUSE_SECONDS, self._loop.add_reader, self._sock.fileno(), self._accept)

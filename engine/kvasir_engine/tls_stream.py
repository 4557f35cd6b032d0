"""TLS over a blocking socket, for one thread that receives beside others that send.

`ssl.SSLSocket` is not made for that: one lock would be held by whoever waits. Here the socket is waited for outside
the lock, and only bytes that are there are looked at within it.
"""

import contextlib
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Protocol

from kvasir_engine.supervisor import ExpectedEnd
from kvasir_engine.tls import HANDSHAKE_SECONDS

CHUNK = 1 << 16
MOST_MESSAGE = (1 << 31) - 1


class Stream(Protocol):
    """What the nodes of a worker need of a connection: a socket has it, and so has `TlsStream`."""

    def recv(self, size: int, /) -> bytes: ...
    def sendall(self, data: bytes, /) -> None: ...
    def settimeout(self, seconds: float | None, /) -> None: ...
    def close(self) -> None: ...


class TlsStream:
    """`sock` after a handshake, in `seconds` altogether. Raises ssl.SSLError, or OSError; the socket stays the
    caller's then. Its timeout is what was left of them."""

    def __init__(
        self,
        sock: socket.socket,
        context: ssl.SSLContext,
        server_side: bool,
        seconds: float = HANDSHAKE_SECONDS,
    ) -> None:
        deadline = time.monotonic() + seconds
        self._sock = sock
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=server_side)
        self._lock = threading.Lock()
        self._sending = threading.Lock()
        while True:
            try:
                self._tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise TimeoutError("the TLS handshake takes too long") from None
                sock.settimeout(left)
                self._flush()
                self._wait()
            except ssl.SSLError:
                with contextlib.suppress(OSError):
                    self._flush()  # the alert, which says why
                raise
        self._flush()

    @property
    def tls(self) -> ssl.SSLObject:
        """What knows the peer's certificate."""
        return self._tls

    def recv(self, size: int, /) -> bytes:
        """Up to `size` bytes; none at the end. By one thread. Raises OSError, of which ssl.SSLError is one."""
        while True:
            with self._lock:
                try:
                    return self._tls.read(size)
                except ssl.SSLWantReadError:
                    pass
                except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                    return b""
            self._flush(wait=False)
            if not self._wait():
                return b""

    def sendall(self, data: bytes, /) -> None:
        """Send all of `data`, whole between those of other threads. Raises OSError."""
        with self._sending:
            with self._lock:
                view = memoryview(data)
                while view:
                    view = view[self._tls.write(view) :]
                out = self._outgoing.read()
            self._sock.sendall(out)

    def settimeout(self, seconds: float | None, /) -> None:
        """As a socket has it."""
        self._sock.settimeout(seconds)

    def close(self) -> None:
        """As a socket has it."""
        self._sock.close()

    def shut(self) -> None:
        """Wake who waits to receive: the connection is over."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def _wait(self) -> bool:
        """Take what comes next; False at the end."""
        data = self._sock.recv(CHUNK)
        with self._lock:
            if data:
                self._incoming.write(data)
            else:
                self._incoming.write_eof()
        return bool(data)

    def _flush(self, wait: bool = True) -> None:
        """Send what TLS itself has to say. Who receives does not `wait` for who sends: the peer may do the same,
        and neither would receive any more. It goes with what is sent next, then."""
        if not self._sending.acquire(blocking=wait):
            return
        try:
            with self._lock:
                out = self._outgoing.read()
            if out:
                self._sock.sendall(out)
        finally:
            self._sending.release()


class StreamConnection:
    """Messages over a stream, framed as `multiprocessing.connection.Connection` frames them."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def send_bytes(self, data: bytes) -> None:
        """Send a message. Raises OSError."""
        if len(data) > MOST_MESSAGE:
            raise OSError(f"a message of {len(data)} bytes is too long")
        self._stream.sendall(struct.pack("!i", len(data)) + data)

    def recv_bytes(self) -> bytes:
        """The next message. Raises EOFError at the end, or OSError."""
        (length,) = struct.unpack("!i", self._exactly(4))
        if length < 0:
            raise OSError("a message is too long")
        return self._exactly(length)

    def _exactly(self, count: int) -> bytes:
        data = bytearray()
        while len(data) < count:
            some = self._stream.recv(min(count - len(data), CHUNK))
            if not some:
                raise EOFError
            data += some
        return bytes(data)


def relay(stream: TlsStream, start: Callable[[Callable[[], None], str], object], name: str) -> socket.socket:
    """A socket for another process, whose bytes go to `stream` and come from there; the end of one ends the other.

    `start` runs a thread of this name.
    """
    ours, theirs = socket.socketpair()
    start(partial(_carry, stream.recv, ours.sendall, stream, ours), f"{name}-in")
    start(partial(_carry, ours.recv, stream.sendall, stream, ours), f"{name}-out")
    return theirs


def _carry(
    take: Callable[[int], bytes], give: Callable[[bytes], None], stream: TlsStream, ours: socket.socket
) -> None:
    try:
        with contextlib.suppress(OSError):
            while data := take(CHUNK):
                give(data)
    finally:
        stream.shut()
        with contextlib.suppress(OSError):
            ours.shutdown(socket.SHUT_RDWR)
    raise ExpectedEnd

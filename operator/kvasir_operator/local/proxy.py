"""The router's Service on this machine: a TCP proxy from the endpoint to the ready router pods."""

import asyncio
import json
import socket
from collections import Counter
from collections.abc import Callable, Sequence

from kvasir_operator.local.addresses import PodAddress

_REQUEST_SECONDS = 5.0
_CONNECT_SECONDS = 5.0

#: The addresses of the ready router pods, or why there is none.
Backends = Callable[[], tuple[Sequence[PodAddress], str]]


class _Side(asyncio.Protocol):
    """One end of a connection. It writes what it reads to its peer, with flow control."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.peer: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        if self.peer is not None:
            self.peer.write(data)

    def eof_received(self) -> bool:
        if self.peer is None or self.peer.is_closing():
            return False
        self.peer.write_eof()
        return True

    def pause_writing(self) -> None:
        if self.peer is not None:
            self.peer.pause_reading()

    def resume_writing(self) -> None:
        if self.peer is not None and not self.peer.is_closing():
            self.peer.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        if self.peer is not None:
            self.peer.close()


class _Client(_Side):
    """A client's end of a connection. It chooses a router before it reads."""

    def __init__(self, proxy: "Proxy") -> None:
        super().__init__()
        self._proxy = proxy
        self._backend: PodAddress | None = None
        self._received = bytearray()
        self._refusal: bytes | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        assert self.transport is not None
        self.transport.pause_reading()
        self._proxy.clients.add(self)
        self._task = asyncio.ensure_future(self._connect())

    async def _connect(self) -> None:
        assert self.transport is not None
        loop = asyncio.get_running_loop()
        addresses, reason = self._proxy.backends()
        for address in sorted(addresses, key=lambda a: self._proxy.connections[a]):
            try:
                async with asyncio.timeout(_CONNECT_SECONDS):
                    transport, side = await loop.create_connection(_Side, address.ip, address.port)
            except OSError as error:
                reason = f"{address}: {error.strerror or 'no answer'}"
                continue
            if self.transport.is_closing():
                transport.close()
                return
            self._backend = address
            self._proxy.connections[address] += 1
            self.peer, side.peer = transport, self.transport
            self.transport.resume_reading()
            return
        self._refuse(reason, loop)

    def _refuse(self, reason: str, loop: asyncio.AbstractEventLoop) -> None:
        """Answer 503 in the API's form. The request is read first: closing with unread data would lose the
        answer."""
        assert self.transport is not None
        error = {
            "message": f"no router is ready: {reason}",
            "type": "server_error",
            "code": "no_router",
            "param": None,
        }
        body = json.dumps({"error": error}).encode()
        head = (
            f"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        )
        self._refusal = head.encode() + b"Retry-After: 1\r\nConnection: close\r\n\r\n" + body
        self._timer = loop.call_later(_REQUEST_SECONDS, self.transport.close)
        if not self.transport.is_closing():
            self.transport.resume_reading()

    def data_received(self, data: bytes) -> None:
        if self._refusal is None:
            super().data_received(data)
            return
        assert self.transport is not None
        self._received += data
        if b"\r\n\r\n" in self._received or len(self._received) > 1 << 16:
            self.transport.write(self._refusal)
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._proxy.clients.discard(self)
        if self._timer is not None:
            self._timer.cancel()
        if self._backend is not None:
            self._proxy.connections[self._backend] -= 1


class Proxy:
    """Accepts connections on `sock` and balances them over the ready routers, fewest connections first."""

    def __init__(self, sock: socket.socket, backends: Backends) -> None:
        self.backends = backends
        self.connections: Counter[PodAddress] = Counter()
        self.clients: set[_Client] = set()
        self._sock = sock
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Start to accept connections."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Client(self), sock=self._sock, backlog=1024)

    def stop(self) -> None:
        """Accept no more connections. Open ones stay."""
        if self._server is not None:
            self._server.close()
        else:
            self._sock.close()

    def close(self) -> None:
        """Stop, and close all connections."""
        self.stop()
        for client in list(self.clients):
            if client.transport is not None:
                client.transport.abort()

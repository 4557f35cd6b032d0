"""A TLS connection that both ends close is the server's to count until it is gone, and ends nothing else."""

import asyncio
import ssl
from pathlib import Path

import pytest
from certificates import Authority, mount

from kvasir_engine.api.http.connections import ConnectionGate, Entry
from kvasir_engine.api.http.limits import HttpLimits


class _Busy:
    idle_since = None

    def overdue(self, now: float, shutdown_since: float | None) -> str | None:
        return None


class _Broken(_Busy):
    def overdue(self, now: float, shutdown_since: float | None) -> str | None:
        raise ZeroDivisionError


def contexts(folder: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """A server's, and one of a client that believes anybody."""
    authority = Authority()
    mount(folder, authority.pem, *authority.leaf("decode"))
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    server.load_cert_chain(folder / "tls.crt", folder / "tls.key")
    client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
    return server, client


@pytest.mark.asyncio
async def test_a_transport_that_was_closed_twice_is_swept_like_any_other(tmp_path: Path) -> None:
    gate, taken = ConnectionGate(HttpLimits()), asyncio.Queue[asyncio.StreamWriter]()
    server, client = contexts(tmp_path / "tls")

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        taken.put_nowait(writer)

    async with await asyncio.start_server(accept, "127.0.0.1", 0, ssl=server) as serving:
        port = serving.sockets[0].getsockname()[1]
        _, ours = await asyncio.open_connection("127.0.0.1", port, ssl=client)
        async with asyncio.timeout(60):
            transport = (await taken.get()).transport
        assert gate.enter(transport, _Busy(), "127.0.0.1") is Entry.FULL
        transport.close()
        transport.close()
        gate.sweep(None)
        assert len(gate) == 1
        gate.leave(transport)
        assert len(gate) == 0
        ours.transport.abort()


@pytest.mark.asyncio
async def test_a_connection_that_cannot_be_checked_is_closed_and_the_others_stay(tmp_path: Path) -> None:
    gate = ConnectionGate(HttpLimits())
    loop = asyncio.get_running_loop()
    server = await loop.create_server(asyncio.Protocol, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    one, _ = await loop.create_connection(asyncio.Protocol, "127.0.0.1", port)
    other, _ = await loop.create_connection(asyncio.Protocol, "127.0.0.1", port)
    gate.enter(one, _Broken(), "127.0.0.1")
    gate.enter(other, _Busy(), "127.0.0.1")
    gate.sweep(None)
    assert one.is_closing()
    assert not other.is_closing()
    assert len(gate) == 1
    other.abort()
    server.close()

"""What the socket gives to the connections that it accepts."""

import asyncio
import socket

from kvasir_engine.api.http.server import listen


async def test_an_answers_small_writes_are_sent_at_once() -> None:
    accepted: asyncio.Queue[bool] = asyncio.Queue()

    def made(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accepted.put_nowait(
            bool(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        )
        writer.close()

    with listen("127.0.0.1", 0) as sock:
        async with await asyncio.start_server(made, sock=sock):
            _, writer = await asyncio.open_connection(*sock.getsockname())
            assert await asyncio.wait_for(accepted.get(), 60)
            writer.close()

"""Two TCP connections tied into one: what doors (`forward.py`) and Services (`proxy.py`) are made of."""

import asyncio
import contextlib

_CHUNK = 1 << 16


async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, host: str, port: int) -> None:
    """Connect an accepted connection to `host:port` until both directions have ended; passes ends and resets on."""
    with contextlib.closing(writer):
        try:
            onward_reader, onward = await asyncio.open_connection(host, port)
        except OSError:
            refuse(writer)
            return
        with contextlib.closing(onward):
            await asyncio.gather(_pump(reader, onward), _pump(onward_reader, writer))


def refuse(writer: asyncio.StreamWriter) -> None:
    """Reset an accepted connection: as near to a refusal as one can come after accepting it."""
    writer.transport.abort()


async def _pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    try:
        while data := await source.read(_CHUNK):
            sink.write(data)
            await sink.drain()
        if sink.can_write_eof():
            sink.write_eof()
    except OSError:
        # One side broke: the other must hear of it as well.
        sink.transport.abort()

"""Writes the parts of a streamed body as HTTP/1.1 chunks, without the work that a part does not need.

An ASGI message for each part passes every middleware and h11, which only frames it. A stream of tokens has a
thousand parts or more, so the parts after the first are framed here. h11 still writes heads and ends.
"""

from uvicorn.protocols.http.h11_impl import RequestResponseCycle

WRITE = "kvasir.write"
"""Scope key: an `async` function of bytes, for parts that are neither the first nor the last."""


class BodyWriter:
    """Writes the body of one answer of unknown length."""

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle

    async def write(self, part: bytes) -> None:
        """Write a part once the client has read enough of the earlier ones; nothing if it has disconnected."""
        cycle = self._cycle
        if cycle.flow.write_paused and not cycle.disconnected:
            await cycle.flow.drain()
        if part and not cycle.disconnected:
            cycle.transport.write(b"%x\r\n%b\r\n" % (len(part), part))

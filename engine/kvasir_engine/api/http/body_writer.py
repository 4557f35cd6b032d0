"""Writes the parts of a streamed body as HTTP/1.1 chunks, past all that a part does not need.

An ASGI message a part goes through every middleware, and through h11, which only frames it. A stream of tokens has
a thousand parts and more, so those after the first are framed here. Heads and ends stay h11's.
"""

from uvicorn.protocols.http.h11_impl import RequestResponseCycle

WRITE = "kvasir.write"
"""Scope key: an `async` function of bytes, for parts that are neither the first nor the last."""


class BodyWriter:
    """Of one request's answer, whose length was not said."""

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle

    async def write(self, part: bytes) -> None:
        """Write it once the client has read enough of what was written; nothing when it has left."""
        cycle = self._cycle
        if cycle.flow.write_paused and not cycle.disconnected:
            await cycle.flow.drain()
        if part and not cycle.disconnected:
            cycle.transport.write(b"%x\r\n%b\r\n" % (len(part), part))

"""How a process leaves: unready at once, gone when nothing is in flight any more, or at its deadline.

Two things can begin it: SIGTERM, and `POST /drain` from the same machine, which answers when the process may be
ended. The second is a pod's preStop hook (`kvasir drain`): SIGTERM comes after it and finds nothing to wait for.
"""

import asyncio
import contextlib
import ipaddress
import logging
import time
from typing import Annotated, Any, Protocol

import msgspec
from fastapi import FastAPI, Query, Request, Response

log = logging.getLogger("api")

DRAIN_PATH = "/drain"
_POLL_SECONDS = 0.05


class Drainable(Protocol):
    """What is served: it can stop taking work, and knows how much it has."""

    @property
    def inflight(self) -> int: ...

    def drain(self) -> None: ...


class Leaving:
    """The departure of `service`, which has `seconds` from its beginning to finish what is in flight."""

    def __init__(self, service: Drainable, seconds: float) -> None:
        self._service = service
        self._seconds = seconds
        self._deadline: float | None = None
        self._hurry = asyncio.Event()

    def begin(self) -> None:
        """Be unready from now on. The deadline counts from the first call."""
        if self._deadline is None:
            self._deadline = time.monotonic() + self._seconds
            self._service.drain()
            log.info("draining inflight=%d", self._service.inflight)

    def hurry(self) -> None:
        """Wait for nothing any more."""
        self._hurry.set()

    @property
    def seconds_left(self) -> float | None:
        """Seconds to the deadline, at least 0; `None` while nothing has begun."""
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    async def done(self, quiet: float = 0.0) -> int:
        """Return what is in flight: nothing, and so for `quiet` seconds, or what is left at the deadline."""
        self.begin()
        busy = time.monotonic()
        while not self._hurry.is_set() and self.seconds_left:
            now = time.monotonic()
            busy = now if self._service.inflight else busy
            if not self._service.inflight and now - busy >= quiet:
                break
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._hurry.wait(), _POLL_SECONDS)
        return self._service.inflight

    def mount(self, app: FastAPI) -> None:
        """Add `POST /drain?quiet=SECONDS`, which only this machine may ask for: whoever reaches the port could
        otherwise put the process out of service."""

        @app.post(DRAIN_PATH)
        async def drain(request: Request, quiet: Annotated[float, Query(ge=0)] = 0.0) -> Response:
            if not _same_machine(request.scope):
                return Response(status_code=403)
            left = await self.done(quiet)
            return Response(msgspec.json.encode({"inflight": left}), media_type="application/json")


def _same_machine(scope: Any) -> bool:
    """Whether a connection comes from this machine: from loopback, or from the address that it was made to."""
    client, server = scope.get("client"), scope.get("server")
    if not client:
        return False
    return bool(ipaddress.ip_address(client[0]).is_loopback) or (server is not None and client[0] == server[0])

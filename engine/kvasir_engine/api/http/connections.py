"""A server's connections: admission, eviction, and timeouts."""

import logging
import time
from collections import Counter
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from kvasir_engine.api.http.limits import HttpLimits

log = logging.getLogger("api")


class Entry(Enum):
    """How a connection was admitted."""

    FULL = "full"
    PROBES = "probes"  # all places are taken: it may only ask how the process is
    REFUSED = "refused"


class Transport(Protocol):
    """The methods of asyncio.Transport that are used here."""

    def is_closing(self) -> bool: ...
    def abort(self) -> None: ...
    def get_write_buffer_size(self) -> int: ...


def unsent_bytes(transport: Transport) -> int:
    """Bytes that are written and not sent. A TLS transport that was closed twice does not know them (in Python
    3.11 it has let go of its protocol then): 0.
    """
    try:
        return transport.get_write_buffer_size()
    except AttributeError:
        return 0


class Watched(Protocol):
    """The protocol that a connection speaks."""

    @property
    def idle_since(self) -> float | None:
        """Since when the connection waits for a request; `None` while it has one."""

    def overdue(self, now: float, shutdown_since: float | None) -> str | None:
        """The timeout that has passed, or `None`. `shutdown_since`: when the process began to shut down."""


@dataclass
class _Place:
    watched: Watched
    address: str
    entry: Entry
    closing: tuple[float, int] | None = None  # since when, and with how much to write


class ConnectionGate:
    """Counts connections by address. A new one may evict the one that waits longest for a request."""

    def __init__(self, limits: HttpLimits) -> None:
        self.limits = limits
        self._places: dict[Transport, _Place] = {}
        self._of: Counter[str] = Counter()
        self._count: Counter[Entry] = Counter()

    def __len__(self) -> int:
        return len(self._places)

    def enter(self, transport: Transport, watched: Watched, address: str) -> Entry:
        """Admit a new connection. A refused one has been aborted."""
        entry = Entry.FULL
        if self._count[entry] >= self.limits.connections:
            self._make_room(entry, None)
        if self._of[address] >= self.limits.per_address:
            self._make_room(entry, address)
        if self._count[entry] >= self.limits.connections or self._of[address] >= self.limits.per_address:
            entry = Entry.PROBES
            if self._count[entry] >= self.limits.reserve:
                self._make_room(entry, None)
            if self._count[entry] >= self.limits.reserve:
                transport.abort()
                return Entry.REFUSED
        self._places[transport] = _Place(watched, address, entry)
        self._count[entry] += 1
        self._of[address] += entry is Entry.FULL
        return entry

    def take_over(self, transport: Transport, watched: Watched) -> None:
        """The connection continues in another protocol."""
        if transport in self._places:
            self._places[transport].watched = watched

    def leave(self, transport: Transport) -> None:
        """The connection is closed. Idempotent."""
        place = self._places.pop(transport, None)
        if place is not None:
            self._count[place.entry] -= 1
            self._of[place.address] -= place.entry is Entry.FULL
            if not self._of[place.address]:
                del self._of[place.address]

    def sweep(self, shutdown_since: float | None) -> None:
        """Abort connections whose timeout has passed. `shutdown_since`: when the process began to shut down, by
        time.monotonic.
        """
        now = time.monotonic()
        aborted: Counter[str] = Counter()
        for transport, place in list(self._places.items()):
            try:
                reason = self._unwritten(transport, place, now) or place.watched.overdue(now, shutdown_since)
            except Exception:  # one connection's fault is not to end the server
                log.exception("a connection cannot be checked; it is closed")
                reason = "fault"
            if reason:
                aborted[reason] += 1
                self._abort(transport)
        if aborted:
            log.warning("slow connections closed %s", " ".join(f"{k}={n}" for k, n in sorted(aborted.items())))

    def _unwritten(self, transport: Transport, place: _Place, now: float) -> str | None:
        """Whether a closed transport has had unsent data for too long ("write"): its peer may never read it."""
        if not transport.is_closing():
            return None
        if place.closing is None:
            place.closing = now, unsent_bytes(transport)
        since, size = place.closing
        late = now - since > self.limits.write_seconds + size / self.limits.bytes_per_second
        return "write" if late else None

    def _make_room(self, entry: Entry, address: str | None) -> None:
        now = time.monotonic()
        idle = [
            (since, transport)
            for transport, place in self._places.items()
            if place.entry is entry
            and (address is None or place.address == address)
            and (since := place.watched.idle_since) is not None
            and now - since >= self.limits.settled_seconds
            and not transport.is_closing()
        ]
        if idle:
            self._abort(min(idle, key=lambda each: each[0])[1])

    def _abort(self, transport: Transport) -> None:
        transport.abort()
        self.leave(transport)

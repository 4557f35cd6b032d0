"""Leader election at the edge: reads and writes the Lease, and says whether this replica may act."""

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Protocol

from kvasir_operator.cluster.interface import ClusterError
from kvasir_operator.cluster.lease_candidate import LeaseCandidate, Record

log = logging.getLogger("kvasir.election")


class LeaseInterface(Protocol):
    """Where the Lease is. Both raise ClusterError."""

    def read(self) -> Record | None:
        """The Lease's record, `None` when there is no Lease."""
        ...

    def write(self, record: Record) -> bool:
        """Write it; False when it has changed since its `version` was read, or was created meanwhile."""
        ...


class Leadership:
    """This replica's part in the election. Any thread may call `left`."""

    def __init__(
        self, candidate: LeaseCandidate, lease: LeaseInterface, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._candidate = candidate
        self._lease = lease
        self._clock = clock
        self._lock = threading.Lock()
        self._leads = asyncio.Event()

    def left(self) -> float:
        """Seconds for which this replica may still write; 0 or less: it may not."""
        with self._lock:
            return self._candidate.left(self._clock())

    def attempt(self) -> None:
        """Take or renew the Lease if that may be. Blocking. Raises ClusterError."""
        started = self._clock()
        record = self._lease.read()
        with self._lock:
            proposed = self._candidate.proposal(record, self._clock(), _stamp())
        if proposed is not None and self._lease.write(proposed):
            with self._lock:
                self._candidate.written(started)

    def resign(self) -> None:
        """Stop leading, and leave the Lease to the next, once all writes have ended. Raises ClusterError."""
        record = self._lease.read()
        with self._lock:
            proposed = self._candidate.resignation(record, _stamp())
        if proposed is not None:
            self._lease.write(proposed)

    async def run(self, on_leading: Callable[[], None]) -> None:
        """Take part until cancelled; `on_leading` is called each time that this replica begins to lead."""
        retry = self._candidate.timing.retry
        while True:
            try:
                await asyncio.to_thread(self.attempt)
            except ClusterError as error:
                log.warning("cannot reach the lease seconds_left=%.1f reason=%s", max(0.0, self.left()), error)
            leads = self.left() > 0
            if leads and not self._leads.is_set():
                log.info("leading identity=%s", self._candidate.identity)
                self._leads.set()
                on_leading()
            elif not leads and self._leads.is_set():
                log.warning("no longer leading identity=%s", self._candidate.identity)
                self._leads.clear()
            await asyncio.sleep(retry)

    async def wait(self) -> None:
        """Return when this replica leads."""
        while self.left() <= 0:
            self._leads.clear()
            await self._leads.wait()


def wait_for_leader(lease: LeaseInterface, seconds: float, wait: Callable[[float], None] = time.sleep) -> str:
    """The holder that renewed the Lease within `seconds`; empty: none did. Blocking. Raises ClusterError."""
    first = lease.read()
    for _ in range(max(1, int(seconds))):
        wait(1.0)
        found = lease.read()
        if found is not None and found.holder and (first is None or found.version != first.version):
            return found.holder
    return ""


def _stamp() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")

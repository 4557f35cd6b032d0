"""The workers that the router knows, and their states."""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from kvasir_engine.router.connection import ANY_WORKER, REFUSED_BACKOFF, WorkerConnection
from kvasir_engine.router.worker_trust import WorkerTrust
from kvasir_engine.supervisor import Supervisor

log = logging.getLogger("router")


class WorkerPool:
    """Connections to all workers that discovery names. Use it in one event loop, and `close` it at the end.

    `model`: the model that the workers' hellos must name; empty: any. A connection's task is restarted when it
    ends.
    """

    def __init__(self, model: str = "", tasks: Supervisor | None = None, trust: WorkerTrust = ANY_WORKER) -> None:
        self.epoch = time.time_ns()
        self._model = model
        self._trust = trust
        self._workers: dict[str, WorkerConnection] = {}
        self._supervisor = tasks or Supervisor()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._leaving: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self._unpaired: set[tuple[str, str, str]] = set()
        self.max_length = 0
        """Most tokens a sequence may have on any ready worker that decodes; while there is none as before, as a
        request whose worker is lost before it was sent is not too long. 0 until there was one."""

    _closed = False

    async def follow(self, discovery: AsyncIterator[Mapping[str, str]]) -> None:
        """Apply the sets of `discovery` to the pool, until it ends or this is cancelled."""
        async for workers in discovery:
            self.set_workers(workers)

    def set_workers(self, workers: Mapping[str, str]) -> None:
        """Connect to `workers` (name by URL), and disconnect from all others once their streams have ended."""
        for url in self._workers.keys() - workers.keys():
            log.info("worker gone worker=%s url=%s", self._workers[url].name, url)
            worker = self._workers.pop(url)
            leaving = self._supervisor.start(
                self._leave(worker, self._tasks.pop(url)), f"leaving {worker.name}", worker.abandon
            )
            self._leaving.add(leaving)
            leaving.add_done_callback(self._leaving.discard)
        for url in workers.keys() - self._workers.keys():
            worker = WorkerConnection(workers[url], url, self.epoch, self._model, self._note_change, self._trust)
            self._workers[url] = worker
            self._run(url, worker)
        self._note_change()

    def _run(self, url: str, worker: WorkerConnection) -> None:
        def ended(reason: str) -> None:
            worker.abandon(reason)
            asyncio.get_running_loop().call_later(REFUSED_BACKOFF, again)

        def again() -> None:
            if self._workers.get(url) is worker and not self._closed:
                self._run(url, worker)

        self._tasks[url] = self._supervisor.start(worker.run(), f"connection to {worker.name}", ended)

    async def _leave(self, worker: WorkerConnection, task: asyncio.Task[None]) -> None:
        try:
            await worker.unused()
        finally:
            await self._supervisor.stop(task)
            self._supervisor.forget(asyncio.current_task())

    async def close(self) -> None:
        """Close every socket; the workers abort what was submitted on them."""
        self._closed = True
        await self._supervisor.stop(*self._leaving, *self._tasks.values())

    def _note_change(self) -> None:
        lengths = [each.peer.max_length for each in self.ready() if each.peer and each.peer.role != "prefill"]
        self.max_length = min(lengths, default=self.max_length)
        self._changed.set()
        self._report_unpaired()

    async def change(self) -> None:
        """Wait for the next change of any worker's state."""
        self._changed.clear()
        await self._changed.wait()

    def ready(self) -> list[WorkerConnection]:
        """The workers that take new requests."""
        return [each for each in self._workers.values() if each.state == "ready" and each.peer is not None]

    def expecting(self) -> bool:
        """Whether a known worker may become ready soon."""
        return any(each.state == "connecting" for each in self._workers.values())

    def unready_reason(self) -> str | None:
        """Why no worker can decode, for clients: without names and addresses."""
        if any(each.peer and each.peer.role != "prefill" for each in self.ready()):
            return None
        if not self._workers:
            return "no worker is known"
        if self.ready():
            return "no decode worker is ready"
        states = Counter(each.state for each in self._workers.values())
        return "no worker is ready: " + ", ".join(f"{number} {state}" for state, number in sorted(states.items()))

    def unready_workers(self) -> str:
        """`unready_reason` with the workers' names and reasons, for the operator."""
        reason = self.unready_reason()
        if reason is None or self.ready() or not self._workers:
            return reason or ""
        states = sorted(f"{each.name} is {each.state} ({each.reason})" for each in self._workers.values())
        return "no worker is ready: " + ", ".join(states)

    def unpaired(self) -> list[tuple[str, str, str]]:
        """The ready prefill and decode workers that cannot pair, by name, each with the reason."""
        peers = [(each.name, each.peer) for each in self.ready() if each.peer]
        found = [
            (prefill, decode, writer.cannot_write_to(reader))
            for prefill, writer in peers
            for decode, reader in peers
            if writer.role == "prefill" and reader.role != "prefill"
        ]
        return [(prefill, decode, why) for prefill, decode, why in found if why is not None]

    def _report_unpaired(self) -> None:
        """Log each pair that cannot pair, once."""
        for each in self.unpaired():
            if each not in self._unpaired:
                self._unpaired.add(each)
                log.warning("workers cannot pair prefill=%s decode=%s reason=%r", *each)

    def states(self) -> Iterator[tuple[str, str]]:
        """Role (`unknown` until its hello) and state of each worker."""
        for each in self._workers.values():
            yield (each.peer.role if each.peer else "unknown", each.state)


class PoolCollector(Collector):
    """The present values of `kvasir_router_workers{role,state}`."""

    def __init__(self, pool: WorkerPool, registry: CollectorRegistry) -> None:
        self._pool = pool
        registry.register(self)

    def collect(self) -> Iterable[GaugeMetricFamily]:
        family = GaugeMetricFamily(
            "kvasir_router_workers", "Workers known to this router.", labels=["role", "state"]
        )
        counts: dict[tuple[str, str], int] = {}
        for labels in self._pool.states():
            counts[labels] = counts.get(labels, 0) + 1
        for labels, count in counts.items():
            family.add_metric(labels, count)
        yield family

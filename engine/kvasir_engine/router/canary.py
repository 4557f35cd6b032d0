"""Sends one canary through each new pair of workers, to find a pair that cannot move KV before a request does.

A prefill and a decode worker that can pair get a prompt that is in no radix tree, as quarantined pairs do. The
results are in `GET /status` and in a metric; the operator derives its condition KVTransferVerified from them.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from kvasir_engine.router.attempt import Target
from kvasir_engine.router.pool import WorkerPool
from kvasir_engine.router.quarantine import CANARY_SECONDS, Pair, Quarantine
from kvasir_engine.status_reports import PairReport

# Why a canary failed, in a sentence, or None for one whose KV came right.
Canary = Callable[[Target, Target], Awaitable[str | None]]
MOST_SHOWN = 5
MOST_SECONDS = 60.0


class PairVerifier(Collector):
    """Verifies the pairs of `pool` while `run` runs. A pair that fails goes to `quarantine`, which retries it."""

    def __init__(
        self,
        pool: WorkerPool,
        canary: Canary,
        quarantine: Quarantine,
        registry: CollectorRegistry,
        interval: float = CANARY_SECONDS,
    ) -> None:
        self._pool = pool
        self._canary = canary
        self._quarantine = quarantine
        self._interval = interval
        self._verified: set[Pair] = set()
        self._failed: dict[Pair, str] = {}
        registry.register(self)

    async def run(self) -> None:
        """Send canaries, one at a time, until cancelled."""
        while True:
            pairs = {_agents(*pair): pair for pair in self._pairs()}
            self._verified &= pairs.keys()  # a worker that comes back is another agent
            self._failed = {agents: why for agents, why in self._failed.items() if agents in pairs}
            todo = [a for a in pairs if a not in self._verified and not self._quarantine.refuses(*a)]
            for agents in todo:
                await self._verify(agents, *pairs[agents])
            if not todo:
                with contextlib.suppress(TimeoutError):
                    # A release from quarantine is no change of the pool.
                    await asyncio.wait_for(self._pool.change(), self._interval if self._failed else None)

    async def _verify(self, agents: Pair, prefill: Target, decode: Target) -> None:
        if not (prefill.available() and decode.available()):
            return
        try:
            async with asyncio.timeout(MOST_SECONDS):
                why = await self._canary(prefill, decode)
        except TimeoutError:
            return  # busy: no reason to think that the pages come wrong
        if why is None:
            self._verified.add(agents)
            self._failed.pop(agents, None)
        elif prefill.available() and decode.available():
            self._failed[agents] = why
            self._quarantine.suspect(prefill, decode)

    def report(self) -> PairReport:
        """What is known of the present pairs."""
        verified, pending = 0, 0
        failed: list[str] = []
        for prefill, decode in self._pairs():
            agents = _agents(prefill, decode)
            names = f"{prefill.worker.name} to {decode.worker.name}"
            if self._quarantine.refuses(*agents):
                failed.append(f"{names}: {self._failed.get(agents, 'a page came wrong')}")
            elif agents in self._verified:
                verified += 1
            else:
                pending += 1
        apart = [f"{prefill} and {decode}: {why}" for prefill, decode, why in self._pool.unpaired()]
        return PairReport(verified, pending, len(failed), tuple(failed[:MOST_SHOWN]), tuple(apart[:MOST_SHOWN]))

    def collect(self) -> list[GaugeMetricFamily]:
        """The present values of `kvasir_router_pairs{state}`."""
        report = self.report()
        family = GaugeMetricFamily("kvasir_router_pairs", "Pairs of workers by canary.", labels=["state"])
        family.add_metric(["verified"], report.verified)
        family.add_metric(["pending"], report.pending)
        family.add_metric(["failed"], report.failed)
        return [family]

    def _pairs(self) -> list[tuple[Target, Target]]:
        """The pairs that could move KV: both are ready, and their fingerprints match."""
        targets = [Target(each, each.peer, 0) for each in self._pool.ready() if each.peer]
        return [
            (writer, holder)
            for writer in targets
            for holder in targets
            if writer.peer.role == "prefill"
            and holder.peer.role != "prefill"
            and writer.peer.cannot_write_to(holder.peer) is None
        ]


def _agents(prefill: Target, decode: Target) -> Pair:
    return prefill.peer.endpoint.agent, decode.peer.endpoint.agent

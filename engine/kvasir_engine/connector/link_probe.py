"""What the links to peers cost, measured once when two workers meet.

It is measured under the first lease, with pages that this worker may write and that nobody uses before `Complete`:
once their bytes are there, some of them are written again, the same bytes to the same places, in two shapes. The
write that the lease waits for is not over before that is, so all that holds of writes (the nonce of the lease, and
that its pages stay its writer's until the last write has ended) holds of these. A router's canary is the first
lease of each pair, so no user waits for it.
"""

import logging
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass

from kvasir_engine.connector.fabric_rate import FabricRate
from kvasir_engine.connector.nixl_agent import NixlAgent, Pages, TransferHandle
from kvasir_engine.connector.push_size import LinkCost, Timed, cost_of, layers_a_push
from kvasir_engine.status_reports import LinkReport

log = logging.getLogger("transfer")

WRITE_SECONDS = 0.002
"""What a write that is timed should take: it has as many pages."""
SLOW_SECONDS = 0.02
"""A page that takes longer tells enough: no more is written."""
ROUNDS = 3
MOST_PAGES = 64
MOST_LINKS = 512

Writing = Generator[None, None, Timed | None]


@dataclass
class _Probe:
    steps: Generator[None, None, None]
    transfer: TransferHandle | None = None


class LinkProbes:
    """The links of one agent. `learned` hears how many layers go in one push to a peer."""

    def __init__(
        self,
        agent: NixlAgent,
        fabric: FabricRate,
        learned: Callable[[str, int], None],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.links: Mapping[str, LinkReport] = {}
        """By peer. Replaced as a whole: other threads read it."""
        self._agent = agent
        self._fabric = fabric
        self._learned = learned
        self._clock = clock
        self._layers = agent.endpoint.fingerprint.layers
        self._probes: dict[str, _Probe] = {}

    def __len__(self) -> int:
        return len(self._probes)

    def wants(self, agent: str) -> bool:
        """Whether the link to a peer is yet to be measured."""
        return agent not in self.links and agent not in self._probes

    def begin(self, agent: str, local: Pages, remote: Pages) -> None:
        """Measure with these pages, whose bytes are there. `busy` goes on with it."""
        probe = _Probe(_nothing())
        probe.steps = self._measure(probe, agent, local, remote)
        self._probes[agent] = probe

    def busy(self, agent: str) -> bool:
        """Whether the peer is still being measured. Raises PeerDied."""
        probe = self._probes.get(agent)
        if probe is None:
            return False
        for _ in probe.steps:
            return True
        del self._probes[agent]
        return False

    def died(self, agent: str) -> None:
        """The peer is gone."""
        probe = self._probes.pop(agent, None)
        if probe is not None and probe.transfer is not None:
            self._agent.cancel(probe.transfer)
        if agent in self.links:
            self.links = {peer: link for peer, link in self.links.items() if peer != agent}

    def _measure(self, probe: _Probe, agent: str, local: Pages, remote: Pages) -> Generator[None, None, None]:
        """Yields while a write is under way. A write that fails ends it: nothing is known then, as before."""
        every, some = range(self._layers), range(0, self._layers, 2)
        first = yield from self._write(probe, agent, local[:1], remote[:1], every)
        if first is None:
            return
        costs = [LinkCost(0.0, first.rate)]
        if first.seconds <= SLOW_SECONDS:
            count = max(1, min(len(local), MOST_PAGES, int(WRITE_SECONDS / first.seconds)))
            mine, theirs = local[:count], remote[:count]
            # Half of the layers, none beside another, are a descriptor each; of all a page is one.
            parts = self._layers > 1 and self._agent.sends_whole_pages(agent)
            for _ in range(ROUNDS):
                whole = yield from self._write(probe, agent, mine, theirs, every)
                pieces = (yield from self._write(probe, agent, mine, theirs, some)) if parts else whole
                if whole is None or pieces is None:
                    return
                costs.append(cost_of(whole, pieces) if parts else LinkCost(0.0, whole.rate))
        # What others disturbed least.
        self._learn(agent, max(costs[1:] or costs, key=lambda each: each.bytes_per_second))

    def _write(self, probe: _Probe, agent: str, local: Pages, remote: Pages, layers: range) -> Writing:
        cut = self._agent.sent(agent)
        size = 0 if cut is None else len(local) * sum(cut.moved_bytes(range(at, at + 1)) for at in layers)
        if not size:
            return None
        began = self._clock()
        probe.transfer = self._agent.write(agent, local, remote, layers)
        while (ok := self._agent.poll(agent, probe.transfer)) is None:
            yield
        probe.transfer = None
        descriptors = len(local) * (1 if layers.step == 1 else len(layers))
        return Timed(descriptors, size, max(self._clock() - began, 1e-9)) if ok else None

    def _learn(self, agent: str, cost: LinkCost) -> None:
        region = self._agent.endpoint.region
        parts = self._agent.sends_whole_pages(agent)
        group = layers_a_push(cost, region.page_bytes // self._layers, self._layers) if parts else 1
        rate = cost.bytes_per_second
        problem = self._fabric.problem(rate)
        link = LinkReport(agent, self._fabric.name, round(rate), cost.descriptor_seconds, group, problem)
        kept = list(self.links.items())[-(MOST_LINKS - 1) :]
        self.links = {**dict(kept), agent: link}
        log.info(
            "link measured agent=%s transport=%s bytes_per_second=%.3g descriptor_seconds=%.2g layers_a_push=%d",
            agent, self._fabric.name, rate, cost.descriptor_seconds, group,
        )  # fmt: skip
        if problem:
            log.warning("link is slow agent=%s reason=%r", agent, problem)
        self._learned(agent, group)


def _nothing() -> Generator[None, None, None]:
    yield from ()

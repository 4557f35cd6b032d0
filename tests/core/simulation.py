"""Two engines and the wire between their transfer threads, one event at a time, on a clock that tests turn.

Engines, connectors and transfer threads are the product's, over the fake NIXL of `tests/connector/fake_nixl.py`: a
write spoils a page when it begins and copies when it ends, so whoever reads or reuses a page under it is caught.
"""

from dataclasses import dataclass
from typing import Any

from fake_nixl import Transfer, Wire
from stepped import SteppedThread
from toy import LAYERS, LateRunner, ToyRunner

from kvasir_engine.connector import notifications
from kvasir_engine.connector.digester import Digester
from kvasir_engine.connector.kv_connector import KVConnector
from kvasir_engine.connector.layout import spec_of
from kvasir_engine.connector.notifications import AnyMessage
from kvasir_engine.connector.receiver import PING_INTERVAL
from kvasir_engine.core.engine import Engine
from kvasir_engine.core.grammar_service import GrammarService
from kvasir_engine.core.scheduler import Limits
from kvasir_engine.kv.digests import TOKENS
from kvasir_engine.kv.pages import Owner
from kvasir_engine.protocol import Fingerprint, LayerRun, Region

ROW = 8
"""Bytes of a token in a layer."""


@dataclass(frozen=True)
class Copy:
    """A write or read under way: our pages, the peer's, and of which layers."""

    transfer: Transfer
    local: tuple[int, ...]
    remote: tuple[int, ...]
    layers: range

    @property
    def reads(self) -> bool:
        return self.transfer.operation == "READ"


class Worker:
    """An engine with a transfer side that waits to be moved."""

    def __init__(
        self,
        network: "Network",
        role: Any,
        name: str,
        pages: int,
        limits: Limits,
        overlap: bool = False,
        grammars: GrammarService | None = None,
    ) -> None:
        self.network = network
        self.name = name
        self.runner = (LateRunner if overlap else ToyRunner)(pages, limits.page_size)
        epoch, pool = network.next_epoch(), self.runner.pool
        shape = Fingerprint(
            "toy",
            "",
            "int64",
            "toy",
            limits.page_size,
            LAYERS,
            1,
            1,
            "toy",
            1,
            TOKENS,
            [LayerRun(LAYERS, 1, 1, ROW)],
        )
        self.region = Region(pool.address, pages, pool.page_bytes)
        digester = Digester(pool.address, pages, spec_of(shape, pool.page_bytes))
        self.thread = SteppedThread(network.wire, epoch, self.region, shape, lambda: network.now, digester)
        self.endpoint, self.events = self.thread.endpoint, self.thread.events
        connector = KVConnector(self.thread)
        self.engine = Engine(self.runner, role, limits, 64, epoch, connector, overlap=overlap, grammars=grammars)  # type: ignore[arg-type]
        network.workers[self.agent] = self

    @property
    def agent(self) -> str:
        return self.endpoint.agent

    # -- what a test can make happen

    def run_commands(self) -> None:
        """The transfer thread takes its commands, and looks at the clock."""
        self.thread.turn()

    tick = run_commands

    def receive(self) -> None:
        """The next message from any peer arrives."""
        self.thread.hear()

    def receive_all(self) -> None:
        """All messages arrive that are on their way."""
        while self.peers_with_messages:
            self.thread.hear()

    @property
    def peers_with_messages(self) -> list[str]:
        """The peers whose messages are on their way."""
        return self.network.wire.waiting(self.agent)

    def end_write(self, place: int = 0, ok: bool = True) -> None:
        """A write or read under way ends."""
        self.thread.end(place, ok)

    def take_events(self) -> None:
        """The engine takes what its transfer thread reported."""
        while self.events:
            self.engine.reported(0, self.events.popleft())

    @property
    def writes(self) -> list[Copy]:
        """What is under way, also reads."""
        return [self._copy(transfer) for transfer in self.thread.transfers]

    def _copy(self, transfer: Transfer) -> Copy:
        peer = self.network.workers[transfer.peer]
        cells = [self._cell(address) for address, _ in transfer.ours]
        remote = [peer._cell(address)[0] for address, _ in transfer.theirs]
        layers = sorted({layer for _, layer in cells})
        local = tuple(dict.fromkeys(page for page, _ in cells))
        return Copy(transfer, local, tuple(dict.fromkeys(remote)), range(layers[0], layers[-1] + 1))

    def _cell(self, address: int) -> tuple[int, int]:
        """The page and layer that begin there."""
        page, within = divmod(address - self.region.address, self.region.page_bytes)
        layer, rest = divmod(within, self.region.page_bytes // LAYERS)
        assert not rest
        assert 0 <= page < self.region.pages
        return page, layer

    def check(self) -> None:
        """Raise unless every page has its owner, and what is read or written by a write has the right one."""
        self.engine.check()
        for copy in self.writes:
            peer = self.network.workers[copy.transfer.peer]
            ours = [self.engine.cache.pool.owner(page) for page in copy.local]
            theirs = [peer.engine.cache.pool.owner(page) for page in copy.remote]
            assert set(ours) == {Owner.HELD}, f"pages {copy.local} are under a copy, and nobody holds them: {ours}"
            right = {Owner.HELD} if copy.reads else {Owner.LEASED, Owner.FENCED}
            assert set(theirs) <= right, f"pages {copy.remote} of the peer are under a copy, and are {theirs}"
            found = Wire.bytes_of(copy.transfer.source)
            assert found == copy.transfer.found, "what is copied was changed meanwhile"

    def quiet(self) -> bool:
        """Whether it owes nothing, and its pool holds nothing but what is cached."""
        pool = self.engine.cache.pool
        return not self.engine.unfinished and pool.available == pool.size and self.thread.quiet


class Network:
    """The workers that live, and the wire between them."""

    def __init__(self) -> None:
        self.now = 0.0
        self.wire = Wire()
        self.workers: dict[str, Worker] = {}
        self._epochs = 0

    def next_epoch(self) -> int:
        self._epochs += 1
        return self._epochs

    def messages(self, to: Worker) -> list[AnyMessage]:
        """What is on its way to a worker."""
        return [
            notifications.decode(data)
            for (_, other), sent in self.wire.sent.items()
            if other == to.agent
            for data in sent
        ]

    def wait(self, seconds: float) -> None:
        """Time passes, and what the workers say to each other arrives. No write ends, no engine steps."""
        until = self.now + seconds
        while self.now < until:
            self.now = min(self.now + 1.0, until)
            for worker in [*self.workers.values()] * 2:
                worker.tick()
                worker.receive_all()

    def kill(self, worker: Worker, seen: bool = True) -> None:
        """The process is gone, with its writes and mail. Not `seen`: until somebody tells it something."""
        del self.workers[worker.agent]
        self.wire.kill(worker.agent)
        if seen:
            self.now += PING_INTERVAL
            for other in self.workers.values():
                other.tick()

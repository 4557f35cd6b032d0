"""Workers of several ranks for the simulation of leases: the product's connector and transfer threads, and pools.

A pool's bytes are known at any time where nobody may write them: what is written there too late is seen.
"""

from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
from fake_nixl import Pieces, Wire
from stepped import SteppedThread

from kvasir_engine.connector.commands import AnyCommand
from kvasir_engine.connector.digester import Digester
from kvasir_engine.connector.kv_connector import KVConnector
from kvasir_engine.connector.layout import spec_of
from kvasir_engine.connector.rank_parts import Event
from kvasir_engine.connector.sender import Key, LayerPush, Push
from kvasir_engine.connector.stats import TransferStats
from kvasir_engine.kv.digests import TOKENS as DIGEST
from kvasir_engine.protocol import HEADS_APART, Address, Fingerprint, Region
from kvasir_engine.status_reports import LinkReport

LAYERS, PARTS, HEADS, ROW = 2, 2, 2, 8
POOL_TOKENS = 128
Bytes = np.ndarray[Any, np.dtype[np.uint8]]


def content_of(number: int, tokens: int) -> Bytes:
    """The KV of a prompt, [layers, parts, heads, tokens, row]: another for each number."""
    rows = np.random.default_rng(number).integers(0, 255, (LAYERS, PARTS, HEADS, tokens, ROW))
    return rows.astype(np.uint8)


class Rank:
    """One rank: its pool, its transfer thread, and rank 0's commands on their way to it."""

    def __init__(self, wire: Wire, epoch: int, shape: Fingerprint, rank: int, clock: Callable[[], float]) -> None:
        self.rank, self.size, self.shape = rank, shape.page_size, shape
        ranks, pages = shape.tensor_parallel, POOL_TOKENS // shape.page_size
        each = max(HEADS // ranks, 1)
        first = rank * HEADS // ranks
        self.heads = slice(first, first + each)
        self.pool: Bytes = np.zeros((pages, LAYERS, PARTS, each, self.size, ROW), np.uint8)
        self.region = Region(self.pool.ctypes.data, pages, self.pool[0].nbytes)
        spec = spec_of(shape, self.region.page_bytes)
        digester = Digester(self.region.address, pages, spec)
        self.sent: deque[AnyCommand] = deque()
        self.told = 0
        self.late = False  # rank 0's commands do not arrive now
        intake = self._intake if rank else None
        self.thread = SteppedThread(wire, epoch, self.region, shape, clock, digester, rank, intake)
        self.agent = self.thread.agent

    def _intake(self) -> list[AnyCommand]:
        commands: list[AnyCommand] = []
        while self.sent and not self.late:
            commands.append(self.sent.popleft())
        return commands

    def command(self, command: AnyCommand) -> None:
        """Of rank 0, to another."""
        self.sent.append(command)
        self.told += 1

    def fill(self, pages: list[int], content: Bytes) -> None:
        """Let pages hold this rank's part of a content."""
        for place, page in enumerate(pages):
            self.pool[page] = self._part(content, place)

    def differing(self, pages: list[int], content: Bytes) -> list[int]:
        """The pages that do not hold this rank's part of a content."""
        return [page for at, page in enumerate(pages) if (self.pool[page] != self._part(content, at)).any()]

    def _part(self, content: Bytes, place: int) -> Bytes:
        part: Bytes = content[:, :, self.heads, place * self.size : (place + 1) * self.size]
        return part

    def pages_of(self, pieces: Pieces) -> set[int]:
        """The pages that these bytes are in."""
        return {(address - self.region.address) // self.region.page_bytes for address, _ in pieces}


class _Others:
    """What KVConnector knows of ranks 1 and up."""

    def __init__(self, ranks: list[Rank]) -> None:
        self._ranks = ranks
        self.addresses = tuple(Address(r.agent, r.thread.endpoint.metadata, r.region) for r in ranks)
        self.stats = TransferStats()

    @property
    def links(self) -> list[LinkReport]:
        return [
            msgspec.structs.replace(link, rank=rank.rank)
            for rank in self._ranks
            for link in rank.thread.links.values()
        ]

    def command(self, command: AnyCommand) -> None:
        for rank in self._ranks:
            rank.command(command)

    def push(self, key: Key, push: Push) -> None:
        for rank in self._ranks:
            rank.thread.hold_until(rank.told)
            rank.thread.push(key, push)

    def push_layers(self, pushes: list[LayerPush]) -> None:
        for rank in self._ranks:
            rank.thread.hold_until(rank.told)
            on_layer = rank.thread.push_layers(pushes)
            for layer in range(LAYERS):
                on_layer(layer)


class SimulatedWorker:
    """All ranks of a worker, and the pages that its engine has."""

    def __init__(self, wire: Wire, epoch: int, ranks: int, page_size: int, clock: Callable[[], float]) -> None:
        shape = Fingerprint("m", "", "float32", HEADS_APART, page_size, LAYERS, HEADS, 2, "rope", ranks, DIGEST)
        self.wire, self.epoch, self.size = wire, epoch, page_size
        self.ranks = [Rank(wire, epoch, shape, rank, clock) for rank in range(ranks)]
        others = _Others(self.ranks[1:]) if ranks > 1 else None
        self.connector = KVConnector(self.ranks[0].thread, others)
        self.endpoint = self.connector.endpoint
        self.free = list(range(POOL_TOKENS // page_size))
        self.known: dict[int, tuple[int, int]] = {}  # by page that nobody may write: the content, and its place
        self._contents: dict[int, Bytes] = {}

    @property
    def agents(self) -> list[str]:
        return [rank.agent for rank in self.ranks]

    def take(self, tokens: int) -> list[int]:
        """Pages for so many tokens; of too few, none."""
        count = tokens // self.size
        if count > len(self.free):
            return []
        taken, self.free = self.free[:count], self.free[count:]
        return taken

    def fill(self, pages: list[int], number: int, tokens: int) -> None:
        """Pages are written, here and now, and are nobody else's to write."""
        for rank in self.ranks:
            rank.fill(pages, content_of(number, tokens))
        self.know(pages, number, tokens)

    def know(self, pages: list[int], number: int, tokens: int) -> None:
        """From now on pages hold this content."""
        self._contents[number] = content_of(number, tokens)
        self.known |= {page: (number, place) for place, page in enumerate(pages)}

    def expose(self, pages: list[int]) -> None:
        """From now on somebody else writes these pages."""
        for page in pages:
            self.known.pop(page, None)

    def holds(self, pages: list[int], number: int, tokens: int) -> bool:
        """Whether pages hold the content, on all ranks."""
        content = content_of(number, tokens)
        return not any(rank.differing(pages, content) for rank in self.ranks)

    def check(self) -> None:
        """Raise if bytes changed that nobody may write."""
        for rank in self.ranks:
            for page, (number, place) in self.known.items():
                at = place * self.size
                part = self._contents[number][:, :, rank.heads, at : at + self.size]
                assert (rank.pool[page] == part).all(), f"page {page} of {rank.agent} was written by nobody"

    def touched(self) -> set[int]:
        """The pages that are under a transfer."""
        return {
            page
            for rank in self.ranks
            for transfer in self.wire.transfers
            for page in rank.pages_of(self.wire.touches(rank.agent, transfer))
        }

    def events(self, rank: Rank) -> list[Event]:
        """What a rank has reported, as the worker's engine hears of it."""
        heard: list[Event] = []
        while rank.thread.events:
            heard += self.connector.received(rank.rank, rank.thread.events.popleft())
        return heard

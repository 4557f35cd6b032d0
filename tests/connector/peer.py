"""A prefill worker's transfer side as a process of its own, driven through a pipe: real NIXL, real bytes."""

import multiprocessing as mp
import os
import queue
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import TypeVar

import numpy as np

from kvasir_engine.connector.commands import AnyCommand, Grant, Lend, Open, Read, Revoke
from kvasir_engine.connector.digester import Digester
from kvasir_engine.connector.fabric_rate import fabric_rate
from kvasir_engine.connector.layout import spec_of
from kvasir_engine.connector.nixl_agent import NixlAgent
from kvasir_engine.connector.notifications import Complete, Stopped
from kvasir_engine.connector.rank_parts import Event
from kvasir_engine.connector.sender import Push
from kvasir_engine.connector.transfer_thread import TransferThread
from kvasir_engine.kv.digests import KeptDigests
from kvasir_engine.protocol import Endpoint, Fingerprint, Lease, Loan, Region
from kvasir_engine.status_reports import LinkReport

PAGES = 64
PAGE_BYTES = 4096
LAYERS = 4
SPOILED = 4
FINGERPRINT = Fingerprint("m", "", "float32", "pages", 16, LAYERS, 1, 16, "rope")

E = TypeVar("E")


@dataclass
class Side:
    """One worker's pool, transfer thread and events."""

    epoch: int
    fingerprint: Fingerprint = FINGERPRINT
    spoils: bool = False
    events: queue.Queue[Event] = field(default_factory=queue.Queue)
    rank: int = 0
    intake: Callable[[], list[AnyCommand]] | None = None

    def __post_init__(self) -> None:
        self.pool = np.zeros((PAGES, PAGE_BYTES), np.uint8)
        region = Region(self.pool.ctypes.data, PAGES, PAGE_BYTES)
        # What the digests are computed of; a test lets it differ from what is written.
        self.meant = np.zeros_like(self.pool) if self.spoils else self.pool
        self.kept = KeptDigests(PAGES, LAYERS, 16)
        shape = spec_of(self.fingerprint, PAGE_BYTES)
        self.digest = digest = Digester(self.meant.ctypes.data, PAGES, shape, self.kept)
        self.handoff = TransferThread(
            lambda: NixlAgent(self.epoch, region, self.fingerprint, self.rank),
            self.events.put,
            digest,
            self.rank,
            self.intake,
            fabric=fabric_rate("auto", False, os.environ),
        )
        self.handoff.start()

    @property
    def endpoint(self) -> Endpoint:
        return self.handoff.endpoint

    def grant(self, lease: Lease, to: Endpoint, tokens: int = 0) -> None:
        self.handoff.command(Grant(lease, to, tokens))

    def revoke(self, lease: int) -> None:
        self.handoff.command(Revoke(lease))

    def know(self) -> None:
        """As if all pages had been digested when they were written, as they are now."""
        self.digest.keep(self.digest.measured(range(PAGES), range(LAYERS)), range(PAGES))

    def wait(self, kind: type[E]) -> E:
        """The next event, which must be of this kind."""
        event = self.events.get(timeout=60)
        assert isinstance(event, kind), event
        return event


def _serve(
    pipe: Connection, environment: dict[str, str], epoch: int, fingerprint: Fingerprint, spoils: bool
) -> None:
    os.environ.clear()  # it is that of whichever test came first
    os.environ.update(environment)
    side = Side(epoch, fingerprint, spoils)
    side.pool[:] = np.arange(PAGES, dtype=np.uint8)[:, None]  # page i holds bytes i
    side.meant[:] = side.pool
    if spoils:
        side.pool[SPOILED, -1] ^= 1
    pipe.send(side.endpoint)
    key = ("", 0)
    while True:
        match pipe.recv():
            case ("open", Endpoint() as to, Lease() as lease):
                side.handoff.command(Open(to, lease))
                key = to.agent, lease.id
            case ("push", Push() as push):
                side.handoff.push(key, push)
            case ("read", Endpoint() as to, Loan() as loan):
                side.handoff.command(Read(to, loan))
                key = to.agent, loan.id
            case ("lend", Loan() as loan, Endpoint() as to):
                side.handoff.command(Lend(loan, to))
            case ("know and spoil", list() as pages):
                side.know()
                side.pool[pages, 7] ^= 1
                pipe.send(None)
            case ("look", list() as pages):
                pipe.send([set(side.pool[page].tolist()) for page in pages])
            case ("links",):
                pipe.send(dict(side.handoff.links))
            case ("event",):
                pipe.send(side.events.get(timeout=60))
            case ("stop",):
                side.handoff.stop()
                return


class Peer:
    """The process. Its pool's page i holds the byte i everywhere; `spoils`: but for a bit of page SPOILED."""

    def __init__(self, epoch: int, fingerprint: Fingerprint = FINGERPRINT, spoils: bool = False) -> None:
        context = mp.get_context("forkserver")
        self._pipe, theirs = context.Pipe()
        arguments = (theirs, dict(os.environ), epoch, fingerprint, spoils)
        self.process = context.Process(target=_serve, args=arguments, daemon=True)
        self.process.start()
        theirs.close()
        self.endpoint: Endpoint = self._pipe.recv()

    def open(self, to: Endpoint, lease: Lease) -> None:
        self._pipe.send(("open", to, lease))

    def push(self, local: list[int], remote: list[int], layer: int | None = None, final: bool = False) -> None:
        self._pipe.send(("push", Push(tuple(local), tuple(remote), layer, final)))

    def links(self) -> dict[str, LinkReport]:
        """What it measured of its links."""
        self._pipe.send(("links",))
        found: dict[str, LinkReport] = self._pipe.recv()
        return found

    def read(self, to: Endpoint, loan: Loan) -> None:
        self._pipe.send(("read", to, loan))

    def lend(self, loan: Loan, to: Endpoint) -> None:
        self._pipe.send(("lend", loan, to))

    def know_and_spoil(self, pages: list[int]) -> None:
        """Let all pages be known as they are, and a bit of these change then."""
        self._pipe.send(("know and spoil", pages))
        self._pipe.recv()

    def look(self, pages: list[int]) -> list[set[int]]:
        """The bytes that occur in each of these pages."""
        self._pipe.send(("look", pages))
        found: list[set[int]] = self._pipe.recv()
        return found

    def complete(self, complete: Complete | Stopped) -> None:
        self._pipe.send(("push", Push(complete=complete)))

    def event(self) -> Event:
        self._pipe.send(("event",))
        event: Event = self._pipe.recv()
        return event

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def close(self) -> None:
        if self.process.is_alive():
            self._pipe.send(("stop",))
            self.process.join(60)
        assert not self.process.is_alive()

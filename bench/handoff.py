"""What a handoff costs: Llama-3.1-8B-shaped KV from one process to another, through kvasir's own transfer threads.

    python -m bench.handoff [--rounds N] [--tokens N ...] [--fabric auto|shm|tcp] [--small-pages] [--json]

Two processes, real NIXL, real bytes. Per prompt length, in turn in every round: a plain NIXL copy of the same pages
between the same two pools (one request, whole pages), the handoff with digests that were made when the pages were
written, with digests that the writer reads from memory beside the copy, and without. Then the handoff at the
compute's pace: the transport is held back (`Paced`) to the rate at which an emulated prefill fills pages, so that
compute and transfer take equally long; the pages go layer by layer, or a chunk at a time. Medians.

A handoff's time is from the writer's first push to the holder's `Settled`: copies, digests on both sides, messages.
Exposed time is from the end of the last layer's computation to `Settled`.
"""

import argparse
import json
import logging
import mmap
import multiprocessing as mp
import os
import platform
import queue
import signal
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from typing import Any

import msgspec
import numpy as np
from bench.digests import LLAMA as LLAMA_SHAPE
from bench.digests import stores
from nixl_cu13._api import nixl_agent, nixl_agent_config
from rich.console import Console
from rich.table import Table

from kvasir_engine.connector import receiver, sender
from kvasir_engine.connector.commands import Grant, Open, Revoke
from kvasir_engine.connector.digester import Digester
from kvasir_engine.connector.layout import spec_of
from kvasir_engine.connector.nixl_agent import NixlAgent, Pages, TransferHandle, choose_fabric
from kvasir_engine.connector.notifications import Complete
from kvasir_engine.connector.rank_parts import Event
from kvasir_engine.connector.sender import Push
from kvasir_engine.connector.transfer_thread import TransferThread
from kvasir_engine.kv.digests import NONE, TOKENS, KeptDigests
from kvasir_engine.protocol import Endpoint, Fingerprint, Lease, Region

LAYERS, PAGE_TOKENS = 32, 16
PAGE_BYTES = LAYERS * 2 * 8 * PAGE_TOKENS * 128 * 2
CHUNK = 512
"""Tokens of a prefill chunk, as the worker's default."""
LLAMA = Fingerprint("llama-3.1-8b", "", "bfloat16", "pages", PAGE_TOKENS, LAYERS, 8, 128, "rope")
SHAPE = spec_of(LLAMA, PAGE_BYTES)
SMALL_PAGES = "KVASIR_BENCH_SMALL_PAGES"
VARIANTS = [  # name, digests, made when the pages were written (else read from memory beside the copy), by layer
    ("with", True, True, True),
    ("read", True, False, True),
    ("without", False, False, True),
    ("chunks", True, True, False),
    ("chunks without", False, False, False),
]
clock = time.perf_counter  # CLOCK_MONOTONIC: one clock for both processes
WAIT_SECONDS = 120.0
"""Longer than a lease: whoever waits so long waits for nothing, and says for what."""


class Paced(NixlAgent):
    """An agent whose link carries `rate` bytes a second, one write after the other; 0: as fast as it goes."""

    rate = 0.0
    _free = 0.0

    def write(self, agent: str, local: Pages, remote: Pages, layers: range) -> TransferHandle:
        began = clock()
        transfer = super().write(agent, local, remote, layers)
        if self.rate:
            size = len(local) * PAGE_BYTES * len(layers) // LAYERS
            self._free = max(began, self._free) + size / self.rate
            transfer.until = self._free  # type: ignore[attr-defined]
        return transfer

    def poll(self, agent: str, transfer: TransferHandle) -> bool | None:
        if clock() < getattr(transfer, "until", 0.0):
            return None
        return super().poll(agent, transfer)


class TimedOut(Exception):
    """One side waited for the other in vain; the message says which, and for what."""

    def __init__(self, message: str) -> None:
        super().__init__(f"{message}, for {WAIT_SECONDS:.0f} s")


class Side:
    """One process: a pool, a transfer thread with digests and one without, and a NIXL agent for plain copies."""

    def __init__(self, name: str, epoch: int, pages: int) -> None:
        self.name = name
        self.memory = mmap.mmap(-1, pages * PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if SMALL_PAGES not in os.environ:  # as the engine's pool
            self.memory.madvise(mmap.MADV_HUGEPAGE)
        self.pool = np.frombuffer(self.memory, np.uint8).reshape(pages, PAGE_BYTES)
        self.pool[:] = 1  # every page of memory is there before anything is measured
        self.region = Region(self.pool.ctypes.data, pages, PAGE_BYTES)
        self.events: queue.SimpleQueue[tuple[float, Event]] = queue.SimpleQueue()
        self.agents: list[Paced] = []
        self.kept = KeptDigests(pages, LAYERS, PAGE_TOKENS)
        self.digester = Digester(self.region.address, pages, SHAPE, self.kept)
        self.handoffs = {
            digests: TransferThread(
                self._maker(epoch * 2 + digests, digests),
                lambda event: self.events.put((clock(), event)),
                self.digester if digests else None,
            )
            for digests in (False, True)
        }
        for handoff in self.handoffs.values():
            handoff.start()
        self.plain = nixl_agent(f"plain-{epoch}", nixl_agent_config(enable_prog_thread=False, backends=["UCX"]))
        self.plain.register_memory([(self.region.address, pages * PAGE_BYTES, 0, "")], "DRAM")

    def _maker(self, epoch: int, digests: bool) -> Callable[[], NixlAgent]:
        def make() -> NixlAgent:
            agent = Paced(epoch, self.region, msgspec.structs.replace(LLAMA, digest=TOKENS if digests else NONE))
            self.agents.append(agent)
            return agent

        return make

    def endpoints(self) -> dict[bool, Endpoint]:
        return {digests: handoff.endpoint for digests, handoff in self.handoffs.items()}

    def wait(self, kind: type[Any]) -> tuple[float, Any]:
        """When the next event came, which must be of this kind."""
        try:
            when, event = self.events.get(timeout=WAIT_SECONDS)
        except queue.Empty:
            threads = {digests: each.is_alive() for digests, each in self.handoffs.items()}
            raise TimedOut(
                f"{self.name} waited for {kind.__name__}; transfer threads by digests: {threads}"
            ) from None
        if not isinstance(event, kind):
            raise RuntimeError(f"{self.name} heard {event} where {kind.__name__} was due")
        return when, event

    def descriptors(self, region: Region, pages: list[int]) -> list[tuple[int, int, int]]:
        return [(region.address + page * PAGE_BYTES, PAGE_BYTES, 0) for page in pages]

    def close(self) -> None:
        for handoff in self.handoffs.values():
            handoff.stop()


@dataclass(frozen=True)
class Job:
    """A handoff for the writer: `layerwise` or a chunk at a time; `compute` seconds in all are slept for."""

    digests: bool
    kept: bool
    to: Endpoint
    lease: Lease
    local: list[int]
    layerwise: bool = True
    compute: float = 0.0
    rate: float = 0.0


@dataclass(frozen=True)
class Written:
    """The writer's side of a handoff, in moments of the clock; what was posted."""

    began: float
    computed: float
    writes: int
    pieces: int


def prefill(side: Side, job: Job) -> Written:
    """What a prefill worker's engine does with a prompt's pages, without the model."""
    handoff = side.handoffs[job.digests]
    for agent in side.agents:
        agent.rate = job.rate
    writes, descriptors = handoff.stats.writes, handoff.stats.descriptors
    if job.digests and not job.kept:
        side.digester.forget(job.local, None)
    handoff.command(Open(job.to, job.lease))
    key = job.to.agent, job.lease.id
    total, step = len(job.local), CHUNK // PAGE_TOKENS
    began = due = clock()
    for first in range(0, total, step):
        local, remote = tuple(job.local[first : first + step]), tuple(job.lease.pages[first : first + step])
        final = first + step >= total
        layer_time = job.compute * len(local) / total / LAYERS
        for layer in range(LAYERS):
            due += layer_time
            time.sleep(max(0.0, due - clock()))
            computed = clock()
            if layer == LAYERS - 1:
                handoff.push(key, Push(local, remote, layer if job.layerwise else None, final=final))
            elif job.layerwise:
                handoff.push(key, Push(local, remote, layer))
    complete = Complete(job.lease.id, job.lease.epoch, total * PAGE_TOKENS, total, 0)
    handoff.push(key, Push(complete=complete))
    while side.wait(sender.Done)[1].push.complete is None:
        pass
    stats = handoff.stats
    return Written(began, computed, stats.writes - writes, stats.descriptors - descriptors)


def copy(side: Side, peer: str, region: Region, local: list[int], remote: list[int]) -> tuple[float, float]:
    """A plain NIXL copy of whole pages: when it was posted and when it was done. Preparing is not counted."""
    ours = side.plain.prep_xfer_dlist("NIXL_INIT_AGENT", side.descriptors(side.region, local), "DRAM")
    theirs = side.plain.prep_xfer_dlist(peer, side.descriptors(region, remote), "DRAM")
    index = np.arange(len(local), dtype=np.int32)
    handle = side.plain.make_prepped_xfer("WRITE", ours, index, theirs, index, b"done")
    began = clock()
    state = side.plain.transfer(handle)
    while state == "PROC":
        state = side.plain.check_xfer_state(handle)
        if clock() > began + WAIT_SECONDS:
            raise TimedOut(f"{side.name} waited for a plain copy of {len(local)} pages")
    ended = clock()
    if state != "DONE":
        raise RuntimeError(f"the plain copy ended as {state}")
    for each in (handle, ours, theirs):
        each.release()
    return began, ended


def write_for(pipe: Connection, epoch: int, pages: int) -> None:
    """The writer's process: does what the pipe says."""
    side = Side("the writer", epoch, pages)
    pipe.send((side.endpoints(), side.plain.get_agent_metadata()))
    peer = ""
    while True:
        match pipe.recv():
            case ("fill", int() as seed):
                side.pool[:] = np.random.default_rng(seed).integers(0, 256, side.pool.shape, np.uint8)
                pages_ = range(
                    len(side.pool)
                )  # as the kernel that stores KV does, whose cost is measured by itself
                side.digester.keep(side.digester.measured(pages_, range(LAYERS)), pages_)
                pipe.send(None)
            case ("peer", bytes() as metadata):
                peer = side.plain.add_remote_agent(metadata).decode()
            case ("copy", Region() as region, list() as local, list() as remote):
                pipe.send(copy(side, peer, region, local, remote))
            case ("open", Endpoint() as to, Lease() as lease):
                side.handoffs[True].command(Open(to, lease))
            case Job() as job:
                pipe.send(prefill(side, job))
            case None:
                side.close()
                return


class Bench:
    """The holder's process, which drives the writer's."""

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self.side = Side("the holder", 1, pages)
        self.epochs = self.leases = 1
        self.start()
        self.pipe.send(("peer", self.side.plain.get_agent_metadata()))

    def start(self) -> None:
        """A writer, anew."""
        self.epochs += 1
        context = mp.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=write_for, args=(theirs, self.epochs, self.pages), daemon=True)
        self.process.start()
        theirs.close()
        self.endpoints, self.plain = self.answer("its endpoints")

    def answer(self, what: str) -> Any:
        """What the writer sends next. Raises TimedOut, or RuntimeError where it has ended."""
        if not self.pipe.poll(WAIT_SECONDS):
            raise TimedOut(f"the holder waited for the writer's word of {what}")
        try:
            return self.pipe.recv()
        except EOFError:
            self.process.join(WAIT_SECONDS)
            raise RuntimeError(
                f"the writer ended with status {self.process.exitcode}; the holder waited for {what}"
            ) from None

    def fill(self, seed: int) -> None:
        self.pipe.send(("fill", seed))
        self.answer("its filled pool")

    def scattered(self, count: int, seed: int) -> list[int]:
        """Pages in runs of eight, in random order: a pool that has been in use."""
        runs = np.random.default_rng(seed).permutation(self.pages // 8)
        return [int(run) * 8 + place for run in runs for place in range(8)][:count]

    def plain_copy(self, local: list[int], remote: list[int]) -> float:
        """Seconds."""
        self.pipe.send(("copy", self.side.region, local, remote))
        until = clock() + WAIT_SECONDS
        while not self.pipe.poll(0.0005) and clock() < until:
            self.side.plain.get_new_notifs()
        began, ended = self.answer("a plain copy")
        self.side.plain.get_new_notifs()
        return float(ended - began)

    def grant(self, remote: list[int], digests: bool = True) -> Lease:
        self.leases += 1
        endpoint = self.side.handoffs[digests].endpoint
        to = self.endpoints[digests]
        lease = Lease(self.leases, endpoint.epoch, remote, 0, 60.0, to.agent, to.epoch)
        self.side.handoffs[digests].command(Grant(lease, to, 0))
        return lease

    def handoff(
        self, local: list[int], remote: list[int], digests: bool = True, kept: bool = True, **how: Any
    ) -> tuple[float, Any]:
        """When the handoff had settled, and the writer's side of it."""
        lease = self.grant(remote, digests)
        self.pipe.send(Job(digests, kept, self.side.handoffs[digests].endpoint, lease, local, **how))
        settled, _ = self.side.wait(receiver.Settled)
        return settled, self.answer("a handoff")

    def release_round_trip(self) -> float:
        """Seconds from an abort to the writer's word that it stopped: a notification and its answer."""
        lease = self.grant([0])
        self.pipe.send(("open", self.side.handoffs[True].endpoint, lease))
        time.sleep(0.02)
        began = clock()
        self.side.handoffs[True].command(Revoke(lease.id))
        self.side.wait(receiver.Fenced)
        return self.side.wait(receiver.Reclaimed)[0] - began

    def kill(self) -> float:
        """Seconds from kill -9 of a writer that holds a lease to the holder's pages being back. Starts another."""
        lease = self.grant([0])
        self.pipe.send(("open", self.side.handoffs[True].endpoint, lease))
        time.sleep(0.3)
        assert self.process.pid is not None
        began = clock()
        os.kill(self.process.pid, signal.SIGKILL)
        when, event = self.side.wait(receiver.Reclaimed)
        assert event.proof == "writer_died", event
        self._join()
        self.start()
        return when - began

    def close(self) -> None:
        self.pipe.send(None)
        self._join()
        self.side.close()

    def _join(self) -> None:
        self.process.join(WAIT_SECONDS)
        if self.process.exitcode is None:
            raise TimedOut("the holder waited for the end of the writer's process")


@dataclass(frozen=True)
class Row:
    """A prompt length. Times in seconds, rates in bytes a second, shares as fractions."""

    tokens: int
    bytes: int
    writes: int
    descriptors: int
    plain_rate: float
    handoff_rate: float
    share: float
    chunkwise_share: float
    digest_cost: float
    chunkwise_digest_cost: float
    read_share: float
    read_digest_cost: float
    bare_share: float
    bare_chunkwise_share: float
    paced_rate: float
    compute: float
    exposed_layerwise: float
    exposed_chunkwise: float
    exposed_share: float
    paced_digest_cost: float


def measure(bench: Bench, tokens: int, rounds: int, pace: float) -> Row:
    """All of one prompt length. The paced link carries `pace` of the plain copy's rate."""
    count = tokens // PAGE_TOKENS
    local, remote = bench.scattered(count, 1), bench.scattered(count, 2)
    times: dict[str, list[float]] = {}
    note: Callable[[str, float], None] = lambda name, value: times.setdefault(name, []).append(value)  # noqa: E731
    for round_ in range(rounds + 1):
        plain = bench.plain_copy(local, remote)
        results = {}
        for name, digests, kept, layerwise in VARIANTS:
            bench.side.pool[remote[0]] = 0
            settled, written = bench.handoff(local, remote, digests, kept, layerwise=layerwise)
            results[name] = settled - written.began
            if name == "with":
                shape = written
        if round_:  # the first warms up
            note("plain", plain)
            note("with", results["with"])
            note("share", plain / results["with"])
            note("chunks", plain / results["chunks"])
            note("digests", results["with"] / results["without"] - 1)
            note("chunk digests", results["chunks"] / results["chunks without"] - 1)
            note("share read", plain / results["read"])
            note("digests read", results["read"] / results["without"] - 1)
            note("share without", plain / results["without"])
            note("chunks without", plain / results["chunks without"])
    size = count * PAGE_BYTES
    rate = size / statistics.median(times["plain"]) * pace
    compute = size / rate
    for _ in range(rounds):
        paced = {}
        for name, digests, layerwise in [("layers", True, True), ("none", False, True), ("chunk", True, False)]:
            settled, written = bench.handoff(
                local, remote, digests, layerwise=layerwise, compute=compute, rate=rate
            )
            paced[name] = settled - written.began
            note(f"exposed {name}", settled - written.computed)
        note("paced digests", paced["layers"] / paced["none"] - 1)
    middle = {name: statistics.median(values) for name, values in times.items()}
    return Row(
        tokens,
        size,
        shape.writes,
        shape.pieces,
        size / middle["plain"],
        size / middle["with"],
        middle["share"],
        middle["chunks"],
        middle["digests"],
        middle["chunk digests"],
        middle["share read"],
        middle["digests read"],
        middle["share without"],
        middle["chunks without"],
        rate,
        compute,
        middle["exposed layers"],
        middle["exposed chunk"],
        middle["exposed layers"] / middle["exposed chunk"],
        middle["paced digests"],
    )


def show(rows: list[Row], ends: dict[str, float], console: Console) -> None:
    """The tables."""
    table = Table(title="TransferThread of Llama-3.1-8B-shaped KV, as fast as it goes")
    for head in ["tokens", "MiB", "writes", "pieces", "plain GB/s", "handoff GB/s", "share", "by chunk"]:
        table.add_column(head, justify="right")
    for row in rows:
        table.add_row(
            f"{row.tokens}",
            f"{row.bytes >> 20}",
            f"{row.writes}",
            f"{row.descriptors}",
            f"{row.plain_rate / 1e9:.2f}",
            f"{row.handoff_rate / 1e9:.2f}",
            f"{row.share:.0%}",
            f"{row.chunkwise_share:.0%}",
        )
    console.print(table)
    table = Table(title="What digests cost of that")
    for head in [
        "tokens",
        "share",
        "by chunk",
        "without",
        "by chunk",
        "cost",
        "by chunk",
        "read at P: share",
        "cost",
    ]:
        table.add_column(head, justify="right")
    for row in rows:
        shares = row.share, row.chunkwise_share, row.bare_share, row.bare_chunkwise_share
        costs = row.digest_cost, row.chunkwise_digest_cost
        cells = [f"{share:.0%}" for share in shares] + [f"{cost:+.1%}" for cost in costs]
        table.add_row(f"{row.tokens}", *cells, f"{row.read_share:.0%}", f"{row.read_digest_cost:+.1%}")
    console.print(table)
    console.print("P's digests are made when KV is stored. That costs the compute (bench.digests has more):")
    without, with_ = stores(LLAMA_SHAPE, CHUNK, 45)
    console.print(
        f"storing a chunk of {CHUNK} tokens, all layers: {without * 1e3:.2f} ms without, {with_ * 1e3:.2f} ms with"
    )
    table = Table(title="At the compute's pace")
    for head in ["tokens", "GB/s", "compute ms", "exposed by layer ms", "by chunk ms", "ratio", "digests"]:
        table.add_column(head, justify="right")
    for row in rows:
        table.add_row(
            f"{row.tokens}",
            f"{row.paced_rate / 1e9:.2f}",
            f"{row.compute * 1e3:.1f}",
            f"{row.exposed_layerwise * 1e3:.2f}",
            f"{row.exposed_chunkwise * 1e3:.2f}",
            f"{row.exposed_share:.2f}",
            f"{row.paced_digest_cost:+.1%}",
        )
    console.print(table)
    console.print(f"abort, and the writer's answer: {ends['release_seconds'] * 1e3:.2f} ms")
    console.print(f"kill -9 of the writer to its pages back: {ends['kill_seconds'] * 1e3:.1f} ms")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--pace", type=float, default=0.2, help="the held-back link's share of the plain rate")
    parser.add_argument("--fabric", choices=["auto", "shm", "tcp"], default="auto")
    parser.add_argument("--small-pages", action="store_true", help="both pools in pages of 4 KiB")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    choose_fabric(options.fabric, cuda=False)
    if options.small_pages:
        os.environ[SMALL_PAGES] = "1"  # the other process inherits it
    os.environ.setdefault("NIXL_LOG_LEVEL", "FATAL")  # a killed peer is an error to NIXL, and what is measured here
    logging.disable(logging.INFO)
    pages = max(options.tokens) // PAGE_TOKENS
    bench = Bench(pages)
    bench.fill(7)
    rows = [measure(bench, tokens, options.rounds, options.pace) for tokens in options.tokens]
    release = [bench.release_round_trip() for _ in range(20)]
    bench.close()
    small = Bench(8)
    kills = [small.kill() for _ in range(5)]
    small.close()
    ends = {"release_seconds": statistics.median(release), "kill_seconds": statistics.median(kills)}
    if options.json:
        machine = {"cores": os.cpu_count(), "machine": platform.machine(), "fabric": options.fabric}
        print(json.dumps({"machine": machine, "rows": [asdict(row) for row in rows], **ends}, indent=1))
    else:
        show(rows, ends, Console(width=110))
    return 0


if __name__ == "__main__":
    sys.exit(main())

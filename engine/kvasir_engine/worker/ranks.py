"""Rank 0's side of a worker's other ranks: their processes, their steps, and what they report.

The ranks live and die together. A rank that ends takes the worker with it, as the sums that all of them compute
have lost a part; its pod starts it again. Ranks notice the end of rank 0 by their standard input.
"""

import itertools
import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn
from weakref import WeakValueDictionary

import torch

from kvasir_engine import faults
from kvasir_engine.attention.choose import BackendName
from kvasir_engine.model.batch import ForwardBatch
from kvasir_engine.model.parallel import Ranks
from kvasir_engine.model.runner import ModelRunner
from kvasir_engine.model.step import LaunchedStep
from kvasir_engine.protocol import Address
from kvasir_engine.sampling.sampler import SampleRequest
from kvasir_engine.transfer import writer
from kvasir_engine.transfer.commands import AnyCommand, Grant, Read
from kvasir_engine.transfer.group import LayerPush
from kvasir_engine.transfer.parts import Event
from kvasir_engine.transfer.stats import HandoffStats
from kvasir_engine.transfer.writer import Key, Push
from kvasir_engine.worker import frames
from kvasir_engine.worker.frames import Copied, Copies, Failed, Loaded, PushFrame, Ready, Report, Serve, Setup, Step

log = logging.getLogger("ranks")

LOAD_GRACE = 1.0
"""Seconds in which rank 0 may say itself why a model cannot be loaded, before another rank's reason is given."""
STOP_SECONDS = 10.0


class _Rank:
    """One process, and the thread that reads its reports."""

    def __init__(self, rank: int, ended: Callable[[int, str], None], report: Callable[[int, Report], None]) -> None:
        self.rank = rank
        self.loaded, self.ready, self.copied = threading.Event(), threading.Event(), threading.Event()
        self.pages = 0
        self.address: Address
        self._ended = ended
        self._report = report
        self._lock = threading.Lock()
        (steps, their_steps), (self._reports, their_reports) = (_pair() for _ in range(2))
        self._steps = steps
        environment = dict(os.environ)
        environment[faults.VARIABLE] = faults.for_rank(environment.pop(faults.VARIABLE, ""), rank)
        with their_steps, their_reports:
            descriptors = their_steps.fileno(), their_reports.fileno()
            self.process = subprocess.Popen(
                [sys.executable, "-m", "kvasir_engine.worker.rank", str(rank), *map(str, descriptors)],
                stdin=subprocess.PIPE,  # never written to: its end is the end of this process
                pass_fds=descriptors,
                env={name: value for name, value in environment.items() if name != faults.VARIABLE or value},
            )
        threading.Thread(target=self._read, name=f"kvasir-rank-{rank}", daemon=True).start()

    def send(self, frame: frames.ToMain) -> None:
        """To the main thread, in order."""
        self._send(self._steps, frames.encode(frame))

    def command(self, data: bytes) -> None:
        """To the transfer thread, in order."""
        self._send(self._reports, data)

    def _send(self, connection: Connection, data: bytes) -> None:
        try:
            with self._lock:
                connection.send_bytes(data)
        except OSError:
            time.sleep(LOAD_GRACE)  # the reading thread knows why, and ends the worker
            self._ended(self.rank, "does not listen any more")

    def _read(self) -> None:
        reason = ""
        try:
            while True:
                match frames.decode_from_rank(self._reports.recv_bytes()):
                    case Loaded(pages):
                        self.pages = pages
                        self.loaded.set()
                    case Ready(address):
                        self.address = address
                        self.ready.set()
                    case Copied():
                        self.copied.set()
                    case Failed(reason):
                        pass
                    case Report() as report:
                        self._report(self.rank, report)
        except (EOFError, OSError):
            self._ended(self.rank, reason or _fate(self.process.wait()))


class RankProcesses:
    """Ranks 1 to `size` - 1, each loading its part of the model in `folder` from the beginning on.

    `report` hears the events of their transfer threads. A rank that ends ends this process, with one line that says
    why: exit status 2 while models are loaded (what the user can mend), 1 later.
    """

    def __init__(
        self,
        size: int,
        folder: Path,
        dtype: str,
        device: str,
        page_size: int,
        kv_memory: int,
        deterministic: bool,
        attention: BackendName,
        report: Callable[[int, Event], None],
    ) -> None:
        self.size = size
        self._report_event = report
        self._meeting = Path(tempfile.mkdtemp(prefix="kvasir-ranks-"))
        self._serving = self._stopping = False
        self._ending = threading.Lock()
        self._copies: list[tuple[int, int]] = []
        self._layers: list[PushFrame] = []
        self._numbers = itertools.count(1)
        self._pushes: WeakValueDictionary[int, Push] = WeakValueDictionary()
        self._stats: dict[int, HandoffStats] = {}
        address = f"file://{self._meeting}/address"
        self._ranks = [_Rank(rank, self._ended, self._report) for rank in range(1, size)]
        for each in self._ranks:
            setup = Setup(
                each.rank,
                size,
                address,
                str(folder),
                dtype,
                device,
                page_size,
                kv_memory,
                deterministic,
                attention,
            )
            each.send(setup)
        self._address = address

    def meet(self, device: torch.device) -> Ranks:
        """Rank 0's place in the group. Waits for the others."""
        return Ranks(0, self.size, self._address, device)

    def start(self, serve: Serve | None) -> None:
        """Wait until every rank has loaded; with `serve`, until its transfer thread runs."""
        for each in self._ranks:
            each.loaded.wait()
        shutil.rmtree(self._meeting, ignore_errors=True)
        self._serving = True
        if serve is not None:
            for each in self._ranks:
                each.send(serve)
            for each in self._ranks:
                each.ready.wait()

    def close(self) -> None:
        """End the processes."""
        self._stopping = True
        for each in self._ranks:
            each.send(frames.Stop())
        for each in self._ranks:
            try:
                each.process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                each.process.kill()
                each.process.wait()

    # -- steps

    def copy_page(self, source: int, target: int) -> None:
        """Copy a page on every rank, before the next step computes."""
        self._copies.append((source, target))

    def step(self, batch: ForwardBatch) -> None:
        """Let every rank compute `batch`; rank 0 must, too."""
        copies, self._copies = self._copies, []
        pushes, self._layers = self._layers, []
        self._send(Step.of(batch, copies, pushes))

    def _send(self, frame: frames.ToMain) -> None:
        for each in self._ranks:
            each.send(frame)

    def fail(self, error: Exception) -> NoReturn:
        """Rank 0's part of a step failed, with what the others are doing now unknown."""
        log.error("a step failed on rank 0", exc_info=error)
        time.sleep(LOAD_GRACE)  # another rank's end may be the reason, and is the better one
        self._end(f"a step failed on rank 0 of {self.size}: {error}")

    # -- what the group of handoffs asks for

    @property
    def addresses(self) -> tuple[Address, ...]:
        """See Others."""
        return tuple(each.address for each in self._ranks)

    @property
    def stats(self) -> HandoffStats:
        """See Others."""
        return sum(list(self._stats.values()), HandoffStats())

    def command(self, command: AnyCommand) -> None:
        """See Others."""
        if isinstance(command, Grant | Read) and self._copies:
            # A page that was copied from may be leased now, or read into, before a rank has come to copying it.
            self._finish_copies()
        data = frames.encode(command)
        for each in self._ranks:
            each.command(data)

    def push(self, key: Key, push: Push) -> None:
        """See Others."""
        self._send(self._numbered(key, push))

    def push_layers(self, pushes: list[LayerPush]) -> None:
        """See Others."""
        self._layers = [self._numbered(key, push) for key, push in pushes]

    def _numbered(self, key: Key, push: Push) -> PushFrame:
        number = next(self._numbers)
        self._pushes[number] = push
        return PushFrame.of(key, number, push)

    def _finish_copies(self) -> None:
        copies, self._copies = self._copies, []
        for each in self._ranks:
            each.copied.clear()
        self._send(Copies(copies))
        for each in self._ranks:
            each.copied.wait()

    # -- what the ranks report, on their threads

    def _report(self, rank: int, report: Report) -> None:
        self._stats[rank] = HandoffStats(**report.stats)  # type: ignore[arg-type]
        event = report.event
        if isinstance(event, frames.Pushed):
            self._report_event(rank, writer.Done(event.key, self._pushes[event.number]))
        else:
            self._report_event(rank, event)

    def _ended(self, rank: int, reason: str) -> None:
        if self._stopping:
            return
        if not self._serving:
            time.sleep(LOAD_GRACE)
        self._end(f"rank {rank} of {self.size} {reason}; the worker ends with it")

    def _end(self, reason: str) -> NoReturn:
        self._ending.acquire()  # for ever: one reason is enough
        shutil.rmtree(self._meeting, ignore_errors=True)
        sys.stderr.write(f"kvasir: error: {reason}\n")
        sys.stderr.flush()
        os._exit(1 if self._serving else 2)


class RankedRunner(ModelRunner):
    """Rank 0's part of a model. What it does, the other ranks do."""

    def __init__(self, ranks: RankProcesses, folder: Path, **options: Any) -> None:
        super().__init__(folder, **options)
        self._ranks = ranks

    def copy_page(self, source: int, target: int) -> None:
        """Make page `target` hold what page `source` holds, on every rank."""
        self._ranks.copy_page(source, target)
        super().copy_page(source, target)

    def close(self) -> None:
        """End the other ranks' processes."""
        self._ranks.close()

    def launch(
        self,
        batch: ForwardBatch,
        places: Sequence[int],
        requests: Sequence[SampleRequest],
        on_layer: Callable[[int], None] | None = None,
    ) -> LaunchedStep:
        """See ModelRunner. Ends the process when the ranks are no longer in step."""
        if self.device.type == "cpu":
            return super().launch(batch, places, requests, on_layer)  # which calls `forward`
        self._ranks.step(batch)
        try:
            return super().launch(batch, places, requests, on_layer)
        except Exception as error:
            self._ranks.fail(error)

    def forward(self, batch: ForwardBatch, on_layer: Callable[[int], None] | None = None) -> torch.Tensor:
        """See ModelRunner. Ends the process when the ranks are no longer in step."""
        self._ranks.step(batch)
        try:
            return super().forward(batch, on_layer)
        except Exception as error:
            self._ranks.fail(error)


def _pair() -> tuple[Connection, Connection]:
    ours, theirs = socket.socketpair()
    return Connection(ours.detach()), Connection(theirs.detach())


def _fate(status: int) -> str:
    return f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"

"""Rank 0's connections to another rank, and the thread that reads its reports."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Protocol

from kvasir_engine import faults
from kvasir_engine.executor import rank_protocol
from kvasir_engine.executor.rank_protocol import Copied, RankFailed, RankLoaded, RankReady, Report
from kvasir_engine.protocol import Address, BadFrame
from kvasir_engine.supervisor import ExpectedEnd, start_thread

LOAD_GRACE = 1.0
"""Seconds in which rank 0 may say itself why a model cannot be loaded, before another rank's reason is given."""


def spawn(rank: int, folder: Path, steps: int, reports: int) -> "subprocess.Popen[bytes]":
    """Start the process of a rank other than 0, with the model in `folder` and the descriptors of its sockets.

    It ends with this process.
    """
    environment = dict(os.environ)
    environment[faults.VARIABLE] = faults.for_rank(environment.pop(faults.VARIABLE, ""), rank)
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "kvasir_engine.executor.rank_process",
            str(rank),
            str(folder),
            str(steps),
            str(reports),
        ],
        stdin=subprocess.PIPE,  # never written to: its end is the end of this process
        pass_fds=(steps, reports),
        env={name: value for name, value in environment.items() if name != faults.VARIABLE or value},
    )


def exit_reason_of(status: int) -> str:
    """Describe how a process with this exit status ended."""
    return f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"


class Channel(Protocol):
    """A channel for messages in order: a socket, or TLS to another node."""

    def send_bytes(self, buf: bytes, /) -> None: ...
    def recv_bytes(self) -> bytes: ...


class RankLink:
    """The connections to one rank. `exit_reason` says how the rank ended when they have closed; `None` if its node
    reports that.

    `ended` gets the reason, `report` the events of the rank's transfer thread.
    """

    def __init__(
        self,
        rank: int,
        steps: Channel,
        reports: Channel,
        exit_reason: Callable[[], str | None],
        ended: Callable[[int, str], None],
        report: Callable[[int, Report], None],
    ) -> None:
        self.rank = rank
        self.loaded, self.ready, self.copied = threading.Event(), threading.Event(), threading.Event()
        self.pages = 0
        self.address: Address
        self._exit_reason = exit_reason
        self._ended = ended
        self._report = report
        self._lock = threading.Lock()
        self._steps, self._reports = steps, reports
        start_thread(self._read, f"kvasir-rank-{rank}", partial(ended, rank))

    def send(self, frame: rank_protocol.ToMain) -> None:
        """Send a frame to the rank's main thread, in order."""
        self._send(self._steps, rank_protocol.encode(frame))

    def command(self, data: bytes) -> None:
        """Send a frame to the rank's transfer thread, in order."""
        self._send(self._reports, data)

    def _send(self, connection: Channel, data: bytes) -> None:
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
                match rank_protocol.decode_from_rank(self._reports.recv_bytes()):
                    case RankLoaded(pages):
                        self.pages = pages
                        self.loaded.set()
                    case RankReady(address):
                        self.address = address
                        self.ready.set()
                    case Copied():
                        self.copied.set()
                    case RankFailed(reason):
                        pass
                    case Report() as report:
                        self._report(self.rank, report)
        except BadFrame as error:
            self._ended(self.rank, f"says what cannot be read: {error}")
            raise ExpectedEnd from None
        except (EOFError, OSError):
            exit_reason = reason or self._exit_reason()
            if exit_reason is not None:
                self._ended(self.rank, exit_reason)
            raise ExpectedEnd from None


class LocalRank(RankLink):
    """A rank that this process started on this machine."""

    def __init__(
        self, rank: int, folder: Path, ended: Callable[[int, str], None], report: Callable[[int, Report], None]
    ) -> None:
        (steps, their_steps), (reports, their_reports) = (_pair() for _ in range(2))
        with their_steps, their_reports:
            self.process = spawn(rank, folder, their_steps.fileno(), their_reports.fileno())
        super().__init__(rank, steps, reports, lambda: exit_reason_of(self.process.wait()), ended, report)

    def end(self, seconds: float) -> None:
        """Wait for the rank's end, which it was asked for; kill it after `seconds`."""
        end(self.process, seconds)


def end(process: "subprocess.Popen[bytes]", seconds: float) -> None:
    """Wait for a process to end; kill it after `seconds`."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _pair() -> tuple[Connection, Connection]:
    ours, theirs = socket.socketpair()
    return Connection(ours.detach()), Connection(theirs.detach())

"""The process of a worker's rank other than 0.

Started as `python -m kvasir_engine.executor.rank_process RANK FOLDER STEPS REPORTS`.

FOLDER is the model's folder on this machine, STEPS and REPORTS are descriptors of the sockets to rank 0
(`rank_protocol.py`), which may be on another machine. The main thread computes the steps, the transfer thread moves
this rank's part of the KV; rank 0 makes all decisions. The process ends with rank 0, and with the process that
started it.
"""

import contextlib
import dataclasses
import logging
import os
import select
import signal
import sys
import threading
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from kvasir_engine.connector import sender
from kvasir_engine.connector.commands import AnyCommand
from kvasir_engine.connector.digester import Digester
from kvasir_engine.connector.fabric_rate import fabric_rate, nic_rate
from kvasir_engine.connector.layout import spec_of
from kvasir_engine.connector.nixl_agent import NixlAgent, choose_fabric
from kvasir_engine.connector.rank_parts import Event
from kvasir_engine.connector.transfer_thread import TransferThread
from kvasir_engine.errors import UserError
from kvasir_engine.executor import rank_protocol
from kvasir_engine.executor.model_runner import ModelRunner, runner_options
from kvasir_engine.executor.rank_protocol import (
    Copied,
    Copies,
    Pushed,
    PushFrame,
    RankFailed,
    RankLoaded,
    RankReady,
    Report,
    Serve,
    StepFrame,
)
from kvasir_engine.executor.threads import use_own_cores
from kvasir_engine.logs import log_to_stderr
from kvasir_engine.model.loading.weight_loader import choose_device
from kvasir_engine.model.tensor_parallel import Ranks
from kvasir_engine.protocol import Address, Fingerprint, Region
from kvasir_engine.status_reports import LinkReport
from kvasir_engine.supervisor import end_process, start_thread

log = logging.getLogger("rank")


class Reports:
    """The socket to rank 0 to which both threads write, and which the transfer thread reads."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()
        self._poll = select.poll()
        self._poll.register(connection.fileno(), select.POLLIN)

    def send(self, frame: rank_protocol.FromRank) -> None:
        """Send a frame, from any thread. Ends the process if rank 0 is gone."""
        try:
            with self._lock:
                self._connection.send_bytes(rank_protocol.encode(frame))
        except OSError:
            os._exit(0)

    def commands(self) -> list[AnyCommand]:
        """The commands that have arrived. Ends the process if rank 0 is gone."""
        arrived = []
        try:
            while self._poll.poll(0):
                arrived.append(rank_protocol.decode_command(self._connection.recv_bytes()))
        except (EOFError, OSError):
            os._exit(0)
        return arrived


class Rank:
    """The rank's model, and its transfer thread if KV moves."""

    def __init__(self, setup: rank_protocol.Setup, folder: Path, reports: Reports) -> None:
        self._rank = setup.rank
        self._reports = reports
        self._config = config = setup.config
        size, nodes = config.tensor_parallel, config.nnodes
        device = choose_device(config.device, setup.rank, size, nodes)
        use_own_cores(size // nodes, device.type)
        group = Ranks(setup.rank, size, setup.address, device, nodes)
        self._runner = ModelRunner(folder, group=group, **runner_options(config))
        self._transfers: TransferThread | None = None
        self._reported_links: Mapping[str, LinkReport] = {}
        reports.send(RankLoaded(self._runner.pool.pages))

    def serve(self, serve: Serve) -> None:
        """Start the transfer thread."""
        runner = self._runner
        choose_fabric(self._config.fabric, runner.device.type == "cuda", self._config.encryption)
        region = region_of(runner)
        digest = digester_of(runner, serve.fingerprint) if self._config.kv_digests else None
        self._transfers = TransferThread(
            lambda: NixlAgent(serve.epoch, region, serve.fingerprint, self._rank),
            self._report,
            digest,
            self._rank,
            self._reports.commands,
            self._lost_handoff,
            fabric_rate(self._config.fabric, runner.device.type == "cuda", os.environ, nic_rate()),
        )
        self._transfers.start()
        endpoint = self._transfers.endpoint
        self._reports.send(RankReady(Address(endpoint.agent, endpoint.metadata, endpoint.region)))

    def step(self, step: StepFrame) -> None:
        """Compute."""
        self.copy(step.copies)
        on_layer = None
        if step.pushes and self._transfers is not None:
            self._transfers.hold_until(step.pushes[-1].after)
            on_layer = self._transfers.push_layers([(frame.key, frame.push) for frame in step.pushes])
        self._runner.follow(step.batch(), step.sampled, on_layer)

    def copy(self, pages: list[tuple[int, int]]) -> None:
        """Copy pages, (source, target), in order."""
        for source, target in pages:
            self._runner.copy_page(source, target)

    def wait(self) -> None:
        """Until the device has done what it was given: what follows reads or writes its memory from elsewhere."""
        if self._runner.device.type == "cuda":
            torch.cuda.synchronize(self._runner.device)

    def push(self, frame: PushFrame) -> None:
        """Push pages whose KV is computed."""
        assert self._transfers is not None
        self._transfers.hold_until(frame.after)
        self._transfers.push(frame.key, frame.push)

    def _lost_handoff(self, reason: str) -> None:
        self._reports.send(RankFailed(f"has lost its transfer thread: {reason}"))
        os._exit(1)

    def _report(self, event: Event) -> None:
        assert self._transfers is not None
        reported = Pushed(event.key, event.push.number) if isinstance(event, sender.Done) else event
        links = self._transfers.links
        changed = None if links is self._reported_links else list(links.values())
        self._reported_links = links
        self._reports.send(Report(reported, dataclasses.asdict(self._transfers.stats), changed))


def region_of(runner: ModelRunner) -> Region:
    """The memory of a rank's pool as peers address it."""
    pool, device = runner.pool, runner.device
    return Region(
        pool.address, pool.pages, pool.page_bytes, "VRAM" if device.type == "cuda" else "DRAM", device.index or 0
    )


def digester_of(runner: ModelRunner, fingerprint: Fingerprint) -> Digester:
    """The digester of a rank's pages. On a GPU it computes digests there, in a stream beside the steps."""
    pool = runner.pool
    spec = spec_of(fingerprint, pool.page_bytes)
    if runner.device.type == "cpu":
        runner.keep_digests()
        return Digester(pool.address, pool.pages, spec, pool.digests)
    from kvasir_engine.connector.triton_digests import PoolDigests

    digester = Digester(0, pool.pages, spec, measure=PoolDigests(pool.memory))
    digester.measured([0], range(1))  # a transfer thread that compiles its kernel first is taken for dead
    return digester


def serve_rank(steps: Connection, reports: Reports, folder: Path) -> None:
    """Execute rank 0's frames until `Stop`. Raises the error of a failed step."""
    setup = _next(steps)
    assert isinstance(setup, rank_protocol.Setup)
    rank = Rank(setup, folder, reports)
    while True:
        match _next(steps):
            case StepFrame() as step:
                rank.step(step)
            case PushFrame() as push:
                rank.push(push)
            case Copies(pages, answer):
                rank.copy(pages)
                rank.wait()
                if answer:
                    reports.send(Copied())
            case Serve() as serve:
                rank.serve(serve)
            case rank_protocol.Stop():
                return


def _next(steps: Connection) -> rank_protocol.ToMain:
    """Wait for rank 0's next frame. Raises EOFError when rank 0 is gone."""
    try:
        return rank_protocol.decode_to_main(steps.recv_bytes())
    except OSError:
        raise EOFError from None


def _end_with_parent() -> None:
    with contextlib.suppress(OSError):
        while os.read(sys.stdin.fileno(), 1):
            pass
    os._exit(0)


def main() -> None:
    """Entry point. Ends without cleanup: a rank in an exchange with others would wait for ever."""
    number, folder, *descriptors = sys.argv[1:]
    log_to_stderr(prefix=f"rank{number}.")
    for each in (signal.SIGINT, signal.SIGTERM):  # a signal to the worker is not for its ranks to obey
        signal.signal(each, signal.SIG_IGN)
    start_thread(_end_with_parent, "kvasir-parent", end_process)
    steps, reports = (Connection(int(descriptor)) for descriptor in descriptors)
    channel = Reports(reports)
    status = 1
    try:
        serve_rank(steps, channel, Path(folder))
        status = 0
    except EOFError:
        status = 0
    except UserError as error:
        channel.send(RankFailed(f"cannot start: {error}"))
    except Exception as error:
        log.exception("the rank fails")
        channel.send(RankFailed(f"failed: {error}"))
    finally:
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    main()

"""Rank 0's side of a worker's other ranks: starts them, sends them steps, and takes their reports.

When one rank ends, the whole worker ends, since the sums over all ranks would lack a part; its pod restarts it.
Ranks on this machine notice the end of rank 0 by their standard input, those of other nodes by their connections.
"""

import itertools
import logging
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NoReturn
from weakref import WeakValueDictionary

import msgspec
import torch

from kvasir_engine.config import EngineConfig
from kvasir_engine.connector import sender
from kvasir_engine.connector.commands import AnyCommand, Grant, Read
from kvasir_engine.connector.rank_parts import Event
from kvasir_engine.connector.sender import Key, LayerPush, Push
from kvasir_engine.connector.stats import TransferStats
from kvasir_engine.executor import node_protocol, rank_protocol
from kvasir_engine.executor.model_runner import ModelRunner
from kvasir_engine.executor.node_listener import NodeListener
from kvasir_engine.executor.rank_link import LOAD_GRACE, LocalRank, RankLink
from kvasir_engine.executor.rank_protocol import Copies, PushFrame, Report, Serve, Setup, StepFrame
from kvasir_engine.executor.step import LaunchedStep
from kvasir_engine.forward_batch import ForwardBatch
from kvasir_engine.model import tensor_parallel
from kvasir_engine.model.rendezvous import open_store
from kvasir_engine.model.tensor_parallel import Ranks
from kvasir_engine.protocol import Address
from kvasir_engine.sampling.prompt_scores import PromptScores
from kvasir_engine.sampling.sampler import SampleRequest
from kvasir_engine.status_reports import LinkReport

log = logging.getLogger("ranks")

STOP_SECONDS = 10.0
MOST_OF_REASON = 8192
"""Characters of the reason that other nodes are told: a frame between nodes has a bound."""


class RankProcesses:
    """A worker's ranks from 1 on. Each loads its part of the model (here from `folder`) as soon as all have joined.

    With a `listener` this waits for the ranks of other nodes, which connect to it. `report` gets the events of the
    ranks' transfer threads. The end of a rank or a node ends this process, with one line that says why: exit status
    2 while models are loaded (an error that the user can correct), 1 later.
    """

    def __init__(
        self,
        config: EngineConfig,
        folder: Path,
        report: Callable[[int, Event], None],
        listener: NodeListener | None = None,
    ) -> None:
        self.size = size = config.tensor_parallel
        self._listener = listener
        self._nodes = config.nnodes
        self._report_event = report
        self._meeting = Path(tempfile.mkdtemp(prefix="kvasir-ranks-"))
        self._serving = self._stopping = False
        self._ending = threading.Lock()
        self._copies: list[tuple[int, int]] = []
        self._layers: list[PushFrame] = []
        self._numbers = itertools.count(1)
        self._commands = 0
        self._pushes: WeakValueDictionary[int, Push] = WeakValueDictionary()
        self._stats: dict[int, TransferStats] = {}
        self._links: dict[int, list[LinkReport]] = {}
        here = range(1, size // self._nodes)
        self._local = [LocalRank(rank, folder, self._ended, self._report) for rank in here]
        self._ranks: list[RankLink] = [*self._local]
        self._store = None
        self._address = f"file://{self._meeting}/address"
        leader = {}
        if listener is not None:
            self._store, port = open_store(size, timedelta(seconds=tensor_parallel.CONNECT_SECONDS))
            listener.open(self._node_ended)
            for each in listener.wait():
                node, rank = each.node, each.rank
                exit_reason = partial(node.exit_reason, rank)
                self._ranks.append(RankLink(rank, each.steps, each.reports, exit_reason, self._ended, self._report))
                host = f"[{each.leader}]" if ":" in each.leader else each.leader
                leader[rank] = self._address = f"tcp://{host}:{port}"
        for link in self._ranks:
            link.send(Setup(link.rank, leader.get(link.rank, self._address), config))

    def meet(self, device: torch.device) -> Ranks:
        """Join the process group as rank 0, and wait for the other ranks."""
        return Ranks(0, self.size, self._address, device, self._nodes, self._store)

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
        self._tell(node_protocol.WorkerLoaded())

    def close(self) -> None:
        """End the processes of this machine, and tell the other nodes to close."""
        self._stopping = True
        self._tell(node_protocol.Closed())
        for each in self._ranks:
            each.send(rank_protocol.Stop())
        for local in self._local:
            local.end(STOP_SECONDS)
        if self._listener is not None:
            self._listener.wait_closed(STOP_SECONDS)

    def _tell(self, frame: node_protocol.AnyFrame) -> None:
        if self._listener is not None:
            self._listener.broadcast(frame)

    # -- steps

    def copy_page(self, source: int, target: int) -> None:
        """Copy a page on every rank, before anything else reads or writes one of the two there.

        The copy is sent before the next frame that may use the pages. That is a step, or a push outside of a step;
        or a grant or a read, which go to another thread, and so wait until all ranks have copied. Nothing else uses
        the pages: aborts and releases only change owners, and the next owner writes them by one of these frames.
        Only whole pages of the tree are lent, and the target of a copy gets there after a step has computed the
        rest.
        """
        self._copies.append((source, target))

    def step(self, batch: ForwardBatch, notifies: bool, sampled: int = 0) -> None:
        """Let the other ranks compute `batch`, as rank 0 has to do too. On a GPU it broadcasts the `sampled`
        tokens.

        `notifies`: the step reports each layer, which pushes need.
        """
        copies, self._copies = self._copies, []
        pushes, self._layers = self._layers, []
        # By this each rank decides whether it replays a CUDA graph, and in a graph the ranks' exchanges are others.
        assert notifies == bool(pushes), "rank 0 pushes in another step than the others"
        self._send(StepFrame.of(batch, copies, pushes, sampled))

    def _send(self, frame: rank_protocol.ToMain) -> None:
        for each in self._ranks:
            each.send(frame)

    def fail(self, error: Exception) -> NoReturn:
        """End the process, as rank 0's part of a step failed and the state of the other ranks is unknown."""
        log.error("a step failed on rank 0", exc_info=error)
        time.sleep(LOAD_GRACE)  # another rank's end may be the reason, and is the better one
        self._end(f"a step failed on rank 0 of {self.size}: {error}")

    # -- what the group of handoffs asks for

    @property
    def addresses(self) -> tuple[Address, ...]:
        """See OtherRanks."""
        return tuple(each.address for each in self._ranks)

    @property
    def stats(self) -> TransferStats:
        """See OtherRanks."""
        return sum(list(self._stats.values()), TransferStats())

    @property
    def links(self) -> list[LinkReport]:
        """See OtherRanks."""
        return [link for links in list(self._links.values()) for link in links]

    def command(self, command: AnyCommand) -> None:
        """See OtherRanks."""
        if isinstance(command, Grant | Read) and self._copies:
            # A page that was copied from may be leased now, or read into, before a rank has come to copying it.
            self._finish_copies()
        self._commands += 1
        data = rank_protocol.encode(command)
        for each in self._ranks:
            each.command(data)

    def push(self, key: Key, push: Push) -> None:
        """See OtherRanks."""
        if self._copies:
            self._send(self._pending(answer=False))  # in order with what follows, so there is nothing to wait for
        self._send(self._numbered(key, push))

    def push_layers(self, pushes: list[LayerPush]) -> None:
        """See OtherRanks."""
        self._layers = [self._numbered(key, push) for key, push in pushes]

    def _numbered(self, key: Key, push: Push) -> PushFrame:
        number = next(self._numbers)
        self._pushes[number] = push
        return PushFrame(key, self._commands, msgspec.structs.replace(push, number=number))

    def _pending(self, answer: bool) -> Copies:
        copies, self._copies = self._copies, []
        return Copies(copies, answer)

    def _finish_copies(self) -> None:
        for each in self._ranks:
            each.copied.clear()
        self._send(self._pending(answer=True))
        for each in self._ranks:
            each.copied.wait()

    # -- what the ranks report, on their threads

    def _report(self, rank: int, report: Report) -> None:
        self._stats[rank] = TransferStats(**report.stats)  # type: ignore[arg-type]
        if report.links is not None:
            self._links[rank] = [msgspec.structs.replace(link, rank=rank) for link in report.links]
        event = report.event
        if isinstance(event, rank_protocol.Pushed):
            self._report_event(rank, sender.Done(event.key, self._pushes[event.number]))
        else:
            self._report_event(rank, event)

    def _ended(self, rank: int, reason: str) -> None:
        if self._stopping:
            return
        if not self._serving:
            time.sleep(LOAD_GRACE)
        self._end(f"rank {rank} of {self.size} {reason}; the worker ends with it")

    def _node_ended(self, reason: str) -> None:
        if not self._stopping:
            self._end(f"{reason}; the worker ends with it")

    def _end(self, reason: str) -> NoReturn:
        self._ending.acquire()  # for ever: one reason is enough
        shutil.rmtree(self._meeting, ignore_errors=True)
        sys.stderr.write(f"kvasir: error: {reason}\n")
        sys.stderr.flush()
        self._tell(node_protocol.Ended(reason[:MOST_OF_REASON]))
        os._exit(1 if self._serving else 2)


class RankedRunner(ModelRunner):
    """Rank 0's part of a model. It sends all its work to the other ranks too."""

    def __init__(self, ranks: RankProcesses, folder: Path, **options: Any) -> None:
        super().__init__(folder, **options)
        self._ranks = ranks

    def copy_page(self, source: int, target: int) -> None:
        """Copy page `source` to page `target` on every rank."""
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
        """See ModelRunner. Ends the process if the step fails, as the ranks then differ."""
        if self.device.type == "cpu":
            # Which calls `forward`, with all tokens known: a step is done here when it was launched.
            return super().launch(batch, places, requests, on_layer)
        self._ranks.step(batch, on_layer is not None, len(places))
        try:
            return super().launch(batch, places, requests, on_layer)
        except Exception as error:
            self._ranks.fail(error)

    def forward(
        self,
        batch: ForwardBatch,
        on_layer: Callable[[int], None] | None = None,
        scores: PromptScores | None = None,
    ) -> torch.Tensor:
        """See ModelRunner. Ends the process if the step fails, as the ranks then differ."""
        self._ranks.step(batch, on_layer is not None)
        try:
            return super().forward(batch, on_layer, scores)
        except Exception as error:
            self._ranks.fail(error)

"""What rank 0 tells the others reaches them by two connections, and counts in the order in which it was said."""

import threading
from collections.abc import Callable
from multiprocessing import Pipe
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from kvasir_engine.config import EngineConfig
from kvasir_engine.connector.commands import Grant, Open, Withdraw
from kvasir_engine.connector.sender import Push
from kvasir_engine.connector.transfer_thread import TransferThread
from kvasir_engine.executor import rank_group, rank_process, rank_protocol
from kvasir_engine.executor.rank_group import RankProcesses
from kvasir_engine.executor.rank_protocol import Copied, Copies, PushFrame
from kvasir_engine.forward_batch import ForwardBatch
from kvasir_engine.protocol import HEADS_APART, Endpoint, Fingerprint, Lease, Region

KEY = ("holder", 1)
TO = Endpoint(
    "holder", 7, b"", Region(0, 8, 64), Fingerprint("m", "", "float32", HEADS_APART, 16, 1, 2, 16, "rope")
)
LEASE = Lease(1, 7, [2], 0, 30.0, "writer", 8)


class FakeRank:
    """Keeps what it is sent, and answers copies at once."""

    all: ClassVar[list["FakeRank"]] = []

    def __init__(self, number: int, folder: Path, *_: Callable[..., None]) -> None:
        self.rank, self.sent, self.copied = number, [], threading.Event()  # type: ignore[var-annotated]
        self.all.append(self)

    def send(self, frame: Any) -> None:
        self.sent.append(frame)
        if isinstance(frame, Copies) and frame.answer:
            self.copied.set()

    def command(self, data: bytes) -> None:
        self.sent.append(rank_protocol.decode_command(data))


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> RankProcesses:
    monkeypatch.setattr(rank_group, "LocalRank", FakeRank)
    monkeypatch.setattr(FakeRank, "all", [])
    return RankProcesses(EngineConfig("file:///nowhere", tensor_parallel=3), tmp_path, lambda *_: None)


def sent() -> list[Any]:
    """What all ranks were sent, after their setups."""
    first, *others = [each.sent[1:] for each in FakeRank.all]
    assert all(other == first for other in others)
    return first


def test_a_push_outside_a_step_comes_after_the_copies_before_it(processes: RankProcesses) -> None:
    processes.copy_page(3, 5)
    processes.copy_page(5, 6)
    processes.push(KEY, Push((5,), (2,)))
    processes.push(KEY, Push((6,), (3,)))
    copies, *pushes = sent()
    assert copies == Copies([(3, 5), (5, 6)], answer=False)
    assert [each.push.local for each in pushes] == [(5,), (6,)]


def test_the_copies_before_a_push_are_not_the_answer_that_a_grant_waits_for(processes: RankProcesses) -> None:
    processes.copy_page(3, 5)
    processes.push(KEY, Push((5,), (2,)))
    processes.copy_page(6, 7)
    processes.command(Grant(LEASE, TO, 0))
    assert [type(each) for each in sent()] == [Copies, PushFrame, Copies, Grant]
    assert [each.answer for each in sent() if isinstance(each, Copies)] == [False, True]


def test_a_push_says_how_many_commands_come_before_it(processes: RankProcesses) -> None:
    processes.push(KEY, Push((1,), (2,)))
    processes.command(Open(TO, LEASE))
    processes.command(Withdraw(KEY, "why not"))
    processes.push(KEY, Push((1,), (2,)))
    assert [each.after for each in sent() if isinstance(each, PushFrame)] == [0, 2]


def test_a_rank_answers_copies_only_when_it_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    done: list[Any] = []

    class Recorder:
        def __init__(self, *_: Any) -> None:
            self.copy = self.push = self.send = done.append

        def wait(self) -> None:
            done.append("wait")

    monkeypatch.setattr(rank_process, "Rank", Recorder)
    ours, theirs = Pipe()
    push = PushFrame(KEY, 0, Push((5,), (2,), number=1))
    setup = rank_protocol.Setup(1, "file:///nowhere", EngineConfig("file:///model", tensor_parallel=2))
    for frame in (setup, Copies([(3, 5)], False), push, Copies([(6, 7)], True), rank_protocol.Stop()):
        ours.send_bytes(rank_protocol.encode(frame))  # type: ignore[arg-type]
    rank_process.serve_rank(theirs, Recorder(), tmp_path)  # type: ignore[arg-type]
    done = [rank_protocol.encode(each) if isinstance(each, PushFrame) else each for each in done]
    assert done == [[(3, 5)], "wait", rank_protocol.encode(push), [(6, 7)], "wait", Copied()]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_copies_on_a_gpu_are_waited_for(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    waited: list[Any] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    one = rank_process.Rank.__new__(rank_process.Rank)
    one._runner = SimpleNamespace(device=torch.device(device))  # type: ignore[assignment]
    one.wait()
    assert waited == ([torch.device("cuda")] if device == "cuda" else [])


class FakeHandoff:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def after(self, commands: int) -> None:
        self.told.append(commands)

    def push(self, key: Any, push: Push) -> None:
        self.told.append(push.layer)

    push_layers = TransferThread.push_layers


class OneLayer:
    """A runner whose layer 0 is computed at once."""

    def follow(self, batch: Any, sampled: Any, on_layer: Callable[[int], None]) -> None:
        on_layer(0)


def test_a_ranks_pushes_come_after_the_commands_before_them() -> None:
    one = rank_process.Rank.__new__(rank_process.Rank)
    one._runner = OneLayer()  # type: ignore[assignment]
    one._transfers = connector = FakeHandoff()  # type: ignore[assignment]
    one.push(PushFrame(KEY, 4, Push((1,), (2,), number=1)))
    batch = ForwardBatch(torch.tensor([7]), torch.tensor([0]), [1], [1], torch.tensor([[0]]))
    pushes = [
        PushFrame(KEY, 5, Push((1,), (2,), 0, number=2)),
        PushFrame(("other", 3), 6, Push((1,), (2,), 0, number=3)),
    ]
    one.step(rank_protocol.StepFrame.of(batch, [], pushes))
    assert connector.told == [4, None, 6, 0, 0]

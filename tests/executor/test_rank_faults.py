"""Ranks that die, stop or are never started: nobody else's tokens change, and every page comes back on proof."""

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from rank_workers import SECONDS, Faulty, Greedy, Request, Router, Workers, ended
from typer.testing import CliRunner

from kvasir_engine.entrypoints.cli import app
from kvasir_engine.errors import ModelError

pytestmark = pytest.mark.dataplane

COUNT = 24


@pytest.fixture
def faulty(workers: Workers, folder: Path) -> Iterator[Faulty]:
    faulty = Faulty(folder)
    yield faulty
    faulty.close()


def requests(greedy: Greedy, name: str, count: int, length: int = 60) -> list[Request]:
    rng = random.Random(name)
    return [Request(f"{name}-{n}", greedy.prompt(rng, length, COUNT), COUNT) for n in range(count)]


def gone(pids: list[int]) -> None:
    deadline = time.monotonic() + SECONDS
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline, f"{pids} live on"
        time.sleep(0.01)


@pytest.mark.parametrize(("point", "ranks"), [("prefill.pushed_layer@2", 1), ("prefill.pushed_chunk", 2)])
def test_a_prefill_rank_killed_in_the_middle_of_a_push(
    workers: Workers, faulty: Faulty, greedy: Greedy, point: str, ranks: int
) -> None:
    decode = workers("decode", ranks, 16)
    router, dying = Router(workers("prefill", 1, 16), decode), faulty("prefill", 2, f"rank1:{point}=kill")
    others, victim = requests(greedy, point, 3), requests(greedy, "victim", 1, 200)[0]
    for request in others[:2]:
        router.ask(request)
    router.run(lambda: all(request.tokens for request in others[:2]))
    router.ask(victim, dying)
    router.ask(others[2])
    router.run()
    assert victim.failures[0] == "handoff_failed"
    assert [request.output for request in others] == [greedy(request.prompt, COUNT) for request in others]
    ended(dying, "rank 1 of 2 was killed by signal 9")
    decode.wait_quiet()
    router.prefill.wait_quiet()


def test_a_decode_rank_killed_while_it_is_written_to(workers: Workers, faulty: Faulty, greedy: Greedy) -> None:
    prefill, dying = workers("prefill", 2, 16), faulty("decode", 2, "rank1:decode.pages_written@2=kill")
    assert dying.endpoint
    pids = dying.rank_pids()
    assert len(pids) == 1
    router = Router(prefill, dying)
    (victim,) = requests(greedy, "written", 1, 200)
    router.ask(victim)
    router.run(lambda: victim.over or not dying.process.is_alive())
    ended(dying, "rank 1 of 2 was killed by signal 9")
    prefill.wait_quiet()
    elsewhere, (after,) = Router(prefill, workers("decode", 2, 16)), requests(greedy, "after", 1)
    elsewhere.ask(after)
    elsewhere.run()
    assert after.output == greedy(after.prompt, COUNT)


def test_a_stopped_rank_is_fenced_and_its_pages_wait_for_its_end(
    workers: Workers, faulty: Faulty, greedy: Greedy
) -> None:
    decode, stopping = workers("decode", 1, 16), faulty("prefill", 2, "rank1:prefill.pushed_layer@2=stop")
    router = Router(stopping, decode)
    (victim,) = requests(greedy, "stopped", 1, 200)
    router.ask(victim)
    router.run()
    assert victim.failures[0] == "lease_writer_silent"
    # Rank 0 has said that it stopped, and rank 1 has not: all of the pages wait.
    owned = decode.ask("owned")
    assert owned["FENCED"] == -(-200 // 16)
    for pid in stopping.rank_pids():
        os.kill(pid, signal.SIGKILL)
    ended(stopping, "rank 1 of 2 was killed by signal 9")
    decode.wait_quiet()


def test_ranks_end_with_rank_0(faulty: Faulty) -> None:
    worker = faulty("decode", 2, "")
    assert worker.endpoint
    pids = worker.rank_pids()
    assert pids
    worker.process.kill()
    worker.process.join()
    gone(pids)


@pytest.mark.parametrize("when", [1, 3, 6])
def test_an_abort_on_its_way_leaves_no_page_on_any_rank(workers: Workers, greedy: Greedy, when: int) -> None:
    router = Router(workers("prefill", 2, 16), workers("decode", 2, 16))
    leaver, stayer = requests(greedy, f"abort-{when}", 2, 200)
    router.ask(leaver)
    router.ask(stayer)
    frames = 0

    def some_frames_came() -> bool:
        nonlocal frames
        frames += 1
        return frames > when

    router.run(some_frames_came)
    if not leaver.over:
        router.abort(leaver)
    router.run()
    assert stayer.output == greedy(stayer.prompt, COUNT)
    router.prefill.wait_quiet()
    router.decode.wait_quiet()


def test_ranks_that_do_not_divide_the_model_are_refused_before_any_is_started(folder: Path) -> None:
    arguments = ["worker", "--role", "both", "--model", f"file://{folder}", "--tensor-parallel", "3", "--port", "0"]
    result = CliRunner().invoke(app, [*arguments, "--device", "cpu"])
    assert isinstance(result.exception, ModelError)
    assert "tensor parallel size 3 does not divide the model's 4 KV heads" in str(result.exception)

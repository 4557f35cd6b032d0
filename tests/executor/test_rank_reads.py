"""A conversation's KV is read back from decode between workers of other numbers of ranks and other page sizes."""

import itertools
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from rank_workers import SECONDS, Faulty, Greedy, Request, Router, Worker, Workers, ended

pytestmark = pytest.mark.dataplane

COUNT = 6
TOKEN_BYTES = 3 * 2 * 4 * 16 * 4
"""Layers, K and V, heads, dimensions, bytes."""
PAIRS = [((2, 16), (2, 16)), ((4, 16), (2, 16)), ((1, 32), (2, 16)), ((2, 16), (1, 32))]
"""Ranks and page size of prefill, which reads, and of decode, which lends."""
ALL = list(itertools.product(itertools.product((1, 2, 4), (16, 32)), repeat=2))


@pytest.fixture
def faulty(workers: Workers, folder: Path) -> Iterator[Faulty]:
    faulty = Faulty(folder)
    yield faulty
    faulty.close()


def second_turn(router: Router, greedy: Greedy, name: str) -> tuple[Request, Request]:
    """A first turn that decode has done alone, and the second turn, not asked yet."""
    rng = random.Random(name)
    first = Request(f"{name}-first", greedy.prompt(rng, 75, COUNT), COUNT)
    router.ask_decode(first)
    router.run()
    assert first.output == greedy(first.prompt, COUNT)
    return first, Request(f"{name}-second", greedy.prompt(rng, 120, COUNT, first.prompt + first.output), COUNT)


def check(workers: Workers, greedy: Greedy, prefill: tuple[int, int], decode: tuple[int, int]) -> None:
    """Conversations of which prefill has nothing, and 32 tokens."""
    router = Router(workers("prefill", *prefill), workers("decode", *decode))
    for known in (0, 32):
        first, second = second_turn(router, greedy, f"{prefill}-{decode}-{known}")
        if known:
            start = Request(f"{second.id}-start", [*first.prompt[:known], 5], 1)
            router.ask(start)
            router.run()
        before, read_before = router.prefill.ask("read")
        router.ask(second, lend_from=known)
        router.run()
        assert not second.failures
        assert second.output == greedy(second.prompt, COUNT)
        after, read = router.prefill.ask("read")
        lent = 80 // decode[1] * decode[1]
        expected = lent // prefill[1] * prefill[1] - known
        assert after.tokens - before.tokens == expected
        assert after.outcomes.get("read", 0) == before.outcomes.get("read", 0) + 1
        assert read - read_before == expected * TOKEN_BYTES, "each byte comes once"
        for worker in (router.prefill, router.decode):
            worker.wait_quiet()


@pytest.mark.parametrize(("prefill", "decode"), PAIRS)
def test_what_decode_has_is_read_and_the_tokens_are_the_same(
    workers: Workers, greedy: Greedy, prefill: tuple[int, int], decode: tuple[int, int]
) -> None:
    check(workers, greedy, prefill, decode)


@pytest.mark.soak
@pytest.mark.parametrize(("prefill", "decode"), [pair for pair in ALL if pair not in PAIRS])
def test_what_decode_has_is_read_in_every_pairing(
    workers: Workers, greedy: Greedy, prefill: tuple[int, int], decode: tuple[int, int]
) -> None:
    check(workers, greedy, prefill, decode)


def stopped(worker: Worker) -> int:
    """The rank of `worker` that a fault has stopped, when it has."""
    deadline = time.monotonic() + SECONDS
    while True:
        for pid in worker.rank_pids():
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T":
                return pid
        assert time.monotonic() < deadline, "no rank stops"
        time.sleep(0.01)


def test_what_a_stopped_rank_reads_stays_lent_until_it_is_dead(
    workers: Workers, faulty: Faulty, greedy: Greedy
) -> None:
    decode, stopping = workers("decode", 2, 16), faulty("prefill", 2, "rank1:prefill.read_posted=stop")
    router = Router(stopping, decode)
    _, victim = second_turn(router, greedy, "stopped reader")
    router.ask(victim, lend_from=0)
    router.run()
    assert victim.failures[0] == "lease_writer_silent"
    pid = stopped(stopping)
    owned = decode.ask("owned")
    assert (owned["lent"], owned["HELD"]) == (1, 5), "rank 0 has read its part, and rank 1 has not said so"
    os.kill(pid, signal.SIGKILL)
    ended(stopping, "rank 1 of 2 was killed by signal 9")
    decode.wait_quiet()


def goes_on(prefill: Worker, decode: Worker, greedy: Greedy, name: str) -> None:
    """A worker that has lost its partner has all its pages, and reads from another."""
    prefill.wait_quiet()
    router = Router(prefill, decode)
    _, second = second_turn(router, greedy, name)
    router.ask(second, lend_from=0)
    router.run()
    assert second.output == greedy(second.prompt, COUNT)
    prefill.wait_quiet()


def test_a_rank_that_dies_before_it_has_said_what_it_lends(
    workers: Workers, faulty: Faulty, greedy: Greedy
) -> None:
    prefill, dying = workers("prefill", 2, 16), faulty("decode", 2, "rank1:decode.loan_digested=kill")
    router = Router(prefill, dying)
    _, victim = second_turn(router, greedy, "dying lender")
    router.ask(victim, lend_from=0)
    router.run(lambda: victim.over or not dying.process.is_alive())
    ended(dying, "rank 1 of 2 was killed by signal 9")
    router.abort(victim)
    goes_on(prefill, workers("decode", 2, 16), greedy, "after its lender")


@pytest.mark.soak
def test_a_rank_that_dies_while_it_is_read(workers: Workers, faulty: Faulty, greedy: Greedy) -> None:
    prefill, dying = faulty("prefill", 2, "rank1:prefill.read_posted=stop"), faulty("decode", 2, "")
    router = Router(prefill, dying)
    _, victim = second_turn(router, greedy, "lender under a read")
    router.ask(victim, lend_from=0)
    router.run(lambda: "reads" in prefill.ask("owned"))
    pid = stopped(prefill)
    (lender,) = dying.rank_pids()
    os.kill(lender, signal.SIGKILL)
    ended(dying, "rank 1 of 2 was killed by signal 9")
    os.kill(pid, signal.SIGCONT)
    router.abort(victim)
    goes_on(prefill, workers("decode", 2, 16), greedy, "after its lender under a read")

"""The work queue: every key soon, none twice at once, failures later."""

import asyncio

import pytest

from kvasir_operator.cluster.interface import ClusterError
from kvasir_operator.reconcile.work_queue import RequeueDelays, WorkQueue

DELAYS = RequeueDelays(settle=0.0, base=0.0, cap=0.0, resync=1000.0)


async def test_events_in_a_burst_are_handled_once() -> None:
    done = asyncio.Event()
    handled: list[str] = []

    async def handle(key: str) -> bool:
        handled.append(key)
        done.set()
        return True

    queue = WorkQueue(handle, delays=DELAYS)
    for _ in range(10):
        queue.add("a")
    await done.wait()
    await queue.close()
    assert handled == ["a"]


async def test_an_event_during_work_leads_to_one_more_round_and_never_to_two_at_once() -> None:
    started, go = asyncio.Event(), asyncio.Event()
    rounds, running, most = 0, 0, 0
    finished = asyncio.Event()

    async def handle(key: str) -> bool:
        nonlocal rounds, running, most
        rounds, running = rounds + 1, running + 1
        most = max(most, running)
        started.set()
        await go.wait()
        running -= 1
        if rounds == 2:
            finished.set()
        return True

    queue = WorkQueue(handle, delays=DELAYS)
    queue.add("a")
    await started.wait()
    queue.add("a")
    queue.add("a")
    go.set()
    await finished.wait()
    await queue.close()
    assert (rounds, most) == (2, 1)


async def test_one_stuck_key_does_not_hold_up_another() -> None:
    other = asyncio.Event()

    async def handle(key: str) -> bool:
        if key == "stuck":
            await asyncio.Event().wait()
        other.set()
        return True

    queue = WorkQueue(handle, delays=DELAYS)
    queue.add("stuck")
    queue.add("other")
    await asyncio.wait_for(other.wait(), 60)
    await queue.close()


async def test_what_fails_comes_back_until_it_works() -> None:
    tries, done = 0, asyncio.Event()

    async def handle(key: str) -> bool:
        nonlocal tries
        tries += 1
        if tries < 4:
            raise ClusterError(503, "not now") if tries < 3 else ValueError("a bug")
        done.set()
        return True

    queue = WorkQueue(handle, delays=DELAYS)
    queue.add("a")
    await asyncio.wait_for(done.wait(), 60)
    await queue.close()
    assert tries == 4


async def test_an_edit_is_looked_at_though_the_key_just_failed() -> None:
    failed, done = asyncio.Event(), asyncio.Event()

    async def handle(key: str) -> bool:
        if not failed.is_set():
            failed.set()
            raise ClusterError(422, "refused")
        done.set()
        return True

    queue = WorkQueue(handle, delays=RequeueDelays(settle=0.0, base=1000.0, cap=1000.0))
    queue.add("a")
    await failed.wait()
    await asyncio.sleep(0)
    queue.add("a")
    await asyncio.sleep(0)
    assert not done.is_set()
    queue.add("a", now=True)
    await asyncio.wait_for(done.wait(), 60)
    await queue.close()


async def test_what_is_there_is_looked_at_again_and_what_is_gone_is_not() -> None:
    seen: list[str] = []
    again = asyncio.Event()

    async def handle(key: str) -> bool:
        seen.append(key)
        if seen.count("there") == 3:
            again.set()
        return key == "there"

    queue = WorkQueue(handle, delays=RequeueDelays(settle=0.0, resync=0.001))
    queue.add("gone")
    queue.add("there")
    await asyncio.wait_for(again.wait(), 60)
    await queue.close()
    assert seen.count("gone") == 1


async def test_what_is_to_come_back_later_comes_back_once() -> None:
    rounds: list[str] = []
    back = asyncio.Event()

    async def handle(key: str) -> bool:
        rounds.append(key)
        if len(rounds) == 3:
            back.set()
        elif len(rounds) < 3:
            for _ in range(4):  # as four events would, each with a reconcile of its own
                queue.add_later(key, 0.0)
        return True

    queue = WorkQueue(handle, delays=DELAYS)
    queue.add("a")
    await asyncio.wait_for(back.wait(), 60)
    for _ in range(10):
        await asyncio.sleep(0)
    queue.add_later("a", 1000.0)
    await queue.close()
    assert rounds == ["a", "a", "a"]


@pytest.mark.parametrize(("failures", "delay"), [(1, 0.5), (2, 1.0), (3, 2.0), (7, 30.0), (50, 30.0)])
def test_delays_grow_up_to_a_cap(failures: int, delay: float) -> None:
    assert RequeueDelays().delay(failures) == delay

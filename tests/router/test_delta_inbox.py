"""Deltas that wait for their reader become one; nothing else is joined."""

import asyncio

import pytest

from kvasir_engine.delta_inbox import DeltaInbox, joined
from kvasir_engine.protocol import Delta, Failure, TokenLogprobs


async def test_a_reader_that_keeps_up_gets_each_and_a_slow_one_all_together() -> None:
    inbox: DeltaInbox[str, Delta] = DeltaInbox()
    for index in range(3):
        inbox.put("d", Delta("x", index, [index]))
        assert await inbox.get() == ("d", Delta("x", index, [index]))
    reading = asyncio.create_task(inbox.get())
    await asyncio.sleep(0)
    for index in range(3, 6):
        inbox.put("d", Delta("x", index, [index], cached=index))
    inbox.put("d", Delta("x", 6, [6], finish="stop"))
    assert await reading == ("d", Delta("x", 3, [3, 4, 5, 6], finish="stop", cached=5))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (Delta("x", 0, [1]), Delta("x", 1, [2])),  # the first token is timed
        (Delta("x", 1, [1], finish="handoff"), Delta("x", 2, [2])),
        (Delta("x", 1, [1]), Delta("x", 3, [2])),
        (Delta("x", 1, [1]), Delta("x", 1, [1])),
        (Delta("x", 1, [1]), Delta("x", 2, failure=Failure("a", "b"))),
        (Delta("x", 1, cached=4), Delta("x", 1, [1])),
        (Delta("x", 1, [1]), Delta("x", 2, finish="length")),
        (Delta("x", 1, [1], [TokenLogprobs(-1.0)]), Delta("x", 2, [2])),
        (Delta("x", 1, [1], [TokenLogprobs(-1.0)] * 2), Delta("x", 2, [2], [])),
    ],
)
def test_what_does_not_just_go_on_stays_apart(first: Delta, second: Delta) -> None:
    assert joined(first, second) is None


def test_logprobs_stay_with_their_tokens() -> None:
    one, two = [TokenLogprobs(-1.0)], [TokenLogprobs(-2.0), TokenLogprobs(-3.0)]
    both = joined(Delta("x", 4, [1], one), Delta("x", 5, [2, 3], two))
    assert both == Delta("x", 4, [1, 2, 3], [*one, *two])


async def test_sources_and_other_events_keep_their_order() -> None:
    inbox: DeltaInbox[str, str] = DeltaInbox()
    inbox.put("d", Delta("x", 0, [1]))
    inbox.put("p", Delta("x", 1, [2]))
    inbox.put("p", "lost")
    inbox.put("p", Delta("x", 2, [3]))
    assert [await inbox.get() for _ in range(4)] == [
        ("d", Delta("x", 0, [1])),
        ("p", Delta("x", 1, [2])),
        ("p", "lost"),
        ("p", Delta("x", 2, [3])),
    ]

"""Who is served when: priorities, and what they cannot do."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvasir_engine.core.sequence import Sequence
from kvasir_engine.core.waiting_queue import LEVEL, WaitingQueue, place_in_queue
from kvasir_engine.protocol import Sampling


def sequence(arrival: int, priority: int = 0) -> Sequence:
    return Sequence(f"r{arrival}", [1], Sampling(1), place_in_queue(arrival, priority))


def test_lower_priorities_come_first_and_equals_in_order_of_arrival() -> None:
    queue = WaitingQueue()
    for arrival, priority in enumerate([0, 5, -1, 0, -1]):
        queue.add(sequence(arrival, priority))
    assert [each.id for each in queue] == ["r2", "r4", "r0", "r3", "r1"]


def test_no_priority_starves_another() -> None:
    late, early = sequence(LEVEL * 3, -2), sequence(0, 0)
    assert early.arrival < late.arrival, "it overtakes two thousand requests, not three"
    assert sequence(10**6 + 1, -(10**9)).arrival > sequence(0, 0).arrival, "nor does any priority overtake all"


def test_what_was_preempted_stands_where_it_stood() -> None:
    queue, each = WaitingQueue(), [sequence(arrival) for arrival in range(4)]
    for one in each:
        queue.add(one)
    queue.remove(each[1])
    assert each[1] not in queue
    queue.add(each[1])
    assert list(queue) == each
    with pytest.raises(ValueError, match="r9 does not wait"):
        queue.remove(sequence(9))


@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(-(10**9), 10**9)), unique_by=lambda each: each[0]))
def test_no_two_stand_at_one_place(requests: list[tuple[int, int]]) -> None:
    assert len({place_in_queue(*each) for each in requests}) == len(requests)

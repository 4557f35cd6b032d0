"""Priorities and the limits of the queue, in the engine."""

import pytest
from simulation import Network, Worker

from kvasir_engine.core.engine import Engine
from kvasir_engine.core.scheduler import Limits
from kvasir_engine.core.waiting_queue import QueueLimits
from kvasir_engine.protocol import Delta, Sampling, Submit

LIMITS = Limits(tokens=12, running=1, page_size=4)
PROMPT = [1, 2, 3, 4, 5]


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def engine() -> Engine:
    return Worker(Network(), "both", "b", 12, LIMITS).engine


def submit(engine: Engine, request: str, priority: int = 0) -> None:
    engine.submit(1, Submit(request, [*PROMPT, int(request)], Sampling(max_tokens=3), priority=priority))


def outcome(engine: Engine) -> list[tuple[str, str]]:
    """The requests that ended, in order, each with `length` or the code of its failure."""
    deltas = [frame for frame in engine.drain().get(1, []) if isinstance(frame, Delta)]
    return [(d.id, d.failure.code if d.failure else d.finish or "") for d in deltas if d.failure or d.finish]


def run(engine: Engine) -> list[tuple[str, str]]:
    ended = outcome(engine)
    while engine.jobs:
        engine.step()
        ended += outcome(engine)
    return ended


def test_requests_of_a_lower_priority_are_served_first(engine: Engine) -> None:
    for request, priority in [("1", 0), ("2", 7), ("3", -1), ("4", 0)]:
        submit(engine, request, priority)
    assert [request for request, _ in run(engine)] == ["3", "1", "4", "2"]


def test_a_full_queue_refuses_at_once_and_spoils_nothing(engine: Engine) -> None:
    engine.requests.queue = QueueLimits(length=2)
    submit(engine, "1")
    engine.step()
    for request in "234":
        submit(engine, request)
    assert outcome(engine) == [("4", "overloaded")]
    assert run(engine) == [("1", "length"), ("2", "length"), ("3", "length")]
    engine.check()


def test_who_waits_too_long_is_refused_and_who_has_begun_is_not() -> None:
    clock = Clock()
    network = Network()
    engine = Worker(network, "both", "b", 12, LIMITS).engine
    engine.requests.queue, engine.requests.clock = QueueLimits(seconds=10), clock
    submit(engine, "1")
    engine.step()
    submit(engine, "2")
    clock.now += 9.5
    engine.step()
    submit(engine, "3")
    clock.now += 1
    engine.step()
    assert run(engine) == [("2", "overloaded"), ("1", "length"), ("3", "length")]
    engine.check()

"""What a router and a worker measure for the scaling planner: windows, holds, tokens."""

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvasir_engine.core.step_meter import StepMeter
from kvasir_engine.rolling_window import PARTS, Sum, Window
from kvasir_engine.router.load_meter import LoadMeter
from kvasir_engine.status_reports import COST_SECONDS, LOAD_SECONDS


class Clock:
    """Seconds that a test moves."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Iterator[Clock]:
    return Clock()


@given(st.lists(st.tuples(st.floats(0, 20), st.floats(-5, 5)), max_size=60), st.floats(0, 40))
def test_a_window_has_all_of_its_seconds_and_little_of_what_was_before(
    added: list[tuple[float, float]], later: float
) -> None:
    clock = Clock()
    window = Window(15.0, clock)
    values: list[tuple[float, float]] = []
    for wait, value in added:
        clock.now += wait
        window.add(value)
        values.append((clock.now, value))
    clock.now += later
    part = 15.0 / PARTS
    within = [value for at, value in values if clock.now - at < 15.0 - 1e-6]
    about = [value for at, value in values if clock.now - at < 15.0 + part + 1e-6]
    assert len(within) <= window.sum().count <= len(about)
    told = values[len(values) - window.sum().count :]
    assert window.sum().total == pytest.approx(sum(value for _, value in told))
    assert window.covers <= 15.0 + part


def test_a_window_covers_only_what_has_passed(clock: Clock) -> None:
    window = Window(15.0, clock)
    clock.now += 4.0
    window.add(2.0, count=3)
    assert window.covers == pytest.approx(4.0)
    assert window.sum() == Sum(3, 2.0)
    assert window.sum().mean == pytest.approx(2 / 3)
    clock.now += 100.0
    assert window.sum() == Sum()
    assert window.sum().mean is None
    assert 15.0 <= window.covers <= 16.0


def test_a_sequence_is_an_arrival_a_first_token_and_gaps(clock: Clock) -> None:
    meter = LoadMeter(clock)
    with meter.sequence() as watch:
        clock.now += 0.5
        watch.tokens(0)  # nothing came
        watch.tokens(1)
        clock.now += 0.2
        watch.tokens(4)
        clock.now += 0.1
        watch.tokens(1)
        assert meter.report().idle == 0.0
    report = meter.report()
    assert report.arrivals == 1
    assert report.ttft == Sum(1, pytest.approx(0.5))
    assert report.itl == Sum(5, pytest.approx(0.3))
    assert report.decode == Sum(1, pytest.approx(0.3))
    clock.now += LOAD_SECONDS + 2
    assert meter.report().arrivals == 0
    assert meter.report().decode.count == 1, "what a request costs is known for longer"
    clock.now += 2 * COST_SECONDS
    assert meter.report().decode.count == 0


def test_a_sequence_without_a_token_costs_nothing(clock: Clock) -> None:
    meter = LoadMeter(clock)
    with pytest.raises(ValueError, match="gone"), meter.sequence():
        raise ValueError("gone")
    assert meter.report().ttft == meter.report().decode == Sum()


def test_a_router_is_idle_from_the_end_of_its_last_request(clock: Clock) -> None:
    meter = LoadMeter(clock)
    clock.now += 5.0
    assert meter.report().idle == pytest.approx(5.0), "from its start, when it had none"
    with meter.hold():
        clock.now += 7.0
        assert (meter.report().idle, meter.report().held) == (0.0, 1)
    clock.now += 1.0
    assert meter.report().idle == pytest.approx(1.0)
    with meter.sequence(), meter.sequence():
        clock.now += 3.0
    assert meter.report().idle == 0.0


def test_what_was_held_arrived_when_it_came(clock: Clock) -> None:
    meter = LoadMeter(clock)
    with meter.hold() as one, meter.hold() as other:
        assert meter.report().arrivals == 2
        clock.now += LOAD_SECONDS + 2
        one.released, other.released = True, False  # no worker came in time for the other
    with meter.sequence() as watch:
        clock.now += 0.1
        watch.tokens(1)
    assert meter.report().arrivals == 0
    assert meter.report().ttft.mean == pytest.approx(0.1), "without the time that it was held"
    with meter.sequence():
        pass
    assert meter.report().arrivals == 1


def test_a_worker_counts_its_steps_and_what_a_lone_sequence_takes(clock: Clock) -> None:
    meter = StepMeter(clock)
    assert (meter.busy, meter.prompts, meter.alone) == (0.0, 0, 0.0)
    meter.step(0.5, 300)
    meter.step(0.02, 8)
    meter.step(0.010, 1)
    meter.step(0.012, 1)
    meter.computed(2)
    meter.computed(0)
    assert meter.busy == pytest.approx(0.542)
    assert meter.prompts == 2
    assert meter.alone == pytest.approx(0.011)
    clock.now += 2 * COST_SECONDS
    assert (meter.busy, meter.prompts, meter.alone) == (0.0, 0, 0.0)

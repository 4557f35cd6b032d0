"""How many layers go in one push, by what a link's descriptors and bytes cost."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvasir_engine.connector.push_size import SHARE, LinkCost, Timed, cost_of, layers_a_push

MIB = 1 << 20
costs = st.builds(
    LinkCost,
    st.one_of(st.just(0.0), st.floats(1e-9, 1e-2)),
    st.floats(1e5, 1e12),
)
sizes = st.integers(1, 1 << 24)
depths = st.integers(1, 128)


def overhead(cost: LinkCost, layer_bytes: int, layers: int) -> float:
    return cost.descriptor_seconds / (layers * layer_bytes / cost.bytes_per_second)


@pytest.mark.parametrize(
    ("what", "cost", "layers"),
    [
        ("CUDA IPC on one card, as measured: whole pages", LinkCost(7.8e-6, 260e9), 32),
        ("400 Gb/s RDMA: each layer as it is computed", LinkCost(0.2e-6, 46e9), 1),
        ("shared memory of a host", LinkCost(0.5e-6, 11e9), 1),
        ("TCP: wires are slow", LinkCost(10e-6, 1e9), 1),
        ("UCX that falls back to TCP", LinkCost(30e-6, 0.45e9), 1),
        ("between the two: some", LinkCost(1e-6, 100e9), 8),
    ],
)
def test_llama_8bs_layers_of_64_kib_go(what: str, cost: LinkCost, layers: int) -> None:
    assert layers_a_push(cost, 64 << 10, 32) == layers


@given(costs, sizes, depths)
def test_descriptors_cost_little_beside_the_bytes_or_whole_pages_go(cost: LinkCost, size: int, layers: int) -> None:
    chosen = layers_a_push(cost, size, layers)
    assert 1 <= chosen <= layers
    assert chosen == layers or overhead(cost, size, chosen) <= SHARE * (1 + 1e-9)


@given(costs, sizes, depths)
def test_no_fewer_pushes_are_made_than_that_takes(cost: LinkCost, size: int, layers: int) -> None:
    chosen = layers_a_push(cost, size, layers)
    more = layers // -(-layers // chosen) if chosen < layers else 0
    pushes = -(-layers // chosen)
    # One push more, and the largest of them would be too small, or they would be the same pushes.
    finer = -(-layers // (pushes + 1))
    assert finer == chosen or pushes == layers or overhead(cost, size, layers // (pushes + 1)) > SHARE * (1 - 1e-9)
    assert more <= chosen


@given(costs, sizes, depths, st.floats(1.0, 100.0))
def test_dearer_descriptors_or_faster_bytes_make_no_smaller_pushes(
    cost: LinkCost, size: int, layers: int, times: float
) -> None:
    chosen = layers_a_push(cost, size, layers)
    assert layers_a_push(LinkCost(cost.descriptor_seconds * times, cost.bytes_per_second), size, layers) >= chosen
    assert layers_a_push(LinkCost(cost.descriptor_seconds, cost.bytes_per_second * times), size, layers) >= chosen
    assert layers_a_push(cost, size * 2, layers) <= chosen


@given(costs, st.integers(1, 64), st.integers(1, 64), st.integers(1, 1 << 22), st.integers(1, 64))
def test_a_links_cost_is_found_from_two_writes(cost: LinkCost, few: int, more: int, size: int, scale: int) -> None:
    writes = [(few, size * (more + scale)), (few + more, size)]  # the second has more descriptors, and fewer bytes
    found = cost_of(*(Timed(n, b, cost.seconds(n, b)) for n, b in writes))
    for n, b in writes:
        assert found.seconds(n, b) == pytest.approx(cost.seconds(n, b), rel=1e-6)


@given(*[st.builds(Timed, st.integers(1, 10_000), st.integers(1, 1 << 30), st.floats(1e-7, 10.0))] * 2)
def test_whatever_was_timed_gives_a_cost_that_can_be_used(few: Timed, many: Timed) -> None:
    found = cost_of(few, many)
    assert found.descriptor_seconds >= 0
    assert found.bytes_per_second > 0
    assert 1 <= layers_a_push(found, 1 << 16, 32) <= 32


def test_times_that_contradict_each_other_make_descriptors_free() -> None:
    assert cost_of(Timed(3, 6 * MIB, 2e-3), Timed(48, 3 * MIB, 1e-4)) == LinkCost(0.0, 3 * MIB / 1e-4)

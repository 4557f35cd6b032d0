"""The scaling planner: what moves which role, and what never happens whatever is measured."""

import msgspec
import pytest
from bench.scaling import planner, play, two_hpas
from bench.twin import Model, Outcome
from hypothesis import given
from hypothesis import strategies as st

from kvasir_operator.api import WORKER_ROLES, WorkerRole
from kvasir_operator.scaling.planner import Bounds, Decision, Need, RolePool, Signals, Targets, decide, remember

TARGETS = Targets(ttft=1.0, itl=0.050, window=300.0)
CALM = Signals(
    arrivals=5.0,
    inflight=50,
    running=40,
    prefill_seconds=0.2,
    decode_seconds=8.0,
    ttft=0.3,
    itl=0.030,
    itl_floor=0.010,
    kv_use=0.3,
    startup=60.0,
)


def sizes(prefill: int, decode: int, signals: Signals | None, now: float = 0.0, **more: object) -> tuple[int, int]:
    """The replicas that are decided on for pools in which all workers are ready and nothing is remembered."""
    decided = decisions(prefill, decode, signals, now, **more)
    return decided["prefill"].replicas, decided["decode"].replicas


def decisions(
    prefill: int,
    decode: int,
    signals: Signals | None,
    now: float = 0.0,
    *,
    needs: tuple[Need, ...] | None = (),
    least: int = 1,
    most: int = 20,
    gpus: int = 0,
    ready: int | None = None,
    idle: float | None = None,
) -> dict[WorkerRole, Decision]:
    pools: dict[WorkerRole, RolePool] = {
        "prefill": RolePool(prefill, prefill if ready is None else ready, needs),
        "decode": RolePool(decode, decode if ready is None else ready, needs),
    }
    bounds: dict[WorkerRole, Bounds] = {role: Bounds(least, most) for role in WORKER_ROLES}
    return decide(now, pools, bounds, Targets(TARGETS.ttft, TARGETS.itl, TARGETS.window, gpus, idle), signals)


def but(**changes: object) -> Signals:
    return Signals(**{**{name: getattr(CALM, name) for name in CALM.__struct_fields__}, **changes})  # type: ignore[arg-type]


def test_what_suffices_stays() -> None:
    assert sizes(2, 1, CALM) == (2, 1)


def test_a_backlog_moves_prefill_by_what_it_will_be_when_a_worker_has_started() -> None:
    soon = sizes(2, 4, but(arrivals=20.0, waiting=100, running=160, startup=10.0, decode_seconds=8.0))
    late = sizes(2, 4, but(arrivals=20.0, waiting=100, running=160, startup=120.0, decode_seconds=8.0))
    assert soon[0] > 2
    assert soon[1] == late[1]
    reason = decisions(2, 4, but(arrivals=20.0, waiting=100, startup=10.0))["prefill"].reason
    assert reason == "100 requests wait, 200 when a worker has started"


def test_a_ttft_above_its_target_moves_prefill_and_not_decode() -> None:
    assert sizes(2, 1, but(ttft=1.5)) == (3, 1)


@pytest.mark.parametrize("changes", [{"itl": 0.060}, {"kv_use": 0.9}])
def test_itl_and_kv_pressure_move_decode_and_not_prefill(changes: dict[str, float]) -> None:
    prefill, decode = sizes(2, 1, but(**changes))
    assert prefill == 2
    assert decode == 2


def test_a_burst_at_prefill_moves_decode_before_it_gets_there() -> None:
    assert sizes(2, 1, but(arrivals=15.0))[1] > sizes(2, 1, CALM)[1]


def test_without_measurements_nothing_moves() -> None:
    assert sizes(3, 2, None) == (3, 2)
    assert sizes(3, 2, Signals(arrivals=1.0, inflight=1)) == (3, 2)


def test_both_roles_go_to_zero_together_when_nobody_has_asked_for_long_enough() -> None:
    assert sizes(3, 2, Signals(idle_seconds=599.0), idle=600.0) == (1, 1)
    assert sizes(3, 2, Signals(idle_seconds=600.0), idle=600.0) == (0, 0)
    assert sizes(3, 2, Signals(idle_seconds=600.0)) == (1, 1), "only where that is wanted"
    assert sizes(3, 2, Signals(idle_seconds=600.0), idle=600.0, needs=None) == (3, 2), "what was, is not known"
    assert sizes(0, 0, Signals(idle_seconds=600.0), idle=600.0) == (0, 0)


def test_neither_role_has_fewer_than_its_least_while_the_window_keeps_the_other_from_zero() -> None:
    """Or it would go up to its least when a router starts anew, and down to zero shortly after."""
    pools: dict[WorkerRole, RolePool] = {"prefill": RolePool(2, 2, ()), "decode": RolePool(4, 4, (Need(4),))}
    bounds: dict[WorkerRole, Bounds] = {role: Bounds(3, 5) for role in WORKER_ROLES}
    decided = decide(0.0, pools, bounds, msgspec.structs.replace(TARGETS, idle=600.0), Signals(idle_seconds=600.0))
    assert {role: each.replicas for role, each in decided.items()} == {"prefill": 3, "decode": 4}


def test_a_router_that_starts_anew_or_is_silent_wakes_nobody() -> None:
    assert sizes(0, 0, Signals(idle_seconds=1.0), idle=600.0) == (0, 0)
    assert sizes(0, 0, Signals(idle_seconds=1.0, partial=True), idle=600.0) == (0, 0)
    assert sizes(0, 0, Signals(held=1, partial=True), idle=600.0) == (1, 1)
    assert sizes(0, 0, Signals(idle_seconds=600.0)) == (1, 1), "roles that do not sleep"


@pytest.mark.parametrize(
    "somebody", [{"inflight": 1}, {"running": 1}, {"queued": 1}, {"held": 1}, {"partial": True}]
)
def test_no_role_goes_to_zero_while_somebody_may_want_something(somebody: dict[str, int]) -> None:
    assert 0 not in sizes(1, 1, Signals(idle_seconds=600.0, **somebody), idle=600.0)  # type: ignore[arg-type]


def test_requests_that_routers_hold_bring_both_roles_back() -> None:
    assert sizes(0, 0, Signals(held=3, inflight=3), idle=600.0) == (1, 1)
    assert sizes(0, 0, Signals(held=3, inflight=3), least=2, idle=600.0) == (2, 2)


def test_nothing_goes_down_on_silence_and_what_is_known_takes_roles_up() -> None:
    assert sizes(5, 5, CALM) == (2, 4)
    assert sizes(5, 5, but(partial=True)) == (5, 5)
    assert sizes(2, 1, but(partial=True, ttft=1.5, kv_use=0.9)) == (3, 2)
    assert sizes(0, 0, None, idle=600.0) == (0, 0)
    assert sizes(0, 2, None, idle=600.0) == (1, 2), "one role without the other is not asleep"
    assert sizes(0, 0, None) == (1, 1), "a router without workers is not ready and tells nothing"
    decided = decisions(3, 2, None, 100.0)
    assert decided["prefill"].needs == (Need(3),), "it may have been needed: the window begins anew"


def test_a_role_of_which_little_is_asked_shrinks_though_nothing_runs_at_the_moment() -> None:
    little = but(arrivals=0.1, running=0, inflight=1, decode_seconds=2.0)
    assert sizes(4, 4, little) == (1, 1)
    assert sizes(4, 4, but(arrivals=0.0, running=2, inflight=2, prefill_seconds=None))[0] == 1


def test_sequences_that_wait_for_room_in_decode_move_decode_and_not_prefill() -> None:
    full = but(kv_use=1.0, ttft=1.5)
    assert sizes(2, 2, msgspec.structs.replace(full, queued=40))[1] > sizes(2, 2, full)[1]
    assert sizes(2, 2, msgspec.structs.replace(full, queued=40))[0] == 2


def test_bounds_hold_whatever_the_load() -> None:
    assert sizes(1, 1, but(arrivals=1000.0, kv_use=1.0, itl=1.0), most=4) == (4, 4)


def test_a_gpu_budget_is_shared_by_what_each_role_lacks() -> None:
    wanted = sizes(2, 2, but(arrivals=20.0, itl=0.100, kv_use=0.9))
    within = sizes(2, 2, but(arrivals=20.0, itl=0.100, kv_use=0.9), gpus=6)
    assert sum(wanted) > 6
    assert sum(within) == 6
    shares = [a / b for a, b in zip(within, wanted, strict=True)]
    assert max(shares) - min(shares) < 0.5
    assert "the budget is 3 GPUs" in decisions(2, 2, but(arrivals=20.0, kv_use=0.9), gpus=3)["prefill"].reason


SIGNALS = st.one_of(
    st.none(),
    st.just(Signals()),
    st.builds(
        Signals,
        arrivals=st.floats(0, 200),
        held=st.integers(0, 50),
        inflight=st.integers(0, 500),
        waiting=st.integers(0, 500),
        queued=st.integers(0, 50),
        running=st.integers(0, 500),
        prefill_seconds=st.none() | st.floats(0.01, 5),
        decode_seconds=st.none() | st.floats(0.1, 60),
        ttft=st.none() | st.floats(0, 100),
        itl=st.none() | st.floats(0.001, 1),
        itl_floor=st.floats(0, 0.05),
        kv_use=st.floats(0, 1),
        startup=st.floats(1, 600),
        idle_seconds=st.floats(0, 1000),
        partial=st.booleans(),
    ),
)


@given(
    st.lists(st.tuples(SIGNALS, st.floats(1, 120)), max_size=40),
    st.integers(1, 2),
    st.integers(0, 12),
    st.none() | st.just(300.0),
)
def test_no_load_makes_a_role_go_down_within_a_window_of_going_up(
    loads: list[tuple[Signals | None, float]], least: int, gpus: int, idle: float | None
) -> None:
    now, raised = 0.0, dict.fromkeys(WORKER_ROLES, -1e9)
    size: dict[WorkerRole, int] = dict.fromkeys(WORKER_ROLES, 1)
    needs: dict[WorkerRole, tuple[Need, ...] | None] = dict.fromkeys(WORKER_ROLES, None)
    bounds: dict[WorkerRole, Bounds] = {role: Bounds(least, 8) for role in WORKER_ROLES}
    for signals, seconds in loads:
        now += seconds
        pools = {role: RolePool(size[role], size[role], needs[role]) for role in WORKER_ROLES}
        decided = decide(now, pools, bounds, Targets(1.0, 0.05, 300.0, gpus, idle), signals)
        assert bool(decided["prefill"].replicas) == bool(decided["decode"].replicas)
        assert not gpus or sum(each.replicas for each in decided.values()) <= max(gpus, 2 * least)
        for role in WORKER_ROLES:
            after = decided[role].replicas
            assert (0 if idle else least) <= after <= 8
            assert after >= size[role] or gpus or (signals and not signals.partial)
            assert len(decided[role].needs) <= 9
            if after > size[role]:
                raised[role] = now
            if after < size[role] and not gpus:
                assert now - raised[role] >= 300.0
            size[role], needs[role] = after, decided[role].needs


@given(st.lists(st.tuples(st.integers(0, 10), st.floats(0, 200)), min_size=1), st.floats(1, 500))
def test_what_is_remembered_tells_the_most_of_the_window(load: list[tuple[int, float]], window: float) -> None:
    """What was measured holds until the next measurement."""
    now, needs, ended = 0.0, (), []
    for n, (replicas, seconds) in enumerate(load):
        now += seconds
        if n:
            ended.append((now, load[n - 1][0]))
        needs = remember(needs, now, replicas, window)
        lately = (before for end, before in ended if now - end < window)
        assert max(each.replicas for each in needs) == max(replicas, *lately, 0)


def test_what_is_remembered_stays_the_same_while_as_much_is_needed() -> None:
    needs = remember((), 0.0, 4, 300.0)
    assert [remember(needs, now, 4, 300.0) for now in (15.0, 400.0)] == [needs, needs]
    needs = remember(needs, 500.0, 2, 300.0)
    assert needs == (Need(4, 500.0), Need(2)), "until now, as far as is known"
    assert remember(needs, 799.0, 2, 300.0) == needs
    assert remember(needs, 800.0, 2, 300.0) == (Need(2),)


HPAS = (("busy", 0.5, 90.0), ("busy", 0.65, 120.0), ("queue", 1.0, 90.0))


def test_the_planner_beats_two_hpas_for_the_same_gpu_hours_and_does_not_flap() -> None:
    """`python -m bench.scaling` has longer traces and more HPAs."""
    model, seconds = Model(), 1200.0
    for seed in (0, 1):
        ours = play(seed, planner(model), model, seconds)
        theirs: list[Outcome] = [play(seed, two_hpas(*targets), model, seconds) for targets in HPAS]
        assert ours.per_gpu_hour >= max(each.per_gpu_hour for each in theirs)
        assert ours.flaps(300.0) == 0

"""No rollout, however it goes, falls below its bound, exceeds its surge, stops half way or goes round."""

import itertools
import time

import pytest
from rollout_search import LIMITS, Found, Limits, at, goals, key, naive, search, serving

from kvasir_operator.plan.rollout import RevisionGroup, State, apply, capacity, done, floor, next_step

Shape = tuple[int, int]


def shapes(most: int) -> list[Shape]:
    return list(itertools.product(range(1, most + 1), repeat=2))


def check(found: Found, what: object) -> None:
    assert found.least_margin >= 0, what
    assert found.over_surge == 0, what
    assert not found.stuck, (what, found.stuck[0])
    assert not found.cyclic(), what


def rollouts(most: int, limits: list[Limits]) -> int:
    """Search the rollouts of all shapes to another KV; returns how many states there were."""
    states = 0
    for (prefill, decode), each in itertools.product(shapes(most), limits):
        found = search([State(*goals(prefill, decode, each), serving(prefill, decode))])
        check(found, (prefill, decode, each))
        states += found.states
    return states


def changes_of_mind(most: int, limits: list[Limits]) -> int:
    """From every state of every rollout: a third KV, a third revision of the same KV, back, up, down, to zero."""
    states = 0
    for (p, d), each in itertools.product(shapes(most), limits):
        reached = search([State(*goals(p, d, each), serving(p, d))]).graph
        for wanted in (
            goals(p, d, each, "third"),
            goals(p, d, each, "third", kv="new"),
            goals(p, d, each, "old"),
            goals(p + 1, d, each),
            goals(p, d + 2, each),
            goals(2 * p, 2 * d, each),
            goals(p - 1, d, each),
            goals(p, d - 1, each),
            goals(0, 0, each),
            goals(max(1, p // 2), d + 1, each, "third"),
            goals(p + 1, max(1, d // 2), each, "old"),
        ):
            found = search([at(each_key, wanted) for each_key in reached])
            check(found, (p, d, each, wanted))
            states += found.states
    return states


def report(what: str, states: int, since: float) -> None:
    print(f"{what}: {states} states, {time.perf_counter() - since:.1f} s")


def test_all_shapes_to_16_keep_all_their_capacity_with_a_surge_of_one() -> None:
    since = time.perf_counter()
    report("shapes to 16 x 16, surge 1, unavailable 0", rollouts(16, [(1, 0)]), since)


def test_small_shapes_keep_within_every_limit() -> None:
    since = time.perf_counter()
    report("shapes to 4 x 4, all limits", rollouts(4, LIMITS), since)


def test_small_shapes_may_change_their_mind_anywhere() -> None:
    since = time.perf_counter()
    report("shapes to 2 x 2, redirected at every state", changes_of_mind(2, [(1, 0), (1, 1), (0, 1)]), since)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("limits", LIMITS, ids=str)
def test_all_shapes_to_16_keep_within_every_limit(limits: Limits) -> None:
    since = time.perf_counter()
    report(f"shapes to 16 x 16, surge and unavailable {limits}", rollouts(16, [limits]), since)


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("limits", LIMITS, ids=str)
def test_all_shapes_to_6_may_change_their_mind_anywhere(limits: Limits) -> None:
    since = time.perf_counter()
    report(f"shapes to 6 x 6, redirected at every state, {limits}", changes_of_mind(6, [limits]), since)


def test_roles_that_roll_by_themselves_lose_pairs() -> None:
    """The search can fail: this is what it says of two Deployments side by side."""
    found = {
        shape: search([State(*goals(*shape, (1, 0)), serving(*shape))], naive).least_margin for shape in shapes(6)
    }
    losing = {shape for shape, margin in found.items() if margin < 0}
    print(f"each role by itself: {len(losing)} of {len(found)} shapes lose up to {-min(found.values()):.0%}")
    assert len(losing) == len(found)
    assert (2, 3) in losing


def splits(most: int) -> list[tuple[int, int, int]]:
    return [each for each in itertools.product(range(most + 1), repeat=3) if sum(each) <= most]


def three_kvs(p: int, d: int, limits: Limits) -> list[State]:
    """All ways to have three KV fingerprints within the surge, with everything ready."""
    wanted = goals(p, d, limits, "c")
    most = [g.replicas + g.surge for g in wanted]
    return [
        State(
            *wanted,
            tuple(
                RevisionGroup(role, name, name, n, n)  # type: ignore[arg-type]
                for role, counts in (("prefill", ps), ("decode", ds))
                for name, n in zip("abc", counts, strict=True)
                if n
            ),
        )
        for ps, ds in itertools.product(*map(splits, most))
    ]


def finish(state: State) -> State:
    """Where a rollout from `state` ends when everything becomes ready; at most 500 steps."""
    for _ in range(500):
        steps = next_step(state)
        if not steps:
            return state
        after, bound = apply(state, steps), min(floor(state), capacity(state))
        assert capacity(after) >= bound
        state = at(tuple((*each[:4], each[3]) for each in key(after)), (state.prefill, state.decode))
    raise AssertionError(f"goes round: {state}")


def solvable(state: State) -> bool:
    """Whether any sequence of single changes within the bounds makes fewer than three fingerprints of them."""
    roles = {"prefill": 0, "decode": 1}
    names = "abc"

    def of(counts: tuple[int, ...]) -> State:
        groups = tuple(
            RevisionGroup(role, name, name, n, n)  # type: ignore[arg-type]
            for (role, name), n in zip(itertools.product(roles, names), counts, strict=True)
        )
        return State(state.prefill, state.decode, groups)

    have = {(g.role, g.kv): g.replicas for g in state.groups}
    start = tuple(have.get(each, 0) for each in itertools.product(roles, names))  # type: ignore[call-overload]
    seen, todo = {start}, [start]
    while todo:
        counts = todo.pop()
        if sum(counts[i] + counts[i + 3] > 0 for i in range(3)) < 3:
            return True
        for i, change in itertools.product(range(6), (-1, 1)):
            after = (*counts[:i], counts[i] + change, *counts[i + 1 :])
            role = state.prefill if i < 3 else state.decode
            if after[i] < 0 or sum(after[:3] if i < 3 else after[3:]) > role.replicas + role.surge or after in seen:
                continue
            if capacity(of(after)) >= floor(state):
                seen.add(after)
                todo.append(after)
    return False


def any_three(most: int, limits: list[Limits]) -> tuple[int, int]:
    """How many states of three fingerprints there are, and how many of them nothing can be made of."""
    states = hopeless = 0
    for p, d in itertools.product(range(most + 1), repeat=2):
        for state in itertools.chain.from_iterable(three_kvs(p, d, each) for each in limits):
            states += 1
            end = finish(state)
            if not done(end):
                hopeless += 1
                assert not solvable(end), state
    return states, hopeless


def test_three_fingerprints_that_somebody_mixed_are_sorted_out_where_that_is_possible() -> None:
    since = time.perf_counter()
    states, hopeless = any_three(2, [(1, 0), (0, 1)])
    report(f"three fingerprints, shapes to 2 x 2, {hopeless} hopeless", states, since)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_three_fingerprints_in_larger_shapes() -> None:
    since = time.perf_counter()
    states, hopeless = any_three(4, [(1, 0), (1, 1), (0, 1)])
    report(f"three fingerprints, shapes to 4 x 4, {hopeless} hopeless", states, since)
    assert hopeless, "the search for a way out would not be tested"

"""Single rollout steps: what is kept, what is given up, limits, and the command that prints a plan."""

import json
import re
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rollout_search import goals, key, serving
from typer.testing import CliRunner

from kvasir_operator.__main__ import app
from kvasir_operator.plan.rollout import (
    Goal,
    RevisionGroup,
    State,
    apply,
    capacity,
    done,
    floor,
    goal,
    limit,
    next_step,
)


def group(role: Any, revision: str, replicas: int, ready: int | None = None, kv: str = "") -> RevisionGroup:
    return RevisionGroup(role, revision, kv or revision, replicas, replicas if ready is None else ready)


def steps(state: State) -> set[tuple[str, str, int]]:
    return {(s.role, s.revision, s.replicas) for s in next_step(state)}


@pytest.mark.parametrize(
    ("value", "target", "up", "replicas"),
    [(2, 5, True, 2), ("2", 5, True, 2), ("25%", 5, True, 2), ("25%", 5, False, 1), ("100%", 5, False, 5)],
)
def test_a_percentage_is_rounded_as_a_deployment_rounds_it(
    value: int | str, target: int, up: bool, replicas: int
) -> None:
    assert limit(value, target, up=up) == replicas


def test_limits_that_both_come_to_nothing_let_one_worker_go() -> None:
    assert goal("r", "k", 3, 0, "25%") == Goal("r", "k", 3, surge=0, unavailable=1)
    assert goal("r", "k", 4, 0, "25%") == Goal("r", "k", 4, surge=0, unavailable=1)
    assert goal("r", "k", 3, 1, "25%") == Goal("r", "k", 3, surge=1, unavailable=0)


def test_capacity_is_of_pairs_only() -> None:
    state = State(*goals(2, 4, (1, 0)), (group("prefill", "old", 2), group("decode", "new", 4)))
    assert capacity(state) == 0
    mixed = State(
        *goals(2, 4, (1, 0)),
        (
            group("prefill", "old", 1),
            group("decode", "old", 1),
            group("prefill", "new", 1),
            group("decode", "new", 3),
        ),
    )
    assert capacity(mixed) == Fraction(1, 4) + Fraction(1, 2)


def test_a_role_of_which_none_is_wanted_limits_nothing() -> None:
    assert capacity(State(*goals(0, 4, (1, 0)), (group("decode", "new", 3),))) == Fraction(3, 4)


def test_a_new_service_gets_all_at_once() -> None:
    state = State(*goals(2, 3, (1, 0)))
    assert steps(state) == {("prefill", "new", 2), ("decode", "new", 3)}
    assert done(apply(state, next_step(state)))


def test_nothing_is_taken_away_before_its_successors_are_ready() -> None:
    state = State(*goals(2, 3, (1, 0)), serving(2, 3))
    assert steps(state) == {("prefill", "new", 1), ("decode", "new", 1)}
    waiting = apply(state, next_step(state))
    assert next_step(waiting) == ()


def test_the_same_kv_pairs_across_revisions() -> None:
    wanted = goals(2, 3, (1, 0), "new", kv="old")
    state = State(
        *wanted,
        (*serving(2, 3), group("prefill", "new", 1, kv="old")),
    )
    assert ("prefill", "old", 1) in steps(state), "a new prefill worker serves the old decode workers"


def test_one_role_may_change_alone() -> None:
    wanted = (goal("old", "kv", 2, 1, 0), goal("new", "kv", 3, 1, 0))
    state = State(*wanted, (group("prefill", "old", 2, kv="kv"), group("decode", "old", 3, kv="kv")))
    assert steps(state) == {("decode", "new", 1)}


def test_a_newcomer_that_never_becomes_ready_costs_nothing_and_can_be_taken_back() -> None:
    broken = State(
        *goals(4, 4, (1, 0)), (*serving(4, 4), group("prefill", "new", 1, 0), group("decode", "new", 1, 0))
    )
    assert next_step(broken) == ()
    back = State(*goals(4, 4, (1, 0), "old"), broken.groups)
    assert steps(back) == {("prefill", "new", 0), ("decode", "new", 0)}
    mended = State(*goals(4, 4, (1, 0), "mended"), broken.groups)
    assert steps(mended) == {("prefill", "new", 0), ("decode", "new", 0)}
    assert steps(apply(mended, next_step(mended))) == {("prefill", "mended", 1), ("decode", "mended", 1)}


def test_what_was_never_ready_makes_room_at_once() -> None:
    state = State(*goals(4, 4, (1, 0)), (group("prefill", "old", 4, 0), group("decode", "old", 4, 0)))
    assert {("prefill", "old", 0), ("decode", "old", 0)} <= steps(state)


def test_old_workers_that_may_come_back_are_kept_while_the_new_ones_start() -> None:
    hurt = (group("prefill", "old", 2, 1), group("decode", "old", 2))
    starting = (group("prefill", "new", 1, 0), group("decode", "new", 1, 0))
    assert next_step(State(*goals(2, 2, (1, 0)), (*hurt, *starting))) == ()
    started = (group("prefill", "new", 1), group("decode", "new", 1))
    assert ("prefill", "old", 1) in steps(State(*goals(2, 2, (1, 0)), (*hurt, *started)))


def test_decode_workers_without_prefill_are_not_all_given_up() -> None:
    """They still serve, without pairs; the limit of the role holds for them too."""
    state = State(*goals(1, 16, (1, 1)), (group("decode", "old", 16), group("prefill", "new", 1, 0)))
    assert [s.replicas for s in next_step(state) if s.revision == "old"] == [15]


def test_scaling_and_a_rollout_go_together() -> None:
    half = (*serving(1, 2), group("prefill", "new", 1), group("decode", "new", 1))
    assert {s.revision for s in next_step(State(*goals(4, 6, (1, 0)), half))} == {"new"}, "only growth"
    assert steps(State(*goals(4, 6, (1, 0)), half)) == {("prefill", "new", 4), ("decode", "new", 5)}
    smaller = State(*goals(1, 1, (1, 0)), half)
    assert steps(smaller) == {("prefill", "old", 0), ("decode", "old", 0)}


COUNTS = st.integers(0, 5)


@st.composite
def states(draw: st.DrawFn) -> State:
    """Anything an API server might say, pods that failed and revisions that somebody scaled by hand included."""
    surge, unavailable = draw(st.sampled_from([(1, 0), (2, 0), (1, 1), (0, 1), (0, 2), ("25%", "25%")]))
    wanted = goals(draw(COUNTS), draw(COUNTS), (surge, unavailable), "c", kv=draw(st.sampled_from("ac")))
    found = []
    for role in ("prefill", "decode"):
        for name in "abc":
            replicas = draw(COUNTS)
            kv = wanted[0].kv if name == "c" else name
            found.append(RevisionGroup(role, name, kv, replicas, draw(st.integers(0, replicas))))  # type: ignore[arg-type]
    return State(*wanted, tuple(found))


@given(states(), st.data())
def test_from_any_state_at_all_no_part_of_a_step_makes_things_worse(state: State, data: st.DataObject) -> None:
    whole = next_step(state)
    part = data.draw(st.permutations(whole)) if whole else []
    part = part[: data.draw(st.integers(0, len(part)))]
    after = apply(state, part)
    assert capacity(after) >= min(capacity(state), floor(state))
    for role, wanted in (("prefill", state.prefill), ("decode", state.decode)):
        ready, total = (
            [sum(getattr(g, field) for g in s.groups if g.role == role) for s in (state, after)]
            for field in ("ready", "replicas")
        )
        assert ready[1] >= min(ready[0], wanted.replicas - wanted.unavailable)
        assert total[1] <= max(total[0], wanted.replicas + wanted.surge)


@given(states())
def test_a_step_says_only_what_changes(state: State) -> None:
    now = {(g.role, g.revision): g.replicas for g in state.groups}
    for step in next_step(state):
        assert step.replicas != now.get((step.role, step.revision))
        assert step.replicas >= 0


def test_ten_thousand_workers_are_no_problem() -> None:
    state = State(*goals(4000, 6000, ("25%", "25%")), serving(4000, 6000))
    for _ in range(30):
        state = apply(state, next_step(state))
        state = State(state.prefill, state.decode, tuple(RevisionGroup(*k[:4], k[3]) for k in key(state)))  # type: ignore[arg-type]
        if done(state):
            return
    raise AssertionError(state)


def run(*args: str, stdin: str = "") -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["plan", *args], input=stdin)
    return result.exit_code, result.stdout, result.stderr


def test_the_plan_is_printed_with_every_state() -> None:
    code, out, _ = run("--prefill", "2", "--decode", "3", "--max-surge", "1", "--max-unavailable", "0")
    lines = out.splitlines()
    assert code == 0
    assert re.split(r"  +", lines[0].strip()) == [
        "prefill old",
        "prefill new",
        "decode old",
        "decode new",
        "paired capacity",
    ]
    assert lines[1].split() == ["start", "2/2", "0/0", "3/3", "0/0", "100.0%"]
    assert lines[-2].split() == ["set", "0/0", "2/2", "0/0", "3/3", "100.0%"]
    assert lines[-1] == "done; steps 8, least 100.0%, floor 100.0%"


def test_a_state_of_the_plan_can_be_gone_on_from(tmp_path: Any) -> None:
    _, out, _ = run("--prefill", "2", "--decode", "3", "-o", "json")
    plan = json.loads(out)
    assert (plan["floor"], plan["done"]) == (1.0, True)
    middle = plan["states"][4]["state"]
    path = tmp_path / "state.json"
    path.write_text(json.dumps(middle))
    for args, stdin in (([json.dumps(middle)], ""), (["-"], json.dumps(middle)), ([f"@{path}"], "")):
        code, rest, _ = run("--from-state", *args, "-o", "json", stdin=stdin)
        assert code == 0
        assert json.loads(rest)["states"][1:] == plan["states"][5:]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"groups": [{"role": "router", "revision": "a", "kv": "a", "replicas": 1, "ready": 1}]}, "router"),
        ({"groups": [{"role": "decode", "revision": "a", "kv": "a", "replicas": 1, "ready": 2}]}, "from 0 to"),
        ({"groups": [{"role": "decode", "revision": "a", "kv": "a", "replicas": 1, "ready": 1}] * 2}, "twice"),
        ({"decode": {"revision": "n", "kv": "other", "replicas": 1}}, "cannot pair"),
        ({"decode": {"revision": "n", "kv": "n", "replicas": 1, "surge": 0}}, "not both 0"),
        ({"decode": {}}, "missing required field"),
    ],
)
def test_a_state_that_cannot_be_is_refused(change: dict[str, Any], reason: str) -> None:
    pool = {"revision": "n", "kv": "n", "replicas": 1}
    code, _, err = run("--from-state", json.dumps({"prefill": pool, "decode": pool, **change}))
    assert code == 2
    assert err.startswith("kvasir-operator: error: --from-state: ")
    assert reason in err


def test_a_limit_that_is_none_is_refused() -> None:
    code, _, err = run("--max-surge", "25")
    assert code == 0
    code, _, err = run("--max-unavailable", "101%")
    assert (code, err) == (
        2,
        "kvasir-operator: error: --max-unavailable must be a count or a percentage, is '101%'\n",
    )

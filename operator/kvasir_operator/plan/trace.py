"""PURE: the states of a rollout in which every wanted pod becomes ready, for printing."""

from collections.abc import Iterator
from typing import Any

import msgspec

from kvasir_operator.plan.rollout import (
    Goal,
    RevisionGroup,
    ScaleRevision,
    State,
    apply,
    capacity,
    done,
    floor,
    goal,
    next_step,
)

OLD, NEW = "old", "new"


class TracedState(msgspec.Struct, frozen=True):
    """A state of the trace: `steps` led to it; none at the beginning, or where pods became ready."""

    state: State
    steps: tuple[ScaleRevision, ...] = ()


class BadState(ValueError):
    """A state that cannot exist; the message is one sentence for the user."""


def beginning(prefill: int, decode: int, max_surge: int | str, max_unavailable: int | str) -> State:
    """All workers of one revision, and a wanted revision with another KV fingerprint."""
    wanted = [goal(NEW, NEW, n, max_surge, max_unavailable) for n in (prefill, decode)]
    return State(
        wanted[0],
        wanted[1],
        (RevisionGroup("prefill", OLD, OLD, prefill, prefill), RevisionGroup("decode", OLD, OLD, decode, decode)),
    )


def trace(state: State) -> Iterator[TracedState]:
    """`state` and all that follow it, to the end or until nothing more can be done."""
    yield TracedState(state)
    while True:
        if steps := next_step(state):
            state = apply(state, steps)
            yield TracedState(state, steps)
        ready = tuple(msgspec.structs.replace(g, ready=g.replicas) for g in state.groups)
        if ready == state.groups and not steps:
            return
        if ready != state.groups:
            state = msgspec.structs.replace(state, groups=ready)
            yield TracedState(state)


def parse_state(text: bytes) -> State:
    """A state as JSON, in the form that `document` gives. Raises BadState."""
    try:
        state = msgspec.json.decode(text, type=State)
    except msgspec.DecodeError as error:
        raise BadState(str(error)) from None
    names = [(g.role, g.revision) for g in state.groups]
    for name in names:
        if names.count(name) > 1:
            raise BadState(f"{name[0]} {name[1]!r} is there twice")
    if any(g.replicas < 0 or not 0 <= g.ready <= g.replicas for g in state.groups):
        raise BadState("ready must be from 0 to replicas")
    for wanted in (state.prefill, state.decode):
        if min(wanted.replicas, wanted.surge, wanted.unavailable) < 0 or not wanted.surge + wanted.unavailable:
            raise BadState("replicas, surge and unavailable must be at least 0, and the limits not both 0")
    if state.prefill.kv != state.decode.kv:
        raise BadState(f"prefill and decode cannot pair: their kv is {state.prefill.kv!r} and {state.decode.kv!r}")
    return state


def document(passed: list[TracedState]) -> dict[str, Any]:
    """The trace for machines."""
    states = [
        {
            "set": msgspec.to_builtins(each.steps),
            "pairedCapacity": round(float(capacity(each.state)), 4),
            "state": msgspec.to_builtins(each.state),
        }
        for each in passed
    ]
    return {"floor": round(float(floor(passed[0].state)), 4), "done": done(passed[-1].state), "states": states}


def table(passed: list[TracedState]) -> list[str]:
    """The trace for people: ready/replicas of every role and revision, a line a state."""
    names = sorted({(g.role, g.revision) for each in passed for g in each.state.groups}, key=_order(passed))
    heads = ["", *(f"{role} {revision}" for role, revision in names), "paired capacity"]
    rows = [heads]
    for each in passed:
        counts = {(g.role, g.revision): f"{g.ready}/{g.replicas}" for g in each.state.groups}
        what = "set" if each.steps else ("ready" if len(rows) > 1 else "start")
        rows.append([what, *(counts.get(name, "0/0") for name in names), f"{float(capacity(each.state)):.1%}"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    least = min(capacity(each.state) for each in passed)
    end = "done" if done(passed[-1].state) else "stuck: nothing can be done within these limits"
    steps = sum(bool(each.steps) for each in passed)
    return [*lines, f"{end}; steps {steps}, least {float(least):.1%}, floor {float(floor(passed[0].state)):.1%}"]


def _order(passed: list[TracedState]) -> Any:
    goals: dict[str, Goal] = {"prefill": passed[0].state.prefill, "decode": passed[0].state.decode}
    return lambda name: (name[0] != "prefill", name[1] == goals[name[0]].revision, name[1])

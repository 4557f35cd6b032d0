"""Every state that a rollout can get into, whatever becomes ready when and wherever the operator is cut off.

The adversary may let any one pending pod become ready, or let the operator take its step, or cut it off after any
of the step's writes, in any order and as often as it likes. That covers every readiness order and every delay of
the operator: both only choose a path through this graph. Pods that fail are another matter, see
`test_rollout_plan.py`.
"""

import itertools
from collections.abc import Callable, Iterable

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

Planner = Callable[[State], tuple[ScaleRevision, ...]]
Limits = tuple[int | str, int | str]
Key = tuple[tuple[str, str, str, int, int], ...]

LIMITS: list[Limits] = [*itertools.product((1, 2, "25%"), (0, 1, "25%")), (0, 1), (0, "25%")]


class Found(msgspec.Struct):
    """What a search found; `steps` are the edges of the graph."""

    states: int = 0
    least_margin: float = float("inf")
    over_surge: int = 0
    stuck: list[State] = []
    graph: dict[Key, list[Key]] = {}

    def cyclic(self) -> bool:
        """Whether a rollout could go round for ever."""
        incoming = dict.fromkeys(self.graph, 0)
        for after in self.graph.values():
            for key in after:
                incoming[key] += 1
        free, seen = [key for key, n in incoming.items() if not n], 0
        while free:
            seen += 1
            for key in self.graph[free.pop()]:
                incoming[key] -= 1
                if not incoming[key]:
                    free.append(key)
        return seen < len(self.graph)


def goals(prefill: int, decode: int, limits: Limits, name: str = "new", kv: str | None = None) -> tuple[Goal, Goal]:
    return goal(name, kv or name, prefill, *limits), goal(name, kv or name, decode, *limits)


def serving(prefill: int, decode: int, name: str = "old") -> tuple[RevisionGroup, ...]:
    return (
        RevisionGroup("prefill", name, name, prefill, prefill),
        RevisionGroup("decode", name, name, decode, decode),
    )


def key(state: State) -> Key:
    return tuple(sorted((g.role, g.revision, g.kv, g.replicas, g.ready) for g in state.groups if g.replicas))


def at(key: Key, wanted: tuple[Goal, Goal]) -> State:
    return State(*wanted, tuple(RevisionGroup(*each) for each in key))  # type: ignore[arg-type]


def ready_next(state: State) -> Iterable[State]:
    """The states that one more ready pod gives."""
    for i, group in enumerate(state.groups):
        if group.ready < group.replicas:
            more = msgspec.structs.replace(group, ready=group.ready + 1)
            yield msgspec.structs.replace(state, groups=(*state.groups[:i], more, *state.groups[i + 1 :]))


def search(starts: Iterable[State], planner: Planner = next_step) -> Found:
    """All that is reachable from `starts`, which share their goals."""
    found, todo = Found(), list(starts)
    seen = {key(state) for state in todo}
    while todo:
        state = todo.pop()
        steps, bound = planner(state), min(floor(state), capacity(state))
        after = [apply(state, steps[:n]) for n in range(1, len(steps) + 1)]
        for each in after:
            found.least_margin = min(found.least_margin, float(capacity(each) - bound))
            found.over_surge += _over_surge(state, each)
        after += ready_next(state)
        if not after and not done(state):
            found.stuck.append(state)
        keys = [key(each) for each in after]
        found.graph[key(state)] = keys
        for each_key in keys:
            if each_key not in seen:
                seen.add(each_key)
                todo.append(at(each_key, (state.prefill, state.decode)))
    found.states = len(seen)
    return found


def _over_surge(before: State, after: State) -> bool:
    """Whether a step asks for more than the surge allows; what was too much already may only shrink."""
    for role in ("prefill", "decode"):
        allowed = after.goal(role).replicas + after.goal(role).surge
        old, new = (sum(g.replicas for g in state.groups if g.role == role) for state in (before, after))
        if new > max(allowed, old):
            return True
    return False


def naive(state: State) -> tuple[ScaleRevision, ...]:
    """Each role by itself, as a Deployment rolls: the new grow as surge allows, the old shrink by what is ready."""
    steps = []
    for role in ("prefill", "decode"):
        wanted = state.goal(role)
        own = [g for g in state.groups if g.role == role]
        new = next((g for g in own if g.revision == wanted.revision), None)
        there = new.replicas if new else 0
        more = min(wanted.replicas - there, wanted.replicas + wanted.surge - sum(g.replicas for g in own))
        if more > 0:
            steps.append(ScaleRevision(role, wanted.revision, there + more))
        spare = sum(g.ready for g in own) - (wanted.replicas - wanted.unavailable)
        for group in own:
            if group.revision != wanted.revision and min(spare, group.replicas) > 0:
                steps.append(ScaleRevision(role, group.revision, group.replicas - min(spare, group.replicas)))
                spare -= group.replicas
    return tuple(steps)

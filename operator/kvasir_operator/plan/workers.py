"""PURE: what runs the workers, and the replicas that each revision of a role is to have next.

What is observed becomes the rollout planner's state, and its answer becomes steps. The replicas of a Deployment
that is there stay as they are unless the planner says otherwise; one of an old revision goes once it is empty. Of
workers over several nodes each is a set of its own (`sets.py`), so a revision has as many replicas as sets.
"""

from collections.abc import Collection, Sequence

from kvasir_operator.api import WORKER_ROLES, Rollout, WorkerRole
from kvasir_operator.plan import rollout
from kvasir_operator.plan.difference import differs, guarded, stamped, uid, version
from kvasir_operator.plan.observed import Observed, Reference, Workload, place_of, reference
from kvasir_operator.plan.rollout import Goal, RevisionGroup, State
from kvasir_operator.plan.sets import set_steps
from kvasir_operator.plan.steps import Apply, Delete, Scale, Step, Wait
from kvasir_operator.plan.wanted import Wanted, runs_pods, wanted
from kvasir_operator.render.names import Object

Key = tuple[WorkerRole, str]


def is_worker(item: Object) -> bool:
    """Whether this object runs workers."""
    return runs_pods(item) and place_of(item)[0] in WORKER_ROLES


def begins(desired: Sequence[Object], observed: Observed) -> bool:
    """Whether workers are wanted of a revision that has none yet."""
    for role in WORKER_ROLES:
        wants = wanted(desired, role)
        there = any(each.name == wants.name for each in observed.workloads(role))
        if not there and (wants.replicas or not wants.grouped):
            return True
    return False


def rollout_state(desired: Sequence[Object], observed: Observed, limits: Rollout) -> State:
    """The rollout planner's state: the wanted revisions, and the counts of all that exist."""
    groups = [
        RevisionGroup(role, each.revision, each.kv, each.wanted, observed.ready(each))
        for role in WORKER_ROLES
        for each in observed.workloads(role)
    ]
    return State(_goal(wanted(desired, "prefill"), limits), _goal(wanted(desired, "decode"), limits), tuple(groups))


def _goal(wants: Wanted, limits: Rollout) -> Goal:
    return rollout.goal(wants.revision, wants.kv, wants.replicas, limits.max_surge, limits.max_unavailable)


def worker_steps(desired: Sequence[Object], observed: Observed, limits: Rollout) -> list[Step]:
    """The next steps of the workers. `desired` has each wanted workload, with its final replicas."""
    state = rollout_state(desired, observed, limits)
    planned = {(step.role, step.revision): step.replicas for step in rollout.next_step(state)}
    live: dict[Key, Workload] = {}
    wants: dict[Key, Wanted] = {}
    for role in WORKER_ROLES:
        live |= {(role, each.revision): each for each in observed.workloads(role)}
        found = wanted(desired, role)
        wants[role, found.revision] = found
    grow: list[Step] = []
    shrink: list[Step] = [Delete(target, uid(item)) for target, item in sorted(observed.removing.items())]
    for key in (*wants, *(key for key in live if key not in wants)):
        before, want = live.get(key), wants.get(key)
        now = before.wanted if before else 0
        replicas = planned.get(key, now)
        steps = _steps(key, want, before, replicas, observed)
        fewer = replicas < now or any(isinstance(step, Delete) for step in steps)
        (shrink if fewer else grow).extend(steps)
    if not grow and not shrink and not _settled(state, wants):
        return [Wait(waits_for(state))]
    return [*grow, *shrink]


def _steps(key: Key, want: Wanted | None, live: Workload | None, replicas: int, observed: Observed) -> list[Step]:
    """The steps that bring one revision of a role to `replicas`, or update what it is made of."""
    if (want and want.grouped) or (live and live.grouped):
        return set_steps(key, want.items[0] if want else None, replicas, observed)
    if want:
        item = want.items[0]
        applied = stamped({**item, "spec": {**item["spec"], "replicas": replicas}})
        found = observed.objects.get(reference(item))
        return [Apply(guarded(applied, found))] if found is None or differs(applied, found) else []
    assert live is not None, "a revision is there, or is wanted"
    target = Reference("apps/v1", "Deployment", live.name)
    if replicas != live.wanted:
        return [Scale(target, replicas, version(observed.objects[target]))]
    return [Delete(target)] if live.empty else []


def progress(desired: Sequence[Object], observed: Observed, limits: Rollout) -> str:
    """What the workers' plan still waits for; empty when it is done."""
    state = rollout_state(desired, observed, limits)
    wants: set[Key] = {(role, wanted(desired, role).revision) for role in WORKER_ROLES}
    return "" if _settled(state, wants) else waits_for(state)


def paired_capacity(desired: Sequence[Object], observed: Observed, limits: Rollout) -> tuple[float, float]:
    """The present paired capacity, and the one below which no rollout goes."""
    state = rollout_state(desired, observed, limits)
    return float(rollout.capacity(state)), float(rollout.floor(state))


def waits_for(state: State) -> str:
    """What a rollout waits for that can do nothing now, with the capacity that it keeps meanwhile."""
    pending = [f"{g.role} {g.revision} has {g.ready} of {g.replicas} ready" for g in state.groups if _lacks(g)]
    kept = f"paired capacity {float(rollout.capacity(state)):.0%}, bound {float(rollout.floor(state)):.0%}"
    return f"{'; '.join(pending) or 'pods that leave'} ({kept})"


def _lacks(group: RevisionGroup) -> bool:
    return group.ready < group.replicas


def _settled(state: State, wants: Collection[Key]) -> bool:
    """Whether nothing is left to wait for."""
    others = any((group.role, group.revision) not in wants for group in state.groups)
    return not others and rollout.done(state) and not any(_lacks(group) for group in state.groups)

"""PURE: the worker Deployments, one a role and a revision, and the replicas that each is to have next.

What is observed becomes the rollout planner's state, and its answer becomes steps. The replicas of a Deployment
that is there stay as they are unless the planner says otherwise; one of an old revision goes once it is empty.
"""

from collections.abc import Sequence

from kvasir_operator.observed import Observed, Reference, reference
from kvasir_operator.plan import rollout
from kvasir_operator.plan.difference import differs, stamped
from kvasir_operator.plan.rollout import Goal, Group, State
from kvasir_operator.plan.steps import Apply, Delete, Scale, Step, Wait
from kvasir_operator.render.names import KV_LABEL, REVISION_LABEL, ROLE_LABEL, Object
from kvasir_operator.spec import WORKER_ROLES, Rollout, WorkerRole


def is_worker(item: Object) -> bool:
    """Whether this object is a Deployment of workers."""
    return item["kind"] == "Deployment" and item["metadata"]["labels"].get(ROLE_LABEL) in WORKER_ROLES


def rollout_state(desired: Sequence[Object], observed: Observed, limits: Rollout) -> State:
    """What the rollout planner is to know: the wanted revisions, and the counts of all that are there."""
    wanted = {item["metadata"]["labels"][ROLE_LABEL]: item for item in filter(is_worker, desired)}
    groups = [
        Group(role, each.revision, each.kv, each.wanted, observed.ready(each))
        for role in WORKER_ROLES
        for each in observed.deployments(role)
    ]
    return State(_goal(wanted["prefill"], limits), _goal(wanted["decode"], limits), tuple(groups))


def _goal(item: Object, limits: Rollout) -> Goal:
    own = item["metadata"]["labels"]
    replicas = item["spec"]["replicas"]
    return rollout.goal(own[REVISION_LABEL], own[KV_LABEL], replicas, limits.max_surge, limits.max_unavailable)


def worker_steps(desired: Sequence[Object], observed: Observed, limits: Rollout) -> list[Step]:
    """The next steps of the worker Deployments. `desired` has each wanted one, with the replicas to end with."""
    state = rollout_state(desired, observed, limits)
    planned = {(step.role, step.revision): step.replicas for step in rollout.next_step(state)}
    live = {(role, each.revision): each for role in WORKER_ROLES for each in observed.deployments(role)}
    grow: list[Step] = []
    shrink: list[Step] = []
    wanted = set()
    for item in filter(is_worker, desired):
        key = _key(item)
        wanted.add(key)
        before = live.get(key)
        replicas = planned.get(key, before.wanted if before else 0)
        applied = stamped({**item, "spec": {**item["spec"], "replicas": replicas}})
        found = observed.objects.get(reference(item))
        if found is None or differs(applied, found):
            steps = shrink if before is not None and replicas < before.wanted else grow
            steps.append(Apply(_guarded(applied, found)))
    for key, each in live.items():
        if key in wanted:
            continue
        target = Reference("apps/v1", "Deployment", each.name)
        replicas = planned.get(key, each.wanted)
        if replicas != each.wanted:
            steps = shrink if replicas < each.wanted else grow
            steps.append(Scale(target, replicas, _version(observed.objects[target])))
        elif each.empty:
            shrink.append(Delete(target))
    if not grow and not shrink and not _settled(state, wanted):
        return [Wait(waits_for(state))]
    return [*grow, *shrink]


def progress(desired: Sequence[Object], observed: Observed, limits: Rollout) -> str:
    """What the workers' plan still waits for; empty when all is as it should be."""
    state = rollout_state(desired, observed, limits)
    wanted = {_key(item) for item in filter(is_worker, desired)}
    return "" if _settled(state, wanted) else waits_for(state)


def waits_for(state: State) -> str:
    """What a rollout that can do nothing now waits for, with the capacity that is kept meanwhile."""
    pending = [f"{g.role} {g.revision} has {g.ready} of {g.replicas} ready" for g in state.groups if _lacks(g)]
    kept = f"paired capacity {float(rollout.capacity(state)):.0%}, bound {float(rollout.floor(state)):.0%}"
    return f"{'; '.join(pending) or 'pods that leave'} ({kept})"


def _lacks(group: Group) -> bool:
    return group.ready < group.replicas


def _settled(state: State, wanted: set[tuple[WorkerRole, str]]) -> bool:
    """Nothing is left to wait for."""
    others = any((group.role, group.revision) not in wanted for group in state.groups)
    return not others and rollout.done(state) and not any(_lacks(group) for group in state.groups)


def _key(item: Object) -> tuple[WorkerRole, str]:
    return item["metadata"]["labels"][ROLE_LABEL], item["metadata"]["labels"][REVISION_LABEL]


def _version(item: Object) -> str:
    return str(item["metadata"].get("resourceVersion", ""))


def _guarded(item: Object, live: Object | None) -> Object:
    """`item` with what its writer had seen of it: replicas that were planned from another state must not be set."""
    if live is None or not (version := _version(live)):
        return item
    return {**item, "metadata": {**item["metadata"], "resourceVersion": version}}

"""PURE: workers over several nodes, each a LeaderWorkerSet of one group, made and deleted by name.

What goes first is what a Deployment would give up first, on which the rollout planner counts: workers that are not
ready. Of those that are ready the newest goes, by its number, whatever it has to finish: it drains before it ends.
A name is free when no set has it and no pod of it is left, since a group's pods are named after their set: a new
worker would wait for one that drains.
"""

from itertools import count

from kvasir_operator.api import SET_API_VERSION, SET_KIND, WorkerRole
from kvasir_operator.plan.difference import differs, guarded, stamped, uid
from kvasir_operator.plan.observed import Observed, Reference, WorkerSet
from kvasir_operator.plan.steps import Apply, Delete, Step
from kvasir_operator.render.gang import VOLCANO_QUEUE
from kvasir_operator.render.groups import numbered
from kvasir_operator.render.names import Object


def set_steps(key: tuple[WorkerRole, str], item: Object | None, replicas: int, observed: Observed) -> list[Step]:
    """What brings the sets of a role's revision (`key`) to so many `replicas`.

    `item`: a set of that revision as it is wanted; `None` where another revision is.
    """
    role, revision = key
    sets = sorted((each for each in observed.sets(role) if each.revision == revision), key=deletion_order)
    excess = max(0, len(sets) - replicas)
    stays = sorted(sets[excess:], key=lambda s: s.number)
    steps: list[Step] = []
    for each in stays if item else ():
        live = observed.objects[_reference(each.name)]
        applied = _worker(item or live, each.number)
        if differs(applied, live):
            steps.append(Apply(guarded(applied, live)))
    if replicas > len(sets):
        pattern = item or _pattern(observed.objects[_reference(stays[0].name)])
        new = (_worker(pattern, number) for number in count())
        free = (each for each in new if each["metadata"]["name"] not in observed.taken)
        steps.extend(Apply(next(free)) for _ in range(replicas - len(sets)))
    return [*steps, *(_delete(each, observed) for each in sets[:excess])]


def deletion_order(each: WorkerSet) -> tuple[bool, int]:
    """The sort key of deletion: the set with the least key is deleted first."""
    return each.ready, -each.number


def _worker(item: Object, number: int) -> Object:
    found = numbered(item, number)
    return stamped({**found, "spec": {**found["spec"], "replicas": 1}})


def _pattern(live: Object) -> Object:
    """A set of a revision that is no longer wanted, as it was created."""
    kept = ("name", "namespace", "labels", "ownerReferences")
    metadata = {name: live["metadata"][name] for name in kept if name in live["metadata"]}
    annotations = live["metadata"].get("annotations", {})
    if VOLCANO_QUEUE in annotations:
        metadata["annotations"] = {VOLCANO_QUEUE: annotations[VOLCANO_QUEUE]}
    return {
        "apiVersion": live["apiVersion"],
        "kind": live["kind"],
        "metadata": metadata,
        "spec": {**live["spec"], "replicas": 1},
    }


def _delete(each: WorkerSet, observed: Observed) -> Delete:
    target = _reference(each.name)
    return Delete(target, uid(observed.objects[target]))


def _reference(name: str) -> Reference:
    return Reference(SET_API_VERSION, SET_KIND, name)

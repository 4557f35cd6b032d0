"""PURE: what is wanted and what there is in, the next steps out.

No step depends on what an earlier reconcile did or remembered, so a reconcile may be cut off after any step and the
next one goes on from what it then observes.

A worker Deployment is one revision of one role. A new revision is created beside the old ones, and they are deleted
once every role's new revision has all its pods ready; until then they serve at full size.
"""

from collections.abc import Sequence

import msgspec

from kvasir_operator.observed import Observed, Reference, reference
from kvasir_operator.plan.difference import differs, stamped
from kvasir_operator.render.names import REVISION_LABEL, ROLE_LABEL, Object, Role
from kvasir_operator.spec import WORKER_ROLES

__all__ = ["Apply", "Delete", "Step", "Wait", "plan", "stamped"]


class Apply(msgspec.Struct, frozen=True, tag=True):
    """Server-side apply this object, whole."""

    object: Object


class Delete(msgspec.Struct, frozen=True, tag=True):
    """Delete an object that is no longer wanted."""

    target: Reference


class Wait(msgspec.Struct, frozen=True, tag=True):
    """Nothing can be done before this changes."""

    reason: str


Step = Apply | Delete | Wait


def plan(desired: Sequence[Object], observed: Observed) -> list[Step]:
    """The steps from what is observed towards `desired`, in order; none when all is as it should be."""
    steps: list[Step] = []
    for item in map(stamped, desired):
        live = observed.objects.get(reference(item))
        if live is None or differs(item, live):
            steps.append(Apply(item))
    wanted = {reference(item) for item in desired}
    surplus = [target for target in sorted(observed.objects) if target not in wanted]
    old_workers = [target for target in surplus if _is_worker(observed.objects[target])]
    steps.extend(Delete(target) for target in surplus if target not in old_workers)
    missing = _incomplete(desired, observed) if old_workers else []
    if missing:
        steps.append(Wait(f"{', '.join(map(str, old_workers))} stays until {' and '.join(missing)}"))
    else:
        steps.extend(Delete(target) for target in old_workers)
    return steps


def _is_worker(item: Object) -> bool:
    return item["kind"] == "Deployment" and item["metadata"]["labels"].get(ROLE_LABEL) in WORKER_ROLES


def _incomplete(desired: Sequence[Object], observed: Observed) -> list[str]:
    """What the wanted worker Deployments still lack."""
    missing = []
    for item in filter(_is_worker, desired):
        name, wanted = item["metadata"]["name"], item["spec"]["replicas"]
        role: Role = item["metadata"]["labels"][ROLE_LABEL]
        state = next((d for d in observed.deployments(role) if d.name == name), None)
        if state is None or not state.complete or state.wanted != wanted:
            revision = item["metadata"]["labels"][REVISION_LABEL]
            ready = state.ready if state else 0
            missing.append(f"{role} revision {revision} has {wanted} ready, now {ready}")
    return missing

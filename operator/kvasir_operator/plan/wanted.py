"""PURE: the wanted workers of a role, read from the desired objects: one Deployment, or a set for each worker."""

from collections.abc import Sequence

import msgspec

from kvasir_operator.api import SET_KIND
from kvasir_operator.plan.observed import Reference, reference, workload_name
from kvasir_operator.render.names import KV_LABEL, REVISION_LABEL, ROLE_LABEL, Object, Role

_KINDS = ("Deployment", SET_KIND)


class Wanted(msgspec.Struct, frozen=True):
    """So many `replicas` of a revision of a role. `name` is that of the workload (`observed.Workload`).

    `items`: the Deployment; or sets of which each is one worker, and of which the first is there in any case.
    """

    role: Role
    revision: str
    kv: str
    replicas: int
    name: str
    grouped: bool
    items: tuple[Object, ...]


def runs_pods(item: Object) -> bool:
    """Whether this object runs pods of a role."""
    return item["kind"] in _KINDS


def wanted(desired: Sequence[Object], role: Role) -> Wanted:
    """The wanted workers of `role` in `desired`."""
    items = tuple(o for o in desired if runs_pods(o) and o["metadata"]["labels"][ROLE_LABEL] == role)
    first = items[0]
    grouped = first["kind"] == SET_KIND
    # The router's Deployment has its revision on its pods alone: it keeps its name.
    own = first["metadata"]["labels"] if grouped else first["spec"]["template"]["metadata"]["labels"]
    return Wanted(
        role=role,
        revision=own[REVISION_LABEL],
        kv=own.get(KV_LABEL, ""),
        replicas=sum(o["spec"]["replicas"] for o in items),
        name=workload_name(reference(first)),
        grouped=grouped,
        items=items,
    )


def role_of(target: Reference, desired: Sequence[Object]) -> str:
    """The role of which an object is a part, empty where it is none of what is desired.

    Sets have whatever numbers are free, so one belongs where another of its workload does.
    """
    for item in desired:
        at = reference(item)
        if at == target or (at.kind == target.kind == SET_KIND and workload_name(at) == workload_name(target)):
            found: str = item["metadata"]["labels"][ROLE_LABEL]
            return found
    return ""

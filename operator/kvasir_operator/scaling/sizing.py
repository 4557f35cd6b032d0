"""PURE: the size of each role that an autoscaler sets, read from the InferenceRoles."""

import msgspec

from kvasir_operator.api import API_VERSION, ROLE_KIND, WORKER_ROLES, InferenceService
from kvasir_operator.plan.observed import Observed, Reference
from kvasir_operator.plan.steps import ReportReplicas, Scale, Step


class Sizing(msgspec.Struct, frozen=True):
    """`service` with the replicas of its roles, and the steps that bring the InferenceRoles up to date."""

    service: InferenceService
    steps: tuple[Step, ...] = ()


def sized(service: InferenceService, observed: Observed) -> Sizing:
    """Takes the sizes from the InferenceRoles. One without a size gets the spec's replicas."""
    if service.spec.scaling.mode != "External":
        return Sizing(service)
    spec, steps = service.spec, list[Step]()
    for role in WORKER_ROLES:
        target = Reference(API_VERSION, ROLE_KIND, f"{service.name}-{role}")
        if (found := observed.objects.get(target)) is None:
            continue  # it is made first
        workers, replicas = spec.workers(role), found["spec"].get("replicas")
        if replicas is None:
            steps.append(Scale(target, workers.replicas, found["metadata"].get("resourceVersion", "")))
        else:
            spec = msgspec.structs.replace(spec, **{role: msgspec.structs.replace(workers, replicas=replicas)})
        ready = sum(each.ready for each in observed.workloads(role))
        if found.get("status", {}).get("replicas") != ready:
            steps.append(ReportReplicas(target, ready))
    return Sizing(msgspec.structs.replace(service, spec=spec), tuple(steps))

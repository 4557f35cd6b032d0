"""The InferenceRoles: the sizes of roles as objects with /scale, where an autoscaler sets them."""

from kvasir_operator.api import API_VERSION, ROLE_KIND, WORKER_ROLES, InferenceService, WorkerRole
from kvasir_operator.render.names import (
    INDEX_LABEL,
    LEADER_INDEX,
    Object,
    labels,
    metadata,
    role_name,
    selector,
)


def _counted(service: InferenceService, role: WorkerRole) -> dict[str, str]:
    """The labels of one pod a worker, as an autoscaler divides by how many pods it finds."""
    grouped = service.spec.workers(role).nodes > 1
    return {**selector(service, role), **({INDEX_LABEL: LEADER_INDEX} if grouped else {})}


def inference_roles(service: InferenceService) -> list[Object]:
    """One a role; none where the spec has the replicas. They are without replicas: those are others' to set."""
    if service.spec.scaling.mode != "External":
        return []
    return [
        {
            "apiVersion": API_VERSION,
            "kind": ROLE_KIND,
            "metadata": metadata(service, role_name(service, role), labels(service, role)),
            "spec": {"selector": ",".join(f"{key}={value}" for key, value in _counted(service, role).items())},
        }
        for role in WORKER_ROLES
    ]

"""Names, labels and metadata of what belongs to an InferenceService."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Literal, Self, get_args

import msgspec

from kvasir_operator.api import API_VERSION, GROUP, KIND, InferenceService, WorkerRole

Object = dict[str, Any]
Role = Literal["prefill", "decode", "router"]
ROLES: tuple[Role, ...] = get_args(Role)

SERVICE_LABEL = f"{GROUP}/inferenceservice"
ROLE_LABEL = f"{GROUP}/role"
REVISION_LABEL = f"{GROUP}/revision"
KV_LABEL = f"{GROUP}/kv"
# What LeaderWorkerSet labels every pod of a group with: its set, and its place in the group, "0" for the leader.
SET_LABEL = "leaderworkerset.sigs.k8s.io/name"
INDEX_LABEL = "leaderworkerset.sigs.k8s.io/worker-index"
LEADER_INDEX = "0"
# "true" on an InferenceService: nothing of it is changed; its status is still written.
PAUSED = f"{GROUP}/paused"
# On an InferenceService: any other text than before asks for new certificates of its pods.
CERTIFICATES = f"{GROUP}/renew-certificates"
MANAGED_BY = {"app.kubernetes.io/managed-by": "kvasir-operator"}
REVISION_LENGTH = 8


class OwningService(msgspec.Struct, frozen=True):
    """An InferenceService as owner of objects, whatever its spec says."""

    name: str
    namespace: str
    uid: str = ""

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Self:
        """The owner of the objects of a stored InferenceService."""
        found = document["metadata"]
        return cls(found["name"], found["namespace"], found.get("uid", ""))


def labels(service: InferenceService | OwningService, role: Role | Literal["preload"]) -> dict[str, str]:
    """The labels on every object of `role`, or of the Job that loads the model."""
    return {
        "app.kubernetes.io/name": "kvasir",
        "app.kubernetes.io/instance": service.name,
        "app.kubernetes.io/component": role,
        **MANAGED_BY,
        SERVICE_LABEL: service.name,
        ROLE_LABEL: role,
    }


def selector(service: InferenceService, role: Role | Literal["preload"]) -> dict[str, str]:
    """The labels by which pods of `role` are found. A Deployment's selector cannot change, so these never do."""
    return {SERVICE_LABEL: service.name, ROLE_LABEL: role}


def workers_of(service: InferenceService) -> Object:
    """The label selector of all workers, as an object."""
    roles = {"key": ROLE_LABEL, "operator": "In", "values": ["prefill", "decode"]}
    return {"matchLabels": {SERVICE_LABEL: service.name}, "matchExpressions": [roles]}


def worker_selector(service: InferenceService) -> str:
    """The label selector by which the router finds its workers' pods."""
    return f"{SERVICE_LABEL}={service.name},{ROLE_LABEL} in (prefill,decode)"


def router_name(service: InferenceService) -> str:
    """The name of the router's Deployment, Service and the rest."""
    return role_name(service, "router")


def role_name(service: InferenceService, role: Role) -> str:
    """The name of the objects that a role has once: account, disruption budget, NetworkPolicy."""
    return f"{service.name}-{role}"


def worker_name(service: InferenceService, role: WorkerRole, revision: str) -> str:
    """The name of the Deployment of `role` at `revision`."""
    return f"{service.name}-{role}-{revision}"


def set_name(service: InferenceService, role: WorkerRole, revision: str, number: int) -> str:
    """The name of the LeaderWorkerSet of one worker over several nodes."""
    return f"{worker_name(service, role, revision)}-{number}"


def tls_secret_name(service: InferenceService | OwningService, role: Role) -> str:
    """The Secret with the certificates of a role.

    The operator reads no Secret, so it cannot see whose one of that name is before it writes it. The name has a
    part of the uid, which the API server chooses: nobody can aim it at a Secret that is there.
    """
    ending = hashlib.sha256(service.uid.encode()).hexdigest()[:REVISION_LENGTH] if service.uid else ""
    return "-".join(filter(None, (service.name, role, "tls", ending)))


def ownerless(service: InferenceService) -> InferenceService:
    """The service as a manifest has it, from which the revision of its pods is computed."""
    return msgspec.structs.replace(service, uid="")


def metadata(service: InferenceService | OwningService, name: str, own_labels: Mapping[str, str]) -> Object:
    """Metadata of an object of `service`. Where the service has a uid, its deletion takes the object along."""
    result: Object = {"name": name, "namespace": service.namespace, "labels": dict(own_labels)}
    if service.uid:
        result["ownerReferences"] = [
            {
                "apiVersion": API_VERSION,
                "kind": KIND,
                "name": service.name,
                "uid": service.uid,
                "controller": True,  # without blockOwnerDeletion, which would ask for a right to finalizers
            }
        ]
    return result


def revision_of(template: Mapping[str, Any]) -> str:
    """A name for a pod template: equal templates have equal revisions, whatever the order of their fields."""
    text = json.dumps(template, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    # A DNS label may not end in a dash and reads better without vowels that spell words: hex does both.
    return hashlib.sha256(text.encode()).hexdigest()[:REVISION_LENGTH]

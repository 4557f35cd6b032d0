"""The LeaderWorkerSet resource: names, subresources and defaults of `leaderworkerset.x-k8s.io/v1`.

Pod templates are stored as they come, where the real definition has all of a pod's schema.
"""

from typing import Any

from e2e import steps
from e2e.controlplane.cluster import Cluster
from kvasir_operator.api.kinds import SET_API_VERSION, SET_KIND, SET_PLURAL

_GROUP, _VERSION = SET_API_VERSION.split("/")
NAME = f"{SET_PLURAL}.{_GROUP}"
_NUMBER = {"type": "integer", "format": "int32"}
_TEMPLATE = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties}


def _one_of(*values: str) -> dict[str, Any]:
    return {"type": "string", "enum": list(values), "default": values[0]}


_GROUP_TEMPLATE = {
    **_object(
        leaderTemplate=_TEMPLATE,
        workerTemplate=_TEMPLATE,
        size={**_NUMBER, "default": 1, "minimum": 1},
        restartPolicy=_one_of("RecreateGroupOnPodRestart", "Default", "None"),
        subGroupPolicy=_TEMPLATE,
    ),
    "required": ["workerTemplate"],
}
_CONDITION = _object(
    type={"type": "string"},
    status={"type": "string"},
    reason={"type": "string"},
    message={"type": "string"},
    lastTransitionTime={"type": "string", "format": "date-time"},
)
_SCHEMA = _object(
    spec={
        **_object(
            replicas={**_NUMBER, "default": 1, "minimum": 0},
            leaderWorkerTemplate=_GROUP_TEMPLATE,
            startupPolicy=_one_of("LeaderCreated", "LeaderReady"),
            rolloutStrategy=_TEMPLATE,
            networkConfig=_object(subdomainPolicy={"type": "string", "enum": ["Shared", "UniquePerReplica"]}),
        ),
        "required": ["leaderWorkerTemplate"],
    },
    status=_object(
        conditions={"type": "array", "items": _CONDITION},
        hpaPodSelector={"type": "string"},
        readyReplicas=_NUMBER,
        updatedReplicas=_NUMBER,
        replicas=_NUMBER,
    ),
)


def definition() -> dict[str, Any]:
    """The CustomResourceDefinition."""
    scale = {
        "specReplicasPath": ".spec.replicas",
        "statusReplicasPath": ".status.replicas",
        "labelSelectorPath": ".status.hpaPodSelector",
    }
    version = {
        "name": _VERSION,
        "served": True,
        "storage": True,
        "schema": {"openAPIV3Schema": _SCHEMA},
        "subresources": {"status": {}, "scale": scale},
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {
            "name": NAME,
            "annotations": {"api-approved.kubernetes.io": "unapproved, a stand-in of a test"},
        },
        "spec": {
            "group": _GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": SET_KIND,
                "plural": SET_PLURAL,
                "singular": SET_KIND.lower(),
                "shortNames": ["lws"],
            },
            "versions": [version],
        },
    }


def define(cluster: Cluster) -> None:
    """Have the API server serve LeaderWorkerSets; returns when it does."""
    steps.apply(cluster, definition())
    cluster.kubectl("wait", "crd", NAME, "--for=condition=Established", "--timeout=120s")


def undefine(cluster: Cluster) -> None:
    """Take the resource away, and every LeaderWorkerSet with it."""
    cluster.kubectl("delete", "crd", NAME, "--timeout=120s")

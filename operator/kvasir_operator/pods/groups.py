"""PURE: the pods of a LeaderWorkerSet's groups, as its own controller and webhook create them.

For where that controller does not run: on a laptop under `kvasir up`, and in the end-to-end tests. The rules are
those of kubernetes-sigs/lws (`pkg/controllers`, `pkg/webhooks/pod_webhook.go`, `pkg/utils/pod`), for API version
`leaderworkerset.x-k8s.io/v1`. There two StatefulSets stand between the objects (the set owns one of leaders; each
leader owns one of its workers). Here the set owns the leaders, and a leader owns its workers, so a deletion removes
the same pods in the same order.
"""

import copy
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from kvasir_operator.render.names import INDEX_LABEL, SET_LABEL, Object

_LABELS = "leaderworkerset.sigs.k8s.io"
GROUP_LABEL = f"{_LABELS}/group-index"
KEY_LABEL = f"{_LABELS}/group-key"
REVISION_LABEL = f"{_LABELS}/template-revision-hash"
SIZE_ANNOTATION = f"{_LABELS}/size"
LEADER_ANNOTATION = f"{_LABELS}/leader-name"

LEADER_ADDRESS = "LWS_LEADER_ADDRESS"
GROUP_SIZE = "LWS_GROUP_SIZE"
WORKER_INDEX = "LWS_WORKER_INDEX"

_REVISION_LENGTH = 10


class GroupError(Exception):
    """The set has a field that is not supported here; the message names it."""


def check(item: Mapping[str, Any]) -> None:
    """Raise GroupError for fields that change the pods in a way that is not supported here."""
    spec, meta = item["spec"], item["metadata"]
    template = spec["leaderWorkerTemplate"]
    for field in ("subGroupPolicy", "volumeClaimTemplates"):
        if template.get(field):
            raise GroupError(f"spec.leaderWorkerTemplate.{field} is not done here")
    if (policy := template.get("restartPolicy") or "RecreateGroupOnPodRestart") != "RecreateGroupOnPodRestart":
        raise GroupError(f"spec.leaderWorkerTemplate.restartPolicy {policy} is not done here")
    if (policy := spec.get("startupPolicy") or "LeaderCreated") != "LeaderCreated":
        raise GroupError(f"spec.startupPolicy {policy} is not done here")
    if (policy := (spec.get("networkConfig") or {}).get("subdomainPolicy") or "Shared") != "Shared":
        raise GroupError(f"spec.networkConfig.subdomainPolicy {policy} is not done here")
    for name in meta.get("annotations") or {}:
        if name.startswith(_LABELS) and name.endswith("exclusive-topology"):
            raise GroupError(f"metadata.annotations: {name} is not done here")


def replicas(item: Mapping[str, Any]) -> int:
    """The number of groups."""
    return int(item["spec"].get("replicas", 1))


def size(item: Mapping[str, Any]) -> int:
    """The number of pods in a group, its leader included."""
    return int(item["spec"]["leaderWorkerTemplate"].get("size", 1))


def revision(item: Mapping[str, Any]) -> str:
    """The value of REVISION_LABEL of pods that are created from the set's present templates."""
    text = json.dumps(item["spec"]["leaderWorkerTemplate"], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:_REVISION_LENGTH]


def leader_name(item: Mapping[str, Any], group: int) -> str:
    """The name of a group's leader, which is also the name of the group."""
    return f"{item['metadata']['name']}-{group}"


def pods(item: Mapping[str, Any], group: int) -> list[Object]:
    """The pods of one group: its leader, owned by the set, and its workers in order, without an owner yet.

    A worker's owner is the leader's pod (`owned_by`), which has a uid only once it exists. Raises GroupError.
    """
    check(item)
    leader = owned_by(_pod(item, group, 0), item)
    return [leader, *(_pod(item, group, index) for index in range(1, size(item)))]


def owned_by(pod: Mapping[str, Any], owner: Mapping[str, Any]) -> Object:
    """The pod with `owner` as its controller; unchanged if `owner` has no uid."""
    if not (uid := owner["metadata"].get("uid")):
        return dict(pod)
    reference = {
        "apiVersion": owner["apiVersion"],
        "kind": owner["kind"],
        "name": owner["metadata"]["name"],
        "uid": uid,
        "controller": True,
        "blockOwnerDeletion": True,
    }
    return {**pod, "metadata": {**pod["metadata"], "ownerReferences": [reference]}}


def _pod(item: Mapping[str, Any], group: int, index: int) -> Object:
    meta, templates = item["metadata"], item["spec"]["leaderWorkerTemplate"]
    name, namespace = meta["name"], meta.get("namespace") or "default"
    leader = leader_name(item, group)
    template = (not index and templates.get("leaderTemplate")) or templates["workerTemplate"]
    theirs, spec = template.get("metadata") or {}, copy.deepcopy(template["spec"])
    labels = {
        SET_LABEL: name,
        GROUP_LABEL: str(group),
        INDEX_LABEL: str(index),
        KEY_LABEL: hashlib.sha1(f"{namespace}/{leader}".encode(), usedforsecurity=False).hexdigest(),
        REVISION_LABEL: revision(item),
    }
    annotations = {SIZE_ANNOTATION: str(size(item)), **({LEADER_ANNOTATION: leader} if index else {})}
    pod = f"{leader}-{index}" if index else leader
    # A headless Service of the set's name publishes the pods, ready or not.
    spec |= {"hostname": pod, "subdomain": name}
    variables = {
        LEADER_ADDRESS: f"{leader}.{name}.{namespace}",
        GROUP_SIZE: str(size(item)),
        WORKER_INDEX: str(index),
    }
    for container in [*spec["containers"], *(spec.get("initContainers") or ())]:
        # First, so that the container's own variables may refer to them; its own of the same names give way.
        own = [entry for entry in container.get("env") or () if entry["name"] not in variables]
        container["env"] = [*({"name": key, "value": value} for key, value in variables.items()), *own]
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": pod,
            "namespace": namespace,
            "labels": {**(theirs.get("labels") or {}), **labels},
            "annotations": {**(theirs.get("annotations") or {}), **annotations},
        },
        "spec": spec,
    }


def service(item: Mapping[str, Any]) -> Object:
    """The headless Service that gives the set's pods their names, owned by the set."""
    meta = item["metadata"]
    made = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": meta["name"], "namespace": meta.get("namespace") or "default"},
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": {SET_LABEL: meta["name"]},
        },
    }
    return owned_by(made, item)

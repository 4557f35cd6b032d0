"""Workers over several nodes: a LeaderWorkerSet of one group for each worker.

One set of many groups would not do: its groups are ordinals of a StatefulSet, which gives up the highest first,
ready or not, while a rollout counts on those that are not ready going first.

A group's pods run the same command. LeaderWorkerSet puts their places and the leader's address into every
container's environment, from where Kubernetes puts them into the arguments. Rank 0 is in the leader: it alone is a
worker to routers, which look for the port `http`, and it alone drains.
"""

import copy
from collections.abc import Mapping
from typing import Any

from kvasir_operator.api import SET_API_VERSION, SET_KIND, InferenceService, WorkerRole
from kvasir_operator.api.kv_fingerprint import fingerprint
from kvasir_operator.render.gang import place_pods, place_set, queued
from kvasir_operator.render.merge import merged
from kvasir_operator.render.names import (
    KV_LABEL,
    REVISION_LABEL,
    Object,
    labels,
    metadata,
    ownerless,
    revision_of,
    set_name,
)
from kvasir_operator.render.options import Options
from kvasir_operator.render.placement import gather
from kvasir_operator.render.pod import PORT
from kvasir_operator.render.workers import rendered_template

RANKS_PORT = 5557
PROBE_PORT_NAME = "probe"
# Followers are told to go no later than their leader, which drains; they end when it closes.
FOLLOWER_GRACE_SECONDS = 30
_PROBES = ("startupProbe", "readinessProbe", "livenessProbe")


def worker_sets(service: InferenceService, role: WorkerRole, options: Options) -> list[Object]:
    """The LeaderWorkerSets of `role`, numbered from 0: one a worker.

    Where no worker is wanted there is one of no groups, which says what a worker would be.
    """
    replicas = service.spec.workers(role).replicas
    first = _first_set(service, role, options)
    first["spec"]["replicas"] = min(1, replicas)
    return [first, *(numbered(first, number) for number in range(1, replicas))]


def numbered(item: Object, number: int) -> Object:
    """The set `item` as another worker of the same revision."""
    before: str = item["metadata"]["name"]
    found: Object = _renamed(item, before, f"{before.rpartition('-')[0]}-{number}")
    return found


def _renamed(value: Any, before: str, after: str) -> Any:
    if isinstance(value, Mapping):
        return {key: _renamed(each, before, after) for key, each in value.items()}
    if isinstance(value, list):
        return [_renamed(each, before, after) for each in value]
    return after if value == before else value


def _first_set(service: InferenceService, role: WorkerRole, options: Options) -> Object:
    # The set's name is in its pods' preferences; which of the workers it is must not be in the revision.
    revision = revision_of({**_group(ownerless(service), role, options, ""), **queued(service)})
    name = set_name(service, role, revision, 0)
    group = _group(service, role, options, name)
    own_labels = {REVISION_LABEL: revision, KV_LABEL: fingerprint(service.spec, role)}
    for template in ("leaderTemplate", "workerTemplate"):
        group[template]["metadata"]["labels"].update(own_labels)
    described = metadata(service, name, {**labels(service, role), **own_labels})
    place_set(service, described)
    return {
        "apiVersion": SET_API_VERSION,
        "kind": SET_KIND,
        "metadata": described,
        "spec": {"replicas": 1, "startupPolicy": "LeaderCreated", "leaderWorkerTemplate": group},
    }


def _group(service: InferenceService, role: WorkerRole, options: Options, name: str) -> Object:
    """The group of the set `name`, its templates without their revision."""
    workers = service.spec.workers(role)
    leader = _rendered(service, role, options, name)
    follower = copy.deepcopy(leader)
    _lead(leader)
    _follow(follower)
    leader, follower = merged(leader, workers), merged(follower, workers)
    grace = leader["spec"]["terminationGracePeriodSeconds"]
    if isinstance(grace, int):  # which the API server insists on
        follower["spec"]["terminationGracePeriodSeconds"] = grace + FOLLOWER_GRACE_SECONDS
    return {
        "size": workers.nodes,
        "restartPolicy": "RecreateGroupOnPodRestart",  # ranks do not come back one by one
        "leaderTemplate": leader,
        "workerTemplate": follower,
    }


def _rendered(service: InferenceService, role: WorkerRole, options: Options, name: str) -> Object:
    args = [
        "--nnodes",
        str(service.spec.workers(role).nodes),
        "--node-rank",
        "$(LWS_WORKER_INDEX)",
        "--dist-init-addr",
        f"$(LWS_LEADER_ADDRESS):{RANKS_PORT}",
    ]
    template = rendered_template(service, role, options, args)
    gather(service, name, template["spec"])
    place_pods(service, template)
    return template


def _lead(template: Object) -> None:
    (main,) = template["spec"]["containers"]
    main["ports"].append({"name": "ranks", "containerPort": RANKS_PORT, "protocol": "TCP"})


def _follow(template: Object) -> None:
    """A follower answers probes only: it has no metrics, takes no requests, and does not drain."""
    (main,) = template["spec"]["containers"]
    del template["metadata"]["annotations"], main["lifecycle"]
    main["ports"] = [{"name": PROBE_PORT_NAME, "containerPort": PORT, "protocol": "TCP"}]
    for probe in _PROBES:
        main[probe]["httpGet"]["port"] = PROBE_PORT_NAME

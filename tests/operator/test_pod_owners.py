"""Which pods are asked anything: those that are followed to what the service owns, whatever their labels say."""

from typing import Any

import pytest
from isvc_cases import FakeCluster, document

from kvasir_operator.cluster.interface import ClusterError
from kvasir_operator.plan.observed import Reference, observe
from kvasir_operator.reconcile.pod_owners import PodOwners
from kvasir_operator.render.names import Object

LABELS = {"serving.kvasir.dev/inferenceservice": "llama", "serving.kvasir.dev/role": "router"}


def owner(kind: str, name: str, uid: str, version: str = "apps/v1", controller: bool = True) -> list[Object]:
    return [{"apiVersion": version, "kind": kind, "name": name, "uid": uid, "controller": controller}]


OURS = owner("ReplicaSet", "llama-router-1", "uid-rs")
OWNED = [
    {"metadata": {"uid": "uid-deployment"}},
    {"metadata": {"uid": "uid-set"}},
    {"metadata": {"uid": "uid-job"}},
]


def pod(owners: list[Object], **labels: str) -> Object:
    metadata = {"name": "p", "labels": {**LABELS, **labels}, "ownerReferences": owners}
    return {"metadata": metadata, "status": {"podIP": "10.0.0.1"}}


def cluster() -> FakeCluster:
    found = FakeCluster(document())
    found.controllers = {
        ("llama-router-1", "uid-rs"): "uid-deployment",
        ("llama-router-2", "uid-other"): "uid-somebody",
        ("llama-router-3-0", "uid-sts"): "uid-set",
    }
    return found


def address(cluster: FakeCluster, item: Object) -> str:
    found = PodOwners(cluster).without_foreign_addresses("default", "uid-service", [item], OWNED)
    (state,) = observe([], found).pods
    return state.ip


@pytest.mark.parametrize(
    "owners",
    [
        OURS,
        owner("StatefulSet", "llama-router-3-0", "uid-sts"),
        owner("Job", "llama-router-x", "uid-job", "batch/v1"),
    ],
)
def test_a_services_own_pods_are_asked(owners: list[Object]) -> None:
    assert address(cluster(), pod(owners)) == "10.0.0.1"


@pytest.mark.parametrize(
    "owners",
    [
        [],
        owner("ReplicaSet", "llama-router-1", "uid-forged"),
        owner("ReplicaSet", "llama-router-2", "uid-other"),
        owner("ReplicaSet", "llama-router-9", "uid-rs"),
        owner("ReplicaSet", "llama-router-1", "uid-rs", controller=False),
        owner("ReplicaSet", "llama-router-1", "uid-rs", "example.org/v1"),
        owner("Job", "llama-router-x", "uid-other-job", "batch/v1"),
        owner("DaemonSet", "llama-router-1", "uid-rs"),
    ],
)
def test_a_pod_that_only_says_so_is_counted_and_not_asked(owners: list[Object]) -> None:
    assert address(cluster(), pod(owners)) == ""


def test_a_controller_is_asked_for_once_and_one_that_is_late_again() -> None:
    found, pods = cluster(), [pod(OURS), pod(OURS)]
    owners = PodOwners(found)
    late = pod(owner("ReplicaSet", "llama-router-4", "uid-late"))
    for _ in range(2):
        owners.without_foreign_addresses("default", "uid-service", [*pods, late], OWNED)
    assert found.calls.count("owner of ReplicaSet llama-router-1") == 1
    assert found.calls.count("owner of ReplicaSet llama-router-4") == 2


def test_what_is_no_address_costs_no_question() -> None:
    found = cluster()
    waiting = pod(owner("ReplicaSet", "llama-router-1", "uid-rs"))
    waiting["status"] = {}
    PodOwners(found).without_foreign_addresses(
        "default", "uid-service", [waiting, pod([]), pod(owner("ReplicaSet", "other-1", "u"))], OWNED
    )
    assert found.calls == []


def test_an_api_server_that_does_not_answer_says_nothing_about_a_pod() -> None:
    found: Any = cluster()

    def away(namespace: str, target: Reference, uid: str) -> str:
        raise ClusterError(0, "away")

    found.controller_uid = away
    with pytest.raises(ClusterError, match="away"):
        PodOwners(found).without_foreign_addresses("default", "uid-service", [pod(OURS)], OWNED)


def test_pods_of_what_was_deleted_since_are_still_asked_and_by_nobody_else() -> None:
    owners, item = PodOwners(cluster()), pod(OURS)
    owners.without_foreign_addresses("default", "uid-service", [item], OWNED)
    (leaving,) = owners.without_foreign_addresses("default", "uid-service", [item], OWNED[1:])
    assert leaving["status"]["podIP"] == "10.0.0.1"
    (foreign,) = owners.without_foreign_addresses("default", "uid-another", [item], OWNED[1:])
    assert foreign["status"]["podIP"] == ""
    (unknown,) = PodOwners(cluster()).without_foreign_addresses("default", "uid-service", [item], OWNED[1:])
    assert unknown["status"]["podIP"] == ""

"""Sizes left to others: InferenceRoles begin with the spec's replicas, and are followed from then on."""

from datetime import UTC, datetime

from isvc_cases import FakeCluster, deployments, document

from kvasir_operator.api import API_VERSION, ROLE_KIND
from kvasir_operator.plan.observed import Reference
from kvasir_operator.reconcile.reconciler import Reconciler
from kvasir_operator.render import Options

DECODE = Reference(API_VERSION, ROLE_KIND, "llama-decode")
PREFILL = Reference(API_VERSION, ROLE_KIND, "llama-prefill")


def started(mode: str = "External") -> tuple[FakeCluster, Reconciler]:
    cluster = FakeCluster(document(prefill={"replicas": 2}, decode={"replicas": 3}, scaling={"mode": mode}))
    operator = Reconciler(cluster, Options(), lambda model: None, lambda: datetime(2026, 1, 1, tzinfo=UTC))
    settle(cluster, operator)
    return cluster, operator


def settle(cluster: FakeCluster, operator: Reconciler) -> None:
    for _ in range(6):
        operator.reconcile("default", "llama")
        cluster.settle()
    cluster.calls.clear()
    operator.reconcile("default", "llama")
    assert cluster.calls == [], "all is well, so nothing is written"


def ask(cluster: FakeCluster, target: Reference, replicas: int) -> None:
    """What `kubectl scale` does."""
    role = cluster.objects[target]
    cluster.objects[target] = {**role, "spec": {**role["spec"], "replicas": replicas}}


def replicas(cluster: FakeCluster) -> tuple[int, int]:
    found = deployments(list(cluster.objects.values()))
    return found["prefill"]["spec"]["replicas"], found["decode"]["spec"]["replicas"]


def test_roles_begin_with_the_replicas_of_the_spec_and_tell_how_many_are_ready() -> None:
    cluster, _ = started()
    assert replicas(cluster) == (2, 3)
    assert cluster.objects[PREFILL]["spec"]["replicas"] == 2
    assert cluster.objects[DECODE]["spec"] == {
        "selector": "serving.kvasir.dev/inferenceservice=llama,serving.kvasir.dev/role=decode",
        "replicas": 3,
    }
    assert cluster.objects[DECODE]["status"] == {"replicas": 3}


def test_who_scales_a_role_scales_its_workers_and_an_edit_of_the_spec_does_not_take_it_back() -> None:
    cluster, operator = started()
    ask(cluster, DECODE, 5)
    settle(cluster, operator)
    assert replicas(cluster) == (2, 5)
    cluster.services["default", "llama"]["spec"]["decode"]["replicas"] = 1
    settle(cluster, operator)
    assert replicas(cluster) == (2, 5)
    assert cluster.services["default", "llama"]["status"]["decode"]["replicas"] == 5


def test_a_role_can_be_scaled_to_nothing() -> None:
    cluster, operator = started()
    ask(cluster, DECODE, 0)
    ask(cluster, PREFILL, 0)
    settle(cluster, operator)
    assert replicas(cluster) == (0, 0)


def test_sizes_of_the_spec_need_no_roles_and_roles_go_with_the_mode() -> None:
    cluster, operator = started("Fixed")
    assert not {PREFILL, DECODE} & set(cluster.objects)
    cluster, operator = started()
    ask(cluster, DECODE, 5)
    cluster.services["default", "llama"]["spec"]["scaling"] = {"mode": "Fixed"}
    settle(cluster, operator)
    assert not {PREFILL, DECODE} & set(cluster.objects)
    assert replicas(cluster) == (2, 3)

"""A reconcile against a cluster in memory: what it writes, and what it leaves alone."""

import copy
from datetime import UTC, datetime
from typing import Any

import pytest
from isvc_cases import FakeCluster, deployments, document, service

from kvasir_operator.observed import Reference
from kvasir_operator.port import ClusterError
from kvasir_operator.reconcile import Reconciler
from kvasir_operator.render import Options, render
from kvasir_operator.spec import Model
from kvasir_operator.validate import ModelFacts


def nothing_known(model: Model) -> ModelFacts | None:
    return None


def reconciler(cluster: FakeCluster, facts: Any = nothing_known) -> Reconciler:
    return Reconciler(cluster, Options(), facts, now=lambda: datetime(2026, 1, 1, tzinfo=UTC))


def test_from_nothing_to_ready() -> None:
    cluster = FakeCluster(document())
    operator = reconciler(cluster)
    assert operator.reconcile("default", "llama")
    assert {str(r) for r in cluster.objects} == {
        f"{o['kind']} {o['metadata']['name']}" for o in render(service(), Options())
    }
    assert cluster.conditions()["Ready"]["status"] == "False"
    cluster.settle()
    operator.reconcile("default", "llama")
    assert cluster.conditions()["Ready"]["status"] == "True"
    assert cluster.services["default", "llama"]["status"]["url"] == "http://llama-router.default.svc"
    assert {reason for reason, _ in cluster.events} == {
        "Accepted",
        "PrefillReady",
        "DecodeReady",
        "RouterReady",
        "Ready",
        "Scaling",
        "Complete",
    }


def test_when_all_is_well_nothing_is_written() -> None:
    cluster = FakeCluster(document())
    operator = reconciler(cluster)
    operator.reconcile("default", "llama")
    cluster.settle()
    operator.reconcile("default", "llama")
    cluster.calls.clear()
    events = len(cluster.events)
    operator.reconcile("default", "llama")
    assert cluster.calls == []
    assert len(cluster.events) == events


def test_a_service_that_is_gone_is_left_alone() -> None:
    cluster = FakeCluster()
    assert not reconciler(cluster).reconcile("default", "llama")
    assert cluster.calls == []


def test_a_service_that_is_being_deleted_is_left_to_garbage_collection() -> None:
    found = document()
    found["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    cluster = FakeCluster(found)
    reconciler(cluster).reconcile("default", "llama")
    assert cluster.calls == []


@pytest.mark.parametrize(
    ("spec", "facts", "path"),
    [
        ({"model": {"uri": "ftp://x"}}, None, "spec.model.uri"),
        ({"prefill": {"replicas": -1}}, None, "spec.prefill.replicas"),
        ({"decode": {"tensorParallel": 2}}, ModelFacts(9, 3, 8192), "spec.decode.tensorParallel"),
    ],
)
def test_nothing_is_created_for_what_cannot_work(spec: dict[str, Any], facts: ModelFacts | None, path: str) -> None:
    cluster = FakeCluster(document(**spec))
    reconciler(cluster, lambda model: facts).reconcile("default", "llama")
    assert cluster.calls == ["status"]
    accepted = cluster.conditions()["Accepted"]
    assert (accepted["status"], accepted["reason"]) == ("False", "Invalid")
    assert accepted["message"].startswith(f"{path}: ")
    assert [reason for reason, _ in cluster.events] == ["NotAccepted"]


def test_a_bad_edit_leaves_what_runs_running() -> None:
    cluster = FakeCluster(document())
    operator = reconciler(cluster)
    operator.reconcile("default", "llama")
    before = dict(cluster.objects)
    cluster.services["default", "llama"]["spec"]["prefill"] = {"replicas": -1}
    operator.reconcile("default", "llama")
    assert cluster.objects == before
    assert cluster.conditions()["Ready"]["reason"] == "NotAccepted"


def test_a_paused_service_is_watched_and_not_touched() -> None:
    cluster = FakeCluster(document())
    operator = reconciler(cluster)
    operator.reconcile("default", "llama")
    cluster.settle()
    found = cluster.services["default", "llama"]
    found["metadata"]["annotations"] = {"serving.kvasir.dev/paused": "true"}
    found["spec"]["router"] = {"replicas": 5}
    before = dict(cluster.objects)
    cluster.calls.clear()
    operator.reconcile("default", "llama")
    assert cluster.objects == before
    assert cluster.calls == ["status"]
    assert cluster.conditions()["Paused"]["status"] == "True"
    assert ("Paused", "Paused True 2026-01-01T00:00:00Z") in cluster.events
    assert cluster.conditions()["RouterReady"]["status"] == "False", "its spec is not what runs"
    found["metadata"]["annotations"] = {"serving.kvasir.dev/paused": "false"}
    operator.reconcile("default", "llama")
    assert "Paused" not in cluster.conditions()
    assert cluster.objects != before


def test_a_kind_that_is_not_served_is_skipped_with_one_event() -> None:
    cluster = FakeCluster(document(router={"expose": {"type": "HTTPRoute", "className": "g", "host": "a.example"}}))
    cluster.unserved.add("HTTPRoute")
    operator = reconciler(cluster)
    operator.reconcile("default", "llama")
    operator.reconcile("default", "llama")
    assert not any(r.kind == "HTTPRoute" for r in cluster.objects)
    told = [message for (reason, _), message in cluster.events.items() if reason == "APINotServed"]
    assert told == [
        "HTTPRoute llama-router is left out: this cluster does not serve gateway.networking.k8s.io/v1 HTTPRoute"
    ]
    assert cluster.services["default", "llama"]["status"]["url"] == "http://llama-router.default.svc"


def test_what_the_server_refuses_is_in_the_status_and_tried_again() -> None:
    cluster = FakeCluster(document())
    cluster.refuse["Deployment"] = ClusterError(422, "spec.template.spec.containers[0].image: Required value")
    with pytest.raises(ClusterError, match="Required value"):
        reconciler(cluster).reconcile("default", "llama")
    assert any(r.kind == "Service" for r in cluster.objects), "the rest is applied"
    assert cluster.conditions()["DecodeReady"]["reason"] == "ApplyFailed"
    assert "Required value" in cluster.conditions()["Ready"]["message"]


def test_somebody_elses_object_of_the_same_name_is_left_alone() -> None:
    cluster = FakeCluster(document())
    theirs = Reference("v1", "Service", "llama-router")
    cluster.theirs.add(theirs)
    with pytest.raises(ClusterError, match="does not belong"):
        reconciler(cluster).reconcile("default", "llama")
    assert f"apply {theirs}" not in cluster.calls
    assert cluster.conditions()["RouterReady"]["reason"] == "ApplyFailed"


@pytest.mark.parametrize("status", [0, 409, 429, 500, 503])
def test_a_server_that_does_not_answer_stops_the_reconcile(status: int) -> None:
    cluster = FakeCluster(document())
    cluster.refuse["Role"] = ClusterError(status, "later")
    with pytest.raises(ClusterError, match="later"):
        reconciler(cluster).reconcile("default", "llama")
    assert "status" not in cluster.calls


def test_a_reconcile_goes_on_where_another_was_cut_off() -> None:
    whole = FakeCluster(document())
    reconciler(whole).reconcile("default", "llama")
    for cut in range(len(whole.objects)):
        cluster = FakeCluster(document())
        left = cut

        def apply(item: Any, cluster: FakeCluster = cluster) -> None:
            nonlocal left
            if left == 0:
                raise ClusterError(0, "cut off")
            left -= 1
            FakeCluster.apply(cluster, item)

        cluster.apply = apply  # type: ignore[method-assign]
        with pytest.raises(ClusterError):
            reconciler(cluster).reconcile("default", "llama")
        del cluster.apply  # type: ignore[attr-defined]
        reconciler(cluster).reconcile("default", "llama")
        assert cluster.objects == whole.objects


def test_an_edit_that_keeps_the_kv_replaces_the_workers_one_role_after_the_other_if_need_be() -> None:
    cluster = FakeCluster(document())
    operator = reconciler(cluster)
    operator.reconcile("default", "llama")
    cluster.settle()
    old = deployments(render(service(), Options()))["decode"]["metadata"]["name"]
    cluster.services["default", "llama"]["spec"]["drain"] = {"deadlineSeconds": 1}
    operator.reconcile("default", "llama")
    assert cluster.replicas()[old] == 1, "nothing has taken its place yet"
    for _ in range(3):
        cluster.settle()
        operator.reconcile("default", "llama")
    assert old not in cluster.replicas()
    assert set(cluster.replicas().values()) == {1}
    assert cluster.conditions()["Ready"]["status"] == "True"


def test_a_deployment_that_changed_since_it_was_read_is_not_scaled() -> None:
    cluster = FakeCluster(document(decode={"replicas": 2}))
    operator = reconciler(cluster)
    operator.reconcile("default", "llama")
    cluster.settle()
    cluster.services["default", "llama"]["spec"]["drain"] = {"deadlineSeconds": 1}
    operator.reconcile("default", "llama")
    cluster.settle()
    stale = copy.deepcopy(list(cluster.objects.values()))
    operator.reconcile("default", "llama")
    before = cluster.replicas()
    cluster.owned = lambda *_: stale  # type: ignore[method-assign]
    with pytest.raises(ClusterError, match="is at version") as error:
        operator.reconcile("default", "llama")
    assert error.value.status == 409
    assert not error.value.final, "it is tried again"
    assert cluster.replicas() == before

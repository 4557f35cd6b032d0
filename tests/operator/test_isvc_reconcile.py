"""A reconcile against a cluster in memory: what it writes, and what it leaves alone."""

import copy
from datetime import UTC, datetime
from typing import Any

import pytest
from isvc_cases import FakeCluster, deployments, document, service

from kvasir_operator.api import Model
from kvasir_operator.api.validation import ModelMetadata
from kvasir_operator.cluster.interface import ClusterError
from kvasir_operator.plan.observed import Reference
from kvasir_operator.reconcile.reconciler import Reconciler
from kvasir_operator.render import Options, render


def nothing_known(model: Model) -> ModelMetadata | None:
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
        ({"decode": {"tensorParallel": 2}}, ModelMetadata(9, 3, 8192), "spec.decode.tensorParallel"),
    ],
)
def test_nothing_is_created_for_what_cannot_work(
    spec: dict[str, Any], facts: ModelMetadata | None, path: str
) -> None:
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


@pytest.mark.parametrize("code", [400, 403, 404, 409, 413, 422, 500, 501])
def test_a_refusal_of_any_code_is_told_and_keeps_nothing_else_from_being_made(code: int) -> None:
    cluster = FakeCluster(document())
    operator = reconciler(cluster)
    operator.reconcile("default", "llama")
    cluster.settle()
    operator.reconcile("default", "llama")
    assert cluster.conditions()["Ready"]["status"] == "True"
    before = set(cluster.objects)

    def apply(item: Any) -> None:
        if item["metadata"]["name"].startswith("llama-prefill") and item["kind"] == "Deployment":
            raise ClusterError(code, "no such field")
        FakeCluster.apply(cluster, item)

    cluster.apply = apply  # type: ignore[method-assign]
    edited = cluster.services["default", "llama"]
    edited["metadata"]["generation"] = 2
    edited["spec"]["drain"] = {"deadlineSeconds": 1}
    for _ in range(2):
        with pytest.raises(ClusterError, match="no such field"):
            operator.reconcile("default", "llama")
    made = {r.name for r in set(cluster.objects) - before if r.kind == "Deployment"}
    assert any(name.startswith("llama-decode") for name in made), "the other role's is made"
    ready = cluster.conditions()["Ready"]
    assert (ready["status"], ready["reason"], ready["observedGeneration"]) == ("False", "ApplyFailed", 2)
    assert "no such field" in ready["message"]
    assert cluster.services["default", "llama"]["status"]["observedGeneration"] == 2
    told = [message for (reason, _), message in cluster.events.items() if reason == "ApplyFailed"]
    assert len(told) == 1, "once, however often it is tried"
    assert "llama-prefill" in told[0]
    assert "no such field" in told[0]


@pytest.mark.parametrize("step", ["scale", "delete", "foreign"])
def test_a_refusal_of_any_step_is_told(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = FakeCluster(document(decode={"replicas": 2}))
    operator = reconciler(cluster)
    if step != "foreign":
        operator.reconcile("default", "llama")
        cluster.settle()
        if step == "scale":
            cluster.services["default", "llama"]["spec"]["drain"] = {"deadlineSeconds": 1}
            operator.reconcile("default", "llama")
            cluster.settle()
        if step == "delete":
            surplus = copy.deepcopy(next(o for r, o in cluster.objects.items() if r.kind == "PodDisruptionBudget"))
            surplus["metadata"]["name"] = "surplus"
            cluster.objects[Reference("policy/v1", "PodDisruptionBudget", "surplus")] = surplus
            cluster.settle()

    def refuse(*_: Any) -> None:
        raise ClusterError(403, "forbidden by a policy")

    monkeypatch.setattr(cluster, step, refuse)
    with pytest.raises(ClusterError, match="forbidden by a policy"):
        operator.reconcile("default", "llama")
    assert cluster.conditions()["Degraded"]["status"] == "True"
    assert any("forbidden by a policy" in message for message in cluster.events.values())


def test_what_cannot_be_read_is_told_and_ready_does_not_go_on_for_a_new_spec() -> None:
    cluster = FakeCluster(document())
    operator = reconciler(cluster)
    operator.reconcile("default", "llama")
    cluster.settle()
    operator.reconcile("default", "llama")

    def owned(*_: Any) -> list[Any]:
        raise ClusterError(403, "cannot list deployments")

    cluster.owned = owned  # type: ignore[method-assign]
    with pytest.raises(ClusterError, match="cannot list"):
        operator.reconcile("default", "llama")
    assert cluster.conditions()["Ready"]["status"] == "True", "the spec is the one that was made"
    assert "cannot list deployments" in cluster.conditions()["Degraded"]["message"]
    cluster.services["default", "llama"]["metadata"]["generation"] = 2
    with pytest.raises(ClusterError, match="cannot list"):
        operator.reconcile("default", "llama")
    ready = cluster.conditions()["Ready"]
    assert (ready["status"], ready["reason"], ready["observedGeneration"]) == ("False", "Refused", 2)


def test_an_event_that_is_refused_stops_nothing() -> None:
    cluster = FakeCluster(document())

    def event(*_: Any) -> None:
        raise ClusterError(403, "exceeded quota: events")

    cluster.event = event  # type: ignore[method-assign]
    reconciler(cluster).reconcile("default", "llama")
    assert any(r.kind == "Deployment" for r in cluster.objects)


@pytest.mark.parametrize("status", [0, 401, 429, 503, 504])
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

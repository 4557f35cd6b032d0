"""Conditions say what is around the pods: the way in, who may collect metrics, and kstatus for other tools."""

from datetime import UTC, datetime
from typing import Any

import pytest
from isvc_cases import FakeCluster, document

from kvasir_operator.reconcile.reconciler import Reconciler
from kvasir_operator.render import Options

NOW = datetime(2026, 1, 1, tzinfo=UTC)
ROUTE = {"router": {"expose": {"type": "HTTPRoute", "className": "g", "host": "a.example"}}}
INGRESS = {"router": {"expose": {"type": "Ingress"}}}


def reconciled(cluster: FakeCluster, options: Options | None = None) -> dict[str, Any]:
    Reconciler(cluster, options or Options(), lambda model: None, lambda: NOW).reconcile("default", "llama")
    return cluster.conditions()


@pytest.mark.parametrize(("spec", "kind"), [(ROUTE, "HTTPRoute"), (INGRESS, "Ingress")])
def test_a_missing_api_of_the_way_in_is_a_condition_and_an_event(spec: dict[str, Any], kind: str) -> None:
    cluster = FakeCluster(document(**spec))
    cluster.unserved.add(kind)
    found = reconciled(cluster)["Exposed"]
    assert (found["status"], found["reason"]) == ("False", "APINotServed")
    assert kind in found["message"]
    assert [reason for reason, _ in cluster.events if reason == "APINotServed"]
    assert cluster.conditions()["Degraded"]["reason"] == "APINotServed"
    assert cluster.services["default", "llama"]["status"]["url"].endswith(".svc"), "only inside"
    cluster.unserved.clear()
    assert reconciled(cluster)["Exposed"]["status"] == "True"
    assert cluster.conditions()["Degraded"]["status"] == "False"


def test_nothing_is_said_of_a_way_in_that_nobody_wants() -> None:
    assert "Exposed" not in reconciled(FakeCluster(document()))


@pytest.mark.parametrize(("namespace", "status"), [("", "False"), ("monitoring", "True")])
def test_whether_metrics_can_be_collected_is_said(namespace: str, status: str) -> None:
    options = Options(metrics_namespace=namespace)
    cluster = FakeCluster(document())
    found = reconciled(cluster, options)["MetricsReachable"]
    assert found["status"] == status
    assert namespace in found["message"]
    assert "MetricsReachable" not in reconciled(FakeCluster(document(networkPolicy="None")), options)


def test_other_tools_see_what_goes_on_what_stands_still_and_what_is_right() -> None:
    cluster = FakeCluster(document())
    found = reconciled(cluster)
    assert (found["Reconciling"]["status"], "Stalled" in found) == ("True", False)
    cluster.settle()
    reconciled(cluster)
    found = reconciled(cluster)
    assert found["Ready"]["status"] == "True"
    assert not {"Reconciling", "Stalled"} & set(found)
    pod = {
        "metadata": {
            "name": "p",
            "labels": {
                "serving.kvasir.dev/role": "router",
                "serving.kvasir.dev/revision": next(
                    o["spec"]["template"]["metadata"]["labels"]["serving.kvasir.dev/revision"]
                    for r, o in cluster.objects.items()
                    if r.name == "llama-router" and r.kind == "Deployment"
                ),
            },
        },
        "status": {"containerStatuses": [{"state": {"waiting": {"reason": "ImagePullBackOff", "message": "no"}}}]},
    }
    cluster.listed_pods = [pod]
    for target, item in cluster.objects.items():
        if target.name == "llama-router" and target.kind == "Deployment":
            item["status"]["readyReplicas"] = 0
    found = reconciled(cluster)
    assert (found["Stalled"]["status"], found["Stalled"]["reason"]) == ("True", "ImagePullBackOff")
    assert "Reconciling" not in found


def test_a_refused_spec_stands_still() -> None:
    cluster = FakeCluster(document(model={"uri": "pvc://a/b", "revision": "x"}))
    found = reconciled(cluster)
    assert found["Stalled"]["status"] == "True"
    assert "spec.model.revision" in found["Stalled"]["message"]

"""Routers as an InferencePool of the Gateway API Inference Extension."""

from datetime import UTC, datetime
from typing import Any

import pytest
from foreign_schemas import BACKEND, INFERENCE_POOL, refusals
from isvc_cases import FakeCluster, document, pod_templates, service

from kvasir_operator.admission import parse
from kvasir_operator.api import InvalidService
from kvasir_operator.reconcile.reconciler import Reconciler
from kvasir_operator.render import Object, Options, render
from kvasir_operator.render.network import url

PICKER = {"name": "llama-epp"}


def exposed(**expose: Any) -> list[Object]:
    return render(
        service(router={"expose": {"type": "InferencePool", "endpointPicker": PICKER, **expose}}), Options()
    )


def only(objects: list[Object], kind: str) -> Object:
    (found,) = [item for item in objects if item["kind"] == kind]
    return found


@pytest.mark.parametrize("version", INFERENCE_POOL)
@pytest.mark.parametrize(
    "picker", [PICKER, {"name": "epp", "port": 443, "failureMode": "FailClose"}], ids=["default", "said"]
)
def test_the_pool_is_what_its_definition_takes(version: str, picker: dict[str, Any]) -> None:
    pool = only(exposed(endpointPicker=picker, annotations={"a": "b"}), "InferencePool")
    assert pool["apiVersion"] == "inference.networking.k8s.io/v1"
    assert not list(refusals(INFERENCE_POOL[version], pool["spec"]))
    reference = pool["spec"]["endpointPickerRef"]
    assert (reference["name"], reference["port"]["number"]) == (picker["name"], picker.get("port", 9002))
    assert reference["failureMode"] == picker.get("failureMode", "FailOpen")
    assert pool["metadata"]["annotations"] == {"a": "b"}


def test_the_schemas_refuse_what_they_are_for() -> None:
    spec = only(exposed(), "InferencePool")["spec"]
    for wrong in (
        {"extensionRef": {}},
        {"targetPorts": []},
        {"selector": {}},
        {"endpointPickerRef": {"name": "a"}},
    ):
        assert list(refusals(INFERENCE_POOL["v1.6.0"], {**spec, **wrong}))


def test_its_members_are_the_routers_pods_at_the_port_that_serves_the_api_and_metrics() -> None:
    objects = exposed()
    pool = only(objects, "InferencePool")["spec"]
    chosen = pool["selector"]["matchLabels"].items()
    members = [t for t in pod_templates(objects) if chosen <= t["metadata"]["labels"].items()]
    (router,) = members
    assert router["metadata"]["labels"]["serving.kvasir.dev/role"] == "router"
    (port,) = router["spec"]["containers"][0]["ports"]
    assert [each["number"] for each in pool["targetPorts"]] == [port["containerPort"]]
    assert router["metadata"]["annotations"]["prometheus.io/port"] == str(port["containerPort"])


def test_with_a_gateway_a_route_leads_to_the_pool() -> None:
    objects = exposed(className="infra/public", host="a.example")
    route = only(objects, "HTTPRoute")["spec"]
    (backend,) = route["rules"][0]["backendRefs"]
    assert backend == {
        "group": "inference.networking.k8s.io",
        "kind": "InferencePool",
        "name": only(objects, "InferencePool")["metadata"]["name"],
    }
    assert not list(refusals(BACKEND, backend))
    assert (route["parentRefs"], route["hostnames"]) == ([{"name": "public", "namespace": "infra"}], ["a.example"])
    found = service(
        router={
            "expose": {"type": "InferencePool", "endpointPicker": PICKER, "className": "g", "host": "a.example"}
        }
    )
    assert url(found, render(found, Options())) == "http://a.example"
    assert not [item for item in exposed() if item["kind"] == "HTTPRoute"]


@pytest.mark.parametrize(
    ("expose", "path"),
    [
        ({"type": "InferencePool"}, "endpointPicker"),
        ({"type": "InferencePool", "endpointPicker": {}}, "endpointPicker.name"),
        ({"type": "InferencePool", "endpointPicker": {"name": "A_b"}}, "endpointPicker.name"),
        ({"type": "InferencePool", "endpointPicker": {"name": "a", "port": 0}}, "endpointPicker.port"),
        (
            {"type": "InferencePool", "endpointPicker": {"name": "a", "failureMode": "Open"}},
            "endpointPicker.failureMode",
        ),
        ({"type": "InferencePool", "endpointPicker": PICKER, "host": "a.example"}, "host"),
        ({"type": "InferencePool", "endpointPicker": PICKER, "tlsSecretName": "t"}, "tlsSecretName"),
        ({"type": "HTTPRoute", "className": "g", "endpointPicker": PICKER}, "endpointPicker"),
        ({"endpointPicker": PICKER}, "endpointPicker"),
    ],
)
def test_what_means_nothing_is_refused_by_name(expose: dict[str, Any], path: str) -> None:
    with pytest.raises(InvalidService) as error:
        parse(document(router={"expose": expose}))
    assert [problem.path for problem in error.value.problems] == [f"spec.router.expose.{path}"]


@pytest.mark.parametrize("missing", ["InferencePool", "HTTPRoute"])
def test_where_an_api_of_it_is_not_served_that_is_a_condition(missing: str) -> None:
    expose = {"type": "InferencePool", "endpointPicker": PICKER, "className": "g", "host": "a.example"}
    cluster = FakeCluster(document(router={"expose": expose}))
    cluster.unserved.add(missing)
    operator = Reconciler(cluster, Options(), lambda model: None, lambda: datetime(2026, 1, 1, tzinfo=UTC))
    operator.reconcile("default", "llama")
    found = cluster.conditions()["Exposed"]
    assert (found["status"], found["reason"]) == ("False", "APINotServed")
    assert missing in found["message"]
    assert not [target for target in cluster.objects if target.kind == missing]
    assert [message for (reason, _), message in cluster.events.items() if reason == "APINotServed"]
    cluster.unserved.clear()
    operator.reconcile("default", "llama")
    assert cluster.conditions()["Exposed"]["status"] == "True"
    assert {"InferencePool", "HTTPRoute"} <= {target.kind for target in cluster.objects}

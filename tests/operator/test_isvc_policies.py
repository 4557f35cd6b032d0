"""NetworkPolicies, judged by an evaluator: who can reach whom, and at which port."""

import pytest
from isvc_cases import pod_templates, service
from network_policy import OUTSIDE, Peer, Pod, allowed

from kvasir_operator.render import Object, Options, StaticWorkers, render

OPERATOR_NAMESPACE = {"kubernetes.io/metadata.name": "kvasir-system"}
METRICS_NAMESPACE = {"kubernetes.io/metadata.name": "monitoring"}
OPTIONS = Options(operator_namespace="kvasir-system", metrics_namespace="monitoring")
HTTP, WORKER, DNS, HTTPS, API_SERVER, RANKS, NIXL = 8000, 8443, 53, 443, 6443, 5557, 41873
PORTS = (HTTP, WORKER, DNS, HTTPS, API_SERVER, RANKS, NIXL)

HUB = {"model": {"uri": "hf://org/m"}}
CLAIM = {"model": {"uri": "pvc://models/m"}}
LOADED = {"model": {"uri": "hf://org/m", "cache": {"claimName": "models"}}}

STRANGER = Pod({"app": "web"})
OPERATOR = Pod({"app.kubernetes.io/name": "kvasir-operator"}, "kvasir-system", OPERATOR_NAMESPACE)
OTHERS = {
    "a pod beside": STRANGER,
    "a pod elsewhere": Pod({"app": "web"}, "web", {"kubernetes.io/metadata.name": "web"}),
    "an address outside": OUTSIDE,
    "operator": OPERATOR,
    "a pod that says it is the operator": Pod(OPERATOR.labels, "web", {"kubernetes.io/metadata.name": "web"}),
    "prometheus": Pod({"app": "prometheus"}, "monitoring", METRICS_NAMESPACE),
    "a worker of another service": Pod(
        {"serving.kvasir.dev/inferenceservice": "other", "serving.kvasir.dev/role": "decode"}
    ),
    "a worker of a namesake": Pod(
        {"serving.kvasir.dev/inferenceservice": "llama", "serving.kvasir.dev/role": "decode"}, "b"
    ),
}


def world(spec: dict[str, object], options: Options = OPTIONS) -> tuple[list[Object], dict[str, Peer]]:
    """The policies of a service, and everybody with the labels that are rendered for them."""
    objects = render(service(**spec), options)
    policies = [o for o in objects if o["kind"] == "NetworkPolicy"]
    ours = {
        template["metadata"]["labels"]["serving.kvasir.dev/role"]: Pod(template["metadata"]["labels"])
        for template in pod_templates(objects)
    }
    return policies, {**ours, **OTHERS}


def reach(spec: dict[str, object], target: str, protocol: str = "TCP") -> dict[int, set[str]]:
    """Who reaches `target`, by port."""
    policies, everybody = world(spec)
    return {
        port: {
            name
            for name, source in everybody.items()
            if name != target and allowed(policies, source, everybody[target], port, protocol)
        }
        for port in PORTS
    }


def leave(spec: dict[str, object], source: str, protocol: str = "TCP") -> dict[int, set[str]]:
    """Whom `source` reaches, by port."""
    policies, everybody = world(spec)
    return {
        port: {
            name
            for name, target in everybody.items()
            if name != source and allowed(policies, everybody[source], target, port, protocol)
        }
        for port in PORTS
    }


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_workers_are_reached_by_their_own_only(role: str) -> None:
    other = {"prefill": "decode", "decode": "prefill"}[role]
    for spec in (HUB, CLAIM, LOADED):
        found = reach(spec, role)
        assert found.pop(HTTP) == {other, "operator", "prometheus"}
        assert found.pop(WORKER) == {other, "router"}, "neither the operator nor what collects metrics"
        assert all(who == {other} for who in found.values()), "the transport's ports are between workers"


def test_without_encryption_routers_reach_the_port_of_probes_and_no_other() -> None:
    found = reach({**HUB, "transfer": {"encryption": "Off"}}, "decode")
    assert found[HTTP] == {"prefill", "router", "operator", "prometheus"}
    assert found[WORKER] == {"prefill"}


def test_workers_of_one_role_reach_each_other_too() -> None:
    policies, everybody = world(HUB)
    for port in (NIXL, RANKS):
        assert allowed(policies, everybody["decode"], everybody["decode"], port)


def test_the_router_is_reached_by_everybody_at_its_port_and_nowhere_else() -> None:
    found = reach(HUB, "router")
    assert found.pop(HTTP) == set(OTHERS), "workers have no business there"
    assert all(who == set() for who in found.values())


def test_the_router_reaches_its_workers_and_the_api_server() -> None:
    found = leave(HUB, "router")
    assert found.pop(WORKER) == {"prefill", "decode"}
    assert found.pop(HTTP) == set()
    assert "an address outside" in found[HTTPS] & found[API_SERVER] & found[DNS]
    assert "an address outside" not in found[NIXL]


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_workers_reach_the_hub_only_where_they_download_the_model(role: str) -> None:
    assert "an address outside" in leave(HUB, role)[HTTPS]
    for spec in (CLAIM, LOADED):
        found = leave(spec, role)
        assert all("an address outside" not in found[port] for port in PORTS if port != DNS)
    assert "an address outside" not in leave(HUB, role)[API_SERVER]


def test_everybody_can_ask_for_names() -> None:
    for role in ("prefill", "decode", "router", "preload"):
        for protocol in ("UDP", "TCP"):
            assert "an address outside" in leave(LOADED, role, protocol)[DNS]
        assert "an address outside" not in leave(LOADED, role, "UDP")[HTTPS]


def test_the_job_that_loads_a_model_reaches_the_hub_and_is_asked_by_the_operator_only() -> None:
    assert "an address outside" in leave(LOADED, "preload")[HTTPS]
    assert leave(LOADED, "preload")[NIXL] == set()
    found = reach(LOADED, "preload")
    assert found.pop(HTTP) == {"operator"}
    assert all(who == set() for who in found.values())


def test_without_a_metrics_namespace_nobody_else_is_let_in() -> None:
    policies, everybody = world(HUB, Options())
    for name in ("operator", "prometheus"):
        assert not allowed(policies, everybody[name], everybody["decode"], HTTP)


def test_other_pods_of_the_namespace_are_none_of_our_business() -> None:
    policies, everybody = world(HUB)
    assert allowed(policies, OUTSIDE, STRANGER, NIXL)
    assert allowed(policies, STRANGER, OUTSIDE, NIXL)
    assert allowed(policies, everybody["a worker of another service"], STRANGER, HTTP)


def test_a_service_may_do_without() -> None:
    assert world({"networkPolicy": "None"})[0] == []
    assert not [
        o
        for o in render(service(), Options(discovery=StaticWorkers(("http://a:1",))))
        if o["kind"] == "NetworkPolicy"
    ]

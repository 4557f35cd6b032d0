"""What the spec says of all pods that run the engine, and of the router and the way to it."""

from typing import Any

import pytest
from isvc_cases import deployments, document, main_container, pod_templates, service

from kvasir_operator.admission import parse
from kvasir_operator.api import InvalidService
from kvasir_operator.render import Object, Options, render

HUB: dict[str, Any] = {"model": {"uri": "hf://a/b", "cache": {"claimName": "c"}}}
TEXT = "nginx.ingress.kubernetes.io/"


def pods(**spec: Any) -> list[Object]:
    """The pods of all Deployments and of the Job."""
    found = [each["spec"] for each in pod_templates(render(service(**HUB, **spec), Options(engine_image="ours")))]
    assert len(found) == 4
    return found


def test_every_pod_has_the_services_own_image_proxies_and_certificates() -> None:
    engine = {
        "image": "r/e@sha256:0a",
        "imagePullPolicy": "Always",
        "env": [{"name": "HF_ENDPOINT", "value": "https://hub.example"}, {"name": "NO_PROXY"}],
        "caConfigMapName": "trust",
    }
    for pod in pods(engine=engine):
        (main,) = pod["containers"]
        assert (main["image"], main["imagePullPolicy"]) == ("r/e@sha256:0a", "Always")
        env = {each["name"]: each["value"] for each in main["env"]}
        assert (env["HF_ENDPOINT"], env["NO_PROXY"]) == ("https://hub.example", "")
        mounts = {each["mountPath"]: each["name"] for each in main["volumeMounts"]}
        folder, _, _ = env["SSL_CERT_FILE"].rpartition("/")
        assert env["REQUESTS_CA_BUNDLE"] == env["SSL_CERT_FILE"]
        (volume,) = [each for each in pod["volumes"] if each["name"] == mounts[folder]]
        assert volume["configMap"] == {"name": "trust"}


def test_a_service_with_an_own_image_does_not_roll_with_the_operators() -> None:
    def templates(operators: str, **spec: Any) -> list[Object]:
        return list(pod_templates(render(service(**spec), Options(engine_image=operators))))

    own = {"engine": {"image": "e:1"}}
    assert templates("a", **own) == templates("b", **own)
    assert templates("a") != templates("b")
    router = deployments(render(service(engine={"image": "e:1"}, router={"image": "r:2"}), Options()))
    assert {role: main_container(found)["image"] for role, found in router.items()} == {
        "prefill": "e:1",
        "decode": "e:1",
        "router": "r:2",
    }


def test_a_router_is_a_pod_like_others() -> None:
    router = {
        "resources": {"requests": {"cpu": "3"}, "limits": {"memory": "2Gi"}},
        "template": {
            "metadata": {"annotations": {"a": "b"}},
            "spec": {
                "nodeSelector": {"pool": "x"},
                "containers": [{"name": "kvasir", "env": [{"name": "A", "value": "1"}]}],
            },
        },
    }
    found = deployments(render(service(router=router), Options(defaults=1)))["router"]
    template = found["spec"]["template"]
    assert template["spec"]["nodeSelector"] == {"pool": "x"}
    assert template["metadata"]["annotations"]["a"] == "b"
    assert template["metadata"]["annotations"]["prometheus.io/scrape"] == "true"
    main = main_container(found)
    assert main["resources"] == {"requests": {"cpu": "3", "memory": "1Gi"}, "limits": {"memory": "2Gi"}}
    assert {"name": "A", "value": "1"} in main["env"]
    plain = deployments(render(service(), Options()))["router"]["spec"]["template"]
    label = "serving.kvasir.dev/revision"
    assert plain["metadata"]["labels"][label] != template["metadata"]["labels"][label]


def way_in(**expose: Any) -> Object:
    objects = render(service(router={"expose": expose}), Options())
    (found,) = [o for o in objects if o["kind"] == expose["type"] and o["metadata"]["name"] == "llama-router"]
    annotations: Object = found["metadata"].get("annotations", {})
    return annotations


def test_an_ingress_keeps_long_streams_and_its_annotations_can_be_others() -> None:
    ours = way_in(type="Ingress")
    assert int(ours[TEXT + "proxy-read-timeout"]) >= 3600
    assert ours[TEXT + "proxy-buffering"] == "off"
    mine = way_in(type="Ingress", annotations={TEXT + "proxy-read-timeout": "7", "cert-manager.io/issuer": "i"})
    assert mine == {**ours, TEXT + "proxy-read-timeout": "7", "cert-manager.io/issuer": "i"}


def test_annotations_are_on_what_the_type_names() -> None:
    assert way_in(type="Service", annotations={"a": "b"}) == {"a": "b"}
    assert way_in(type="HTTPRoute", className="g", annotations={"a": "b"}) == {"a": "b"}
    assert way_in(type="Service") == {}


@pytest.mark.parametrize(
    ("spec", "path"),
    [
        ({"engine": {"image": "not an image"}}, "spec.engine.image"),
        ({"engine": {"imagePullPolicy": "Sometimes"}}, "spec.engine.imagePullPolicy"),
        ({"engine": {"env": [{"name": "KVASIR_PORT", "value": "1"}]}}, "spec.engine.env[0].name"),
        ({"engine": {"env": [{"name": "A"}, {"name": "A"}]}}, "spec.engine.env[1]"),
        ({"engine": {"env": [{"name": "A", "value": 1}]}}, "spec.engine.env[0].value"),
        ({"engine": {"caConfigMapName": "c", "env": [{"name": "SSL_CERT_FILE"}]}}, "spec.engine.env[0].name"),
        (
            {"router": {"template": {"metadata": {"labels": {"serving.kvasir.dev/role": "x"}}}}},
            "spec.router.template",
        ),
        ({"router": {"template": {"status": {}}}}, "spec.router.template.status"),
        ({"router": {"expose": {"annotations": {"a b": "c"}}}}, "spec.router.expose.annotations[a b]"),
        ({"router": {"expose": {"annotations": {"a": 1}}}}, "spec.router.expose.annotations.a"),
        (
            {"router": {"expose": {"annotations": {"serving.kvasir.dev/applied": "c"}}}},
            "spec.router.expose.annotations",
        ),
        ({"placement": {"gpuProducts": ["H 100"]}}, "spec.placement.gpuProducts[0]"),
        ({"operatorClass": "A"}, "spec.operatorClass"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(spec: dict[str, Any], path: str) -> None:
    with pytest.raises(InvalidService) as error:
        parse(document(**spec))
    assert any(problem.path.startswith(path) for problem in error.value.problems), str(error.value)


def test_the_schedulers_own_sentence_is_told_from_its_beginning() -> None:
    from kvasir_operator.plan.observed import pod_state
    from kvasir_operator.status.evaluate import ConditionState
    from kvasir_operator.status.explain import explain

    said = (
        "0/900 nodes are available: 896 Insufficient nvidia.com/gpu, 4 node(s) had untolerated taint. " + "x" * 900
    )
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": said}
    state = pod_state({"metadata": {"name": "p", "labels": {}}, "status": {"conditions": [condition]}})
    assert state.trouble is not None
    condition = ConditionState(
        "DecodeReady", False, "Unschedulable", f"0 of 1 ready; pod p: Unschedulable: {state.trouble.message}"
    )
    told = explain([condition], ConditionState("Ready", False, "Unschedulable", "no"))
    assert said[:96] in told
    assert len(state.trouble.message) <= 600

"""What users write: every object that it renders to is taken by API servers from 1.30 on, or it is refused by the
field that is wrong, by the webhook, `kvasir render` and reconcile alike."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from isvc_cases import FakeCluster, document, main_container
from kube_schemas import VERSIONS, complaints
from pod_fields import TABLE, table
from users import GPU, HCA, MIG, REFUSED, TAKEN, asks, loaded, main

from kvasir_operator.admission import parse
from kvasir_operator.admission.webhook import refusal
from kvasir_operator.api import KIND, InvalidService
from kvasir_operator.local import manifest
from kvasir_operator.local.errors import LocalError
from kvasir_operator.pod_validation import RESTRICTED, UNRESTRICTED, pod_problems
from kvasir_operator.reconcile.reconciler import Reconciler
from kvasir_operator.render import Object, Options, render

OLDER = Options(defaults=1)
OPTIONS = Options(operator_namespace="kvasir-system", metrics_namespace="monitoring")


def written(spec: dict[str, Any]) -> Object:
    """The manifest of a case."""
    spec = dict(spec)
    found = document(spec.pop("metadata.name", "llama"))
    found["spec"] |= spec
    return found


def templates(objects: list[Object]) -> list[Object]:
    """The pod templates of Deployments, Jobs and sets."""
    found = []
    for item in objects:
        spec = item.get("spec", {})
        group = spec.get("leaderWorkerTemplate", {})
        found += [t for t in (spec.get("template"), group.get("leaderTemplate"), group.get("workerTemplate")) if t]
    return found


@pytest.mark.parametrize(("name", "spec"), TAKEN, ids=[name for name, _ in TAKEN])
def test_what_is_taken_renders_to_objects_that_api_servers_take(name: str, spec: dict[str, Any]) -> None:
    assert refusal(written(spec), None, lambda _: None, UNRESTRICTED) is None
    objects = render(parse(written(spec), policy=UNRESTRICTED), OPTIONS)
    # Claims are written so from 1.31 on, with the requests of one from 1.32 on.
    oldest = VERSIONS[2] if "resourceClaims" in str(spec) else VERSIONS[0]
    for version in (oldest, VERSIONS[-2], VERSIONS[-1]):
        assert not [said for item in objects for said in complaints(item, version)]
    # LeaderWorkerSets have pod templates of the same kind, and no schema here.
    pods = [
        {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "p"}, "template": t}
        for t in templates(objects)
    ]
    assert not [said for item in pods for said in complaints(item, oldest)]
    for template in templates(objects):
        if "restartPolicy" not in template["spec"]:  # a Job's pods
            assert not list(pod_problems(template))


@pytest.mark.parametrize("version", VERSIONS)
def test_everything_at_once_is_taken_by_every_version(version: str) -> None:
    for name in ("smallest", "sidecar", "mig", "cache of a claim", "ingress", "external scaling", "host network"):
        for item in render(parse(written(dict(TAKEN)[name]), policy=UNRESTRICTED), OPTIONS):
            assert not list(complaints(item, version))


@pytest.mark.parametrize(("name", "spec", "path", "reason"), REFUSED, ids=[name for name, *_ in REFUSED])
def test_what_is_refused_is_refused_by_its_field_everywhere(
    name: str, spec: dict[str, Any], path: str, reason: str
) -> None:
    bad = written(spec)
    with pytest.raises(InvalidService) as error:
        parse(bad)
    said = {(each.path, each.reason) for each in error.value.problems}
    assert any(at == path and reason in why for at, why in said), said
    assert f"{path}: " in (refusal(bad, None, lambda _: None) or "")
    with pytest.raises(LocalError, match=r"manifest\.yaml"):
        manifest.load(yaml.safe_dump(bad), "manifest.yaml")
    cluster = FakeCluster(bad)
    Reconciler(cluster, Options(), lambda _: None).reconcile("default", bad["metadata"]["name"])
    conditions = cluster.conditions(bad["metadata"]["name"])
    assert conditions["Accepted"]["status"] == conditions["Ready"]["status"] == "False"
    assert f"{path}: " in conditions["Accepted"]["message"]
    assert not cluster.objects


ROOT = Path(__file__).parents[2]
FILES = [*sorted((ROOT / "manifests").rglob("*.yaml")), *sorted(Path(__file__).parent.glob("corpus/[!r]*.yaml"))]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_examples_and_the_installation_are_taken(path: Path) -> None:
    objects: list[Object] = []
    policy = UNRESTRICTED if "corpus" in path.parts else RESTRICTED
    for found in filter(None, yaml.safe_load_all(path.read_text())):
        objects += render(parse(found, policy=policy), OPTIONS) if found["kind"] == KIND else [found]
    assert objects
    for version in (VERSIONS[0], VERSIONS[-2], VERSIONS[-1]):
        assert not [said for item in objects for said in complaints(item, version)]


def test_the_schemas_refuse_what_they_are_for() -> None:
    """They can fail: each of these is refused by a server's schema too."""
    for wrong in ({"nodeSelectr": {}}, {"containers": [{"name": "a", "env": [{"name": "A", "value": 1}]}]}):
        item = {
            "apiVersion": "v1",
            "kind": "PodTemplate",
            "metadata": {"name": "p"},
            "template": {"spec": {"containers": [{"name": "a", "image": "b"}], **wrong}},
        }
        assert list(complaints(item, VERSIONS[0]))


def test_the_table_of_pod_fields_is_that_of_the_newest_version() -> None:
    assert TABLE.read_text() == table(), "run `make pod-fields`"


def resources(spec: dict[str, Any], role: str = "decode") -> dict[str, Any]:
    objects = render(parse(written(spec)), OLDER)
    found: dict[str, Any] = main_container(next(o for o in objects if f"llama-{role}-" in o["metadata"]["name"]))[
        "resources"
    ]
    return found


@pytest.mark.parametrize(
    ("case", "requests", "limits"),
    [
        ("memory limit below ours", {"cpu": "4", "memory": "8Gi", GPU: "1"}, {"memory": "8Gi", GPU: "1"}),
        (
            "cpu limit below ours",
            {"cpu": "500m", "memory": "16Gi", GPU: "1"},
            {"cpu": "500m", "memory": "64Gi", GPU: "1"},
        ),
        (
            "limits of a template",
            {"cpu": 0.5, "memory": "8Gi", GPU: "1"},
            {"cpu": 0.5, "memory": "8Gi", GPU: "1"},
        ),
        ("fewer rdma devices", {"cpu": "32", "memory": "128Gi", GPU: "8", HCA: 1}, {GPU: "8", HCA: 1}),
        ("fewer rdma devices by request", {"cpu": "32", "memory": "128Gi", GPU: "8", HCA: 1}, {GPU: "8", HCA: 1}),
        ("mig", {"cpu": "4", "memory": "16Gi"}, {MIG: 1}),
        ("mig of requests", {"cpu": "4", "memory": "16Gi", MIG: 1}, {MIG: 1}),
        ("mig of a template", {"cpu": "4", "memory": "16Gi"}, {MIG: 1}),
        ("claim", {"cpu": "4", "memory": "16Gi"}, None),
        ("claim and no gpu", {"cpu": "4", "memory": "16Gi"}, {GPU: 0}),
        ("claim of a template", {"cpu": "4", "memory": "16Gi"}, {GPU: 0}),
        ("claim for a network card", {"cpu": "4", "memory": "16Gi"}, {GPU: 1}),
    ],
)
def test_requests_follow_limits_and_other_devices_take_the_place_of_gpus(
    case: str, requests: dict[str, Any], limits: dict[str, Any] | None
) -> None:
    found = resources(dict(TAKEN)[case])
    assert (found["requests"], found.get("limits")) == (requests, limits)


@pytest.mark.parametrize(
    ("spec", "role", "requests", "limit"),
    [
        ({}, "decode", {"memory": "16Gi", "ephemeral-storage": "2048Mi"}, "64Gi"),
        ({"decode": {"tensorParallel": 2}}, "decode", {"memory": "32Gi"}, "128Gi"),
        (asks(requests={"memory": "900Gi"}), "decode", {"memory": "900Gi"}, "900Gi"),
        (asks(requests={"memory": "20Gi"}), "decode", {"memory": "20Gi"}, "64Gi"),
        (asks(limits={"memory": "8Gi"}), "decode", {"memory": "8Gi"}, "8Gi"),
        (main(resources={"requests": {"memory": "70Gi"}}), "decode", {"memory": "70Gi"}, "70Gi"),
        (
            {
                "model": {"uri": "hf://a/b", "size": "10Gi"},
                "decode": {"device": "cpu"},
                "engine": {"kvCacheMemory": "6Gi"},
            },
            "decode",
            {"ephemeral-storage": "12288Mi", "memory": "2Gi"},
            "90Gi",
        ),
        (
            {"model": {"uri": "hf://a/b", "size": "10Gi", "cache": {"claimName": "c"}}},
            "decode",
            {"ephemeral-storage": "2048Mi"},
            "64Gi",
        ),
        ({}, "router", {"memory": "1Gi", "ephemeral-storage": "2048Mi"}, "8Gi"),
        ({"router": {"resources": {"requests": {"memory": "9Gi"}}}}, "router", {"memory": "9Gi"}, "9Gi"),
        (loaded(), "preload", {"memory": "2Gi", "ephemeral-storage": "2048Mi"}, "64Gi"),
        (loaded(resources={"limits": {"memory": "1Gi"}}), "preload", {"memory": "1Gi"}, "1Gi"),
    ],
)
def test_memory_has_a_limit_and_disk_a_request_by_default(
    spec: dict[str, Any], role: str, requests: dict[str, str], limit: str
) -> None:
    objects = render(parse(written(spec)), OPTIONS)
    found = main_container(
        next(o for o in objects if f"llama-{role}" in o["metadata"]["name"] and "template" in o.get("spec", {}))
    )["resources"]
    assert requests.items() <= found["requests"].items()
    assert found["limits"]["memory"] == limit


def test_the_jobs_template_is_merged_into_its_pod_which_another_job_runs() -> None:
    def job(spec: dict[str, Any]) -> Object:
        return next(o for o in render(parse(written(spec)), OPTIONS) if o["kind"] == "Job")

    theirs, plain = job(dict(TAKEN)["a Job of its own kind"]), job(loaded())
    pod = theirs["spec"]["template"]["spec"]
    assert (pod["nodeSelector"], pod["restartPolicy"]) == ({"pool": "cpu"}, "OnFailure")
    assert theirs["metadata"]["name"] != plain["metadata"]["name"]


def test_a_claim_is_the_pods_and_the_containers() -> None:
    objects = render(parse(written(dict(TAKEN)["claim"])), OPTIONS)
    decode = next(o for o in objects if "llama-decode-" in o["metadata"]["name"])["spec"]["template"]["spec"]
    assert decode["resourceClaims"] == [{"name": "gpu", "resourceClaimTemplateName": "h100"}]
    assert decode["containers"][0]["resources"]["claims"] == [{"name": "gpu"}]
    assert "affinity" not in decode, "the claim says of which GPU it is"


@pytest.mark.parametrize(
    ("case", "handler", "times"),
    [
        ("probe by exec", "exec", {"periodSeconds": 2, "timeoutSeconds": 5, "failureThreshold": 2}),
        ("probe by tcp", "tcpSocket", {"periodSeconds": 2}),
        ("probe of other times", "httpGet", {"periodSeconds": 30}),
    ],
)
def test_a_handler_of_the_users_takes_the_place_of_ours(case: str, handler: str, times: dict[str, int]) -> None:
    objects = render(parse(written(dict(TAKEN)[case])), OPTIONS)
    found = main_container(next(o for o in objects if "llama-decode-" in o["metadata"]["name"]))["readinessProbe"]
    assert [name for name in found if name in ("exec", "httpGet", "tcpSocket", "grpc")] == [handler]
    assert times.items() <= found.items()


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 9)
    | st.floats(allow_nan=False)
    | st.sampled_from(["", "a", "kvasir", "1Gi"]),
    lambda below: (
        st.lists(below, max_size=2)
        | st.dictionaries(
            st.sampled_from(
                [
                    *(
                        "spec",
                        "metadata",
                        "labels",
                        "containers",
                        "initContainers",
                        "name",
                        "image",
                        "env",
                        "value",
                    ),
                    *(
                        "resources",
                        "limits",
                        "requests",
                        "claims",
                        "memory",
                        "volumes",
                        "volumeMounts",
                        "mountPath",
                    ),
                    *(
                        "ports",
                        "containerPort",
                        "protocol",
                        "affinity",
                        "nodeAffinity",
                        "tolerations",
                        "key",
                        "operator",
                    ),
                    *(
                        "readinessProbe",
                        "exec",
                        "httpGet",
                        "port",
                        "resourceClaims",
                        "lifecycle",
                        "securityContext",
                    ),
                ]
            ),
            below,
            max_size=4,
        )
    ),
    max_leaves=20,
)


FIELDS = ("resources", "env", "ports", "volumeMounts", "lifecycle", "readinessProbe", "securityContext")
MAIN = st.dictionaries(st.sampled_from(FIELDS), JSON).map(lambda fields: {"name": "kvasir", **fields})
TEMPLATES = st.dictionaries(st.sampled_from(["spec", "metadata"]), JSON) | st.dictionaries(
    st.sampled_from(["volumes", "resourceClaims", "affinity", "tolerations", "hostNetwork"]), JSON
).flatmap(lambda spec: MAIN.map(lambda main: {"spec": {**spec, "containers": [main]}}))


@settings(max_examples=300, deadline=None)
@given(TEMPLATES)
def test_whatever_a_template_is_it_is_taken_or_refused(template: dict[str, Any]) -> None:
    try:
        service = parse(document(decode={"template": template}))
    except InvalidService as error:
        refused = error.problems
    else:
        assert not [said for item in render(service, OPTIONS) for said in complaints(item, VERSIONS[-1])]
        return
    assert refused
    assert all(each.path.startswith("spec.decode") for each in refused)

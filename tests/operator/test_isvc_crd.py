"""The CRD in the repository is the generated one, and says what `parse` says."""

from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from isvc_cases import document, with_defaults

from kvasir_operator.admission import parse
from kvasir_operator.api import KIND, InvalidService, object_schema
from kvasir_operator.crd import crd, crd_yaml, role_crd_yaml

ROOT = Path(__file__).parents[2]
SCHEMA = crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]


@pytest.mark.parametrize(
    ("path", "rules"),
    [
        ("crds/serving.kvasir.dev_inferenceservices.yaml", True),
        ("charts/kvasir/files/crd.yaml", True),
        ("charts/kvasir/files/crd-without-rules.yaml", False),
    ],
)
def test_the_crd_in_the_repository_is_the_generated_one(path: str, rules: bool) -> None:
    assert (ROOT / path).read_text() == crd_yaml(rules), "run `make crds`"


@pytest.mark.parametrize(
    "path", ["crds/serving.kvasir.dev_inferenceroles.yaml", "charts/kvasir/files/crd-roles.yaml"]
)
def test_the_crd_of_roles_in_the_repository_is_the_generated_one(path: str) -> None:
    assert (ROOT / path).read_text() == role_crd_yaml(), "run `make crds`"


def test_the_crd_is_small_enough_for_client_side_apply() -> None:
    assert len(crd_yaml()) < 100 * 1024


def _walk(schema: dict[str, Any]) -> list[dict[str, Any]]:
    below = [*schema.get("properties", {}).values()]
    below += [schema[key] for key in ("items", "additionalProperties") if key in schema]
    return [schema, *(found for item in below for found in _walk(item))]


def test_the_schema_is_structural() -> None:
    for schema in _walk(SCHEMA):
        assert "$ref" not in schema
        assert "type" in schema or schema.get("x-kubernetes-int-or-string")
        assert not ("properties" in schema and "additionalProperties" in schema)


# Keywords that apiextensions.k8s.io/v1 knows in structural schemas, and that are in use here.
KEYWORDS = {
    *("type", "format", "description", "title", "default", "example", "nullable", "enum", "pattern", "required"),
    *("minimum", "maximum", "minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"),
    *("properties", "additionalProperties", "items", "anyOf", "x-kubernetes-validations"),
    *("x-kubernetes-preserve-unknown-fields", "x-kubernetes-int-or-string"),
    *("x-kubernetes-list-type", "x-kubernetes-list-map-keys"),
}
ROLES = yaml.safe_load((ROOT / "crds/serving.kvasir.dev_inferenceroles.yaml").read_text())
ROLE_SCHEMA = ROLES["spec"]["versions"][0]["schema"]["openAPIV3Schema"]


@pytest.mark.parametrize("schema", [SCHEMA, ROLE_SCHEMA], ids=["InferenceService", "InferenceRole"])
def test_the_schema_has_what_a_current_api_server_asks_for(schema: dict[str, Any]) -> None:
    for found in _walk(schema):
        assert set(found) <= KEYWORDS, found
        if "anyOf" in found:
            assert found["anyOf"] == [{"type": "integer"}, {"type": "string"}]
            assert found["x-kubernetes-int-or-string"]
            assert "type" not in found
        if "x-kubernetes-list-map-keys" in found:
            assert found["x-kubernetes-list-type"] == "map"
            item = found["items"]
            for key in found["x-kubernetes-list-map-keys"]:
                assert key in item["required"] or "default" in item["properties"][key]
                assert item["properties"][key]["type"] in ("string", "integer", "boolean")
        for rule in found.get("x-kubernetes-validations", ()):
            assert "\n" not in rule["message"]
        if "default" in found:
            assert _pruned(found, found["default"]) == found["default"]
    of_metadata = schema["properties"].get("metadata", {}).get("properties", {})
    assert set(of_metadata) <= {"name", "generateName"}
    assert "default" not in schema


def _pruned(schema: dict[str, Any], value: Any) -> Any:
    """`value` without the fields that the schema does not know."""
    if not isinstance(value, dict) or "properties" not in schema:
        return value
    known = schema["properties"]
    return {name: _pruned(known[name], each) for name, each in value.items() if name in known}


def test_every_field_of_the_spec_is_described() -> None:
    for schema in _walk(SCHEMA["properties"]["spec"]):
        for name, field in schema.get("properties", {}).items():
            assert field.get("description"), name


def test_every_default_is_a_value_that_the_schema_allows() -> None:
    for schema in _walk(SCHEMA):
        if "default" in schema:
            jsonschema.validate(schema["default"], schema)


def test_the_servers_defaults_are_the_operators() -> None:
    stored = document()
    stored["spec"] = with_defaults(SCHEMA["properties"]["spec"], stored["spec"])
    assert parse(stored) == parse(document())
    assert stored["spec"]["decode"] == {
        "replicas": 1,
        "tensorParallel": 1,
        "nodes": 1,
        "device": "cuda",
        "resources": {},
        "engine": {},
    }


SCALARS = st.one_of(
    st.integers(-2, 70),
    st.booleans(),
    st.sampled_from(["", "a", "cpu", "cuda", "auto", "tcp", "Ingress", "x y", "A.b"]),
)
# 9 to 64 are a CPU role's; what a device makes of a number is beyond the schema.
RANKS = SCALARS.filter(lambda value: isinstance(value, str) or not 8 < value < 65)
# Of CPUs: that there is no half a byte of memory is beyond the schema.
QUANTITIES = st.one_of(st.integers(0, 5), st.sampled_from(["1", "500m", "2Gi", "many", "1.5", "-1"]))
WORKERS = st.fixed_dictionaries(
    {},
    optional={
        "replicas": SCALARS,
        "tensorParallel": RANKS,
        "device": SCALARS,
        "resources": st.fixed_dictionaries({}, optional={"requests": st.dictionaries(st.just("cpu"), QUANTITIES)}),
    },
)
SPECS = st.fixed_dictionaries(
    {
        "model": st.fixed_dictionaries(
            {"uri": st.just("hf://a/b")}, optional={"maxLength": SCALARS, "dtype": SCALARS}
        )
    },
    optional={
        "prefill": WORKERS,
        "decode": WORKERS,
        "router": st.fixed_dictionaries({}, optional={"replicas": SCALARS}),
        "transfer": st.fixed_dictionaries({}, optional={"fabric": st.sampled_from(["auto", "tcp", "smoke", 1])}),
        "drain": st.fixed_dictionaries({}, optional={"deadlineSeconds": SCALARS}),
    },
)


@given(SPECS)
def test_schema_and_parse_accept_and_refuse_the_same(spec: dict[str, Any]) -> None:
    found = document(**spec)
    schema = object_schema()
    try:
        jsonschema.Draft4Validator(schema).validate(found)
        by_schema = True
    except jsonschema.ValidationError:
        by_schema = False
    try:
        parse(found)
        by_parse = True
    except InvalidService:
        by_parse = False
    assert by_schema == by_parse


def test_the_manifests_are_valid() -> None:
    manifests = sorted((ROOT / "manifests").glob("*.yaml"))
    assert manifests
    for path in manifests:
        for found in yaml.safe_load_all(path.read_text()):
            if found["kind"] == KIND:
                jsonschema.validate(found, SCHEMA)
                parse(found)

"""The block `engine`: one setting is one validated field, for all workers or for a role's."""

from typing import Any

import pytest
import typer
from isvc_cases import deployments, document, main_container, service

from kvasir_engine.config import FIELDS, KV_FIELDS
from kvasir_engine.entrypoints.cli import app
from kvasir_operator.admission import parse
from kvasir_operator.api import InvalidService
from kvasir_operator.api.engine_settings import NOT_IN_SPEC, SETTINGS, EngineSettings
from kvasir_operator.api.kv_fingerprint import fingerprint
from kvasir_operator.api.structural_schema import structural
from kvasir_operator.api.validation_derived import DERIVED
from kvasir_operator.api.worker_settings import field_name
from kvasir_operator.render import Options, render

OTHER: dict[str, Any] = {
    "kv_cache_memory": "64Mi",
    "page_size": 24,
    "max_running": 8,
    "prefill_chunk": 64,
    "max_waiting": 3,
    "queue_seconds": 2,
    "quantization": "int8",
    "deterministic": True,
    "kv_digests": False,
    "verify_cached_pages": "sampled",
    "attention_backend": "torch",
    "overlap": "on",
    "jump_forward": "off",
    "enforce_eager": True,
    "cuda_graph_max_bs": 8,
}
"""A value that is not the default of each."""

# Of all workers nobody says what only decode workers have.
PLACES = [(name, whose) for name in SETTINGS for whose in ("service", "role")]
PLACES.remove(("cuda_graph_max_bs", "service"))


def refused(**spec: Any) -> list[tuple[str, str]]:
    with pytest.raises(InvalidService) as error:
        parse(document(**spec))
    return [(each.path, each.reason) for each in error.value.problems]


def args_of(role: str, **spec: Any) -> list[str]:
    found: list[str] = main_container(deployments(render(service(**spec), Options()))[role])["args"]
    return found


def worker_params(role: str, **spec: Any) -> dict[str, Any]:
    """What `kvasir worker` reads from the arguments of the role's container."""
    first, *args = args_of(role, **spec)
    assert first == "worker"
    command = typer.main.get_command(app).commands["worker"]  # type: ignore[attr-defined]
    found: dict[str, Any] = command.make_context("worker", args).params
    return found


def test_every_setting_of_the_engine_has_its_one_place() -> None:
    derived = {name.replace("-", "_") for name in DERIVED}
    places = [set(SETTINGS), derived & set(FIELDS), set(NOT_IN_SPEC)]
    assert set.union(*places) == set(FIELDS)
    assert sum(map(len, places)) == len(FIELDS)
    assert set(OTHER) == set(SETTINGS)


@pytest.mark.parametrize("name", SETTINGS)
def test_ranges_choices_and_defaults_are_the_engines(name: str) -> None:
    schema, field = structural(EngineSettings)["properties"][field_name(name)], FIELDS[name]
    assert "default" not in schema, "the service's setting would be hidden by a role's default"
    default = f"{field.default:g}" if isinstance(field.default, float) else field.default_text
    assert f"Default: {default}." in schema["description"]
    assert sorted(schema.get("enum", [])) == sorted(field.choices)
    if schema.get("type") == "integer":
        assert schema["minimum"] == field.setting.minimum
        assert schema["maximum"] == (field.setting.maximum or 2**31 - 1)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("whose", ["service", "role"])
def test_a_field_is_what_the_engine_is_told(name: str, whose: str) -> None:
    block = {"engine": {field_name(name): OTHER[name]}}
    only_decode = name == "cuda_graph_max_bs" or name in KV_FIELDS
    if whose == "service" and name != "cuda_graph_max_bs":
        for role in ("prefill", "decode"):
            assert worker_params(role, **block)[name] == OTHER[name]
    roles = dict.fromkeys(("decode",) if name == "cuda_graph_max_bs" else ("prefill", "decode"), block)
    assert worker_params("decode", **roles)[name] == OTHER[name]
    if not only_decode:
        before = worker_params("prefill")
        assert worker_params("prefill", decode=block) == before


def test_a_roles_field_is_over_the_services() -> None:
    spec: dict[str, Any] = {
        "engine": {"maxRunning": 8, "deterministic": True, "enforceEager": True, "kvCacheMemory": "1Gi"},
        "decode": {"engine": {"maxRunning": 32, "deterministic": False, "enforceEager": False}},
    }
    decode, prefill = worker_params("decode", **spec), worker_params("prefill", **spec)
    names = ("max_running", "deterministic", "enforce_eager", "kv_cache_memory")
    assert [decode[name] for name in names] == [32, False, False, "1Gi"]
    assert [prefill[name] for name in names] == [8, True, True, "1Gi"]


def test_a_service_without_settings_has_the_arguments_that_it_had() -> None:
    assert args_of("decode")[-2:] == ["--drain-seconds", "600"]
    assert args_of("decode", engine={"image": "e:1"}) == args_of("decode")


def test_further_arguments_come_last_the_services_first() -> None:
    spec: dict[str, Any] = {
        "engine": {"maxRunning": 8, "extraArgs": ["--check-pages"]},
        "decode": {"engine": {"extraArgs": ["--gpu-sharers=1"]}},
    }
    assert args_of("decode", **spec)[-4:] == ["--max-running", "8", "--check-pages", "--gpu-sharers=1"]
    assert args_of("prefill", **spec)[-3:] == ["--max-running", "8", "--check-pages"]


@pytest.mark.parametrize("name", [name for name in SETTINGS if name in KV_FIELDS])
def test_a_field_that_changes_the_kv_changes_the_fingerprint_as_its_variable_does(name: str) -> None:
    def label(**spec: Any) -> str:
        found = service(**spec).spec
        assert fingerprint(found, "prefill") == fingerprint(found, "decode")
        return fingerprint(found, "decode")

    said = {"engine": {field_name(name): OTHER[name]}}
    env = [{"name": FIELDS[name].variable, "value": str(OTHER[name])}]
    variable = {"template": {"spec": {"containers": [{"name": "kvasir", "env": env}]}}}
    assert label(**said) != label()
    assert label(**said) == label(prefill=said, decode=said) == label(prefill=variable, decode=said)


@pytest.mark.parametrize(
    ("spec", "path"),
    [
        ({"decode": {"engine": {"pageSize": 24}}}, "spec.decode.engine.pageSize"),
        (
            {"engine": {"kvDigests": False}, "decode": {"engine": {"kvDigests": True}}},
            "spec.decode.engine.kvDigests",
        ),
        ({"prefill": {"engine": {"quantization": "int8"}}}, "spec.prefill.engine.quantization"),
    ],
)
def test_roles_that_cannot_pair_are_refused_by_the_field(spec: dict[str, Any], path: str) -> None:
    assert [(at, "cannot pair" in why) for at, why in refused(**spec)] == [(path, True)]


@pytest.mark.parametrize(("name", "whose"), PLACES)
@pytest.mark.parametrize("by", ["variable", "flag", "flag=", "the role's extraArgs", "the service's extraArgs"])
def test_what_is_said_twice_is_refused_by_path(name: str, whose: str, by: str) -> None:
    field, value = FIELDS[name], str(OTHER[name]).lower()
    flags = [f"--{field.flag}"] if field.type is bool else [f"--{field.flag}", value]
    block = {field_name(name): OTHER[name]}
    spec: dict[str, Any] = {"engine": {}, "decode": {"engine": {}}}
    (spec["engine"] if whose == "service" else spec["decode"]["engine"]).update(block)
    path = {"the service's extraArgs": "spec.engine.extraArgs", "the role's extraArgs": "spec.decode.extraArgs"}
    if by == "variable":
        main = {"name": "kvasir", "env": [{"name": field.variable, "value": value}]}
        spec["decode"]["template"] = {"spec": {"containers": [main]}}
        where = f"spec.decode.template.spec.containers[kvasir].env[{field.variable}]"
    elif by == "the role's extraArgs":
        spec["decode"]["extraArgs"], where = flags, path[by]
    elif by == "the service's extraArgs":
        spec["engine"]["extraArgs"], where = flags, path[by]
    else:
        args = flags if by == "flag" or len(flags) == 1 else ["=".join(flags)]
        spec["decode"]["engine"]["extraArgs"], where = args, "spec.decode.engine.extraArgs"
    says = "spec.engine" if whose == "service" else "spec.decode.engine"
    assert any(
        at == where and why.startswith(f"{field.flag} is set by {says}.{field_name(name)} too")
        for at, why in refused(**spec)
    )


def extra(*args: str, role: str = "decode") -> dict[str, Any]:
    return {role: {"engine": {"extraArgs": list(args)}}}


@pytest.mark.parametrize(
    ("spec", "path", "words"),
    [
        (extra("--max-runing", "8"), "spec.decode.engine.extraArgs[0]", "did you mean --max-running?"),
        (extra("--max-running"), "spec.decode.engine.extraArgs[0]", "takes a value"),
        (extra("--max-running", "many"), "spec.decode.engine.extraArgs[0]", "must be an integer, is 'many'"),
        (extra("--max-running=0"), "spec.decode.engine.extraArgs[0]", "less than 1"),
        (extra("--page-size", "512"), "spec.decode.engine.extraArgs[0]", "more than 256"),
        (extra("--queue-seconds=nan"), "spec.decode.engine.extraArgs[0]", "not a number"),
        (extra("--check-pages=yes"), "spec.decode.engine.extraArgs[0]", "takes no value"),
        (extra("--no-enforce-eager"), "spec.decode.engine.extraArgs[0]", "no flag of `kvasir worker`"),
        (extra("--check-pages", "true"), "spec.decode.engine.extraArgs[1]", "is no flag"),
        (extra("-x"), "spec.decode.engine.extraArgs[0]", "is no flag"),
        (extra("--kv-cache-memory", "64MB"), "spec.decode.engine.extraArgs[0]", "no amount of memory"),
        (extra("--quantization", "fp4"), "spec.decode.engine.extraArgs[0]", "none of none, int8"),
        (extra("--role=both"), "spec.decode.engine.extraArgs[0]", "spec.prefill and spec.decode"),
        (extra("--device", "cpu"), "spec.decode.engine.extraArgs[0]", "use spec.decode.device"),
        ({"engine": {"extraArgs": ["--dtype", "auto"]}}, "spec.engine.extraArgs[0]", "use spec.model.dtype"),
        ({"engine": {"extraArgs": ["--nope"]}}, "spec.engine.extraArgs[0]", "no flag of `kvasir worker`"),
        (
            {"decode": {"extraArgs": ["--check-pages"], "engine": {"extraArgs": ["--check-pages"]}}},
            "spec.decode.extraArgs",
            "use that one alone",
        ),
        ({"engine": {"kvCacheMemory": "500m"}}, "spec.engine.kvCacheMemory", "no amount of memory"),
        ({"engine": {"kvCacheMemory": "64MB"}}, "spec.engine.kvCacheMemory", "quantity"),
        ({"engine": {"pageSize": 0}}, "spec.engine.pageSize", "at least 1"),
        ({"engine": {"maxRunning": "8"}}, "spec.engine.maxRunning", "must be an integer"),
        ({"decode": {"engine": {"overlap": True}}}, "spec.decode.engine.overlap", "must be a string"),
        ({"decode": {"engine": {"image": "e:1"}}}, "spec.decode.engine.image", "unknown field"),
        ({"engine": {"cudaGraphMaxBs": 8}}, "spec.engine.cudaGraphMaxBs", "a prefill worker's steps"),
        (
            {"decode": {"engine": {"cudaGraphMaxBs": 99}}, "engine": {"maxRunning": 8}},
            "spec.decode.engine.cudaGraphMaxBs",
            "more than max-running 8",
        ),
        (
            {"decode": {"tensorParallel": 2}, "engine": {"quantization": "int8"}},
            "spec.engine.quantization",
            "one rank",
        ),
    ],
)
def test_what_the_engine_would_refuse_is_refused_by_its_field(spec: dict[str, Any], path: str, words: str) -> None:
    assert any(at == path and words in why for at, why in refused(**spec)), refused(**spec)


@pytest.mark.parametrize("value", ["many", "0"])
def test_a_variable_is_judged_as_a_field_is(value: str) -> None:
    env = [{"name": "KVASIR_MAX_RUNNING", "value": value}]
    spec = {"decode": {"template": {"spec": {"containers": [{"name": "kvasir", "env": env}]}}}}
    assert [at for at, _ in refused(**spec)] == [
        "spec.decode.template.spec.containers[kvasir].env[KVASIR_MAX_RUNNING]"
    ]


def test_a_value_that_comes_from_elsewhere_is_the_clusters() -> None:
    source = {"configMapKeyRef": {"name": "c", "key": "k"}}
    env = [{"name": "KVASIR_MAX_RUNNING", "valueFrom": source}, {"name": "KVASIR_MAX_WAITING", "value": "$(N)"}]
    service(
        decode={
            "template": {"spec": {"containers": [{"name": "kvasir", "env": env}]}},
            "engine": {"extraArgs": ["--prefill-chunk", "$(CHUNK)"]},
        }
    )


def test_a_problem_of_both_roles_is_said_once() -> None:
    assert len(refused(engine={"kvCacheMemory": "500m", "extraArgs": ["--nope"]})) == 2

"""What decides the KV of a spec's workers, and what cannot pair."""

from typing import Any

import pytest
from isvc_cases import SMOL, deployments, document, service

from kvasir_operator.admission import parse
from kvasir_operator.api import InvalidService
from kvasir_operator.api.kv_fingerprint import fingerprint
from kvasir_operator.render import Options, render


def role_with(env: dict[str, str] | None = None, args: list[str] | None = None) -> dict[str, Any]:
    """A role whose worker gets settings as variables or arguments."""
    variables = [{"name": name, "value": value} for name, value in (env or {}).items()]
    template = {"spec": {"containers": [{"name": "kvasir", "env": variables}]}}
    return {**({"template": template} if env else {}), **({"extraArgs": args} if args else {})}


def kv(**spec: Any) -> str:
    found = service(**spec).spec
    assert fingerprint(found, "prefill") == fingerprint(found, "decode")
    return fingerprint(found, "decode")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({}, {"drain": {"deadlineSeconds": 1}}),
        ({}, {"decode": {"replicas": 5}, "router": {"replicas": 2}}),
        ({}, {"prefill": role_with({"KVASIR_MAX_RUNNING": "8"})}),
        ({}, {"model": {"uri": SMOL, "name": "other", "maxLength": 512}}),
        ({}, {"model": {"uri": SMOL, "dtype": "bfloat16"}}),
        ({}, {"prefill": role_with({"KVASIR_PAGE_SIZE": "16"})}),
        ({}, {role: role_with({"KVASIR_PAGE_SIZE": "32"}) for role in ("prefill", "decode")}),
        ({}, {"decode": role_with({"KVASIR_PAGE_SIZE": "32"})}),
        ({}, {"prefill": {"tensorParallel": 3}}),
        ({"model": {"uri": "hf://a/b@v1"}}, {"model": {"uri": "hf://a/b", "revision": "v1"}}),
        ({}, {"transfer": {"fabric": "tcp"}}),
        ({}, {"prefill": role_with({"KVASIR_PAGE_SIZE": ""})}),
        ({}, {"prefill": role_with({"KVASIR_PAGE_SIZE": "016"})}),
        ({}, {"prefill": role_with({"KVASIR_KV_DIGESTS": "on"}), "decode": role_with({"KVASIR_KV_DIGESTS": "T"})}),
        ({}, {"prefill": role_with({"KVASIR_QUANTIZATION": "none"})}),
    ],
)
def test_an_edit_that_leaves_the_kv_as_it_is(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert kv(**one) == kv(**other)


@pytest.mark.parametrize(
    "edit",
    [
        {"model": {"uri": "hf://a/b"}},
        {"model": {"uri": "hf://a/b@v2"}},
        {"model": {"uri": SMOL, "dtype": "float32"}},
        {role: role_with({"KVASIR_PAGE_SIZE": "24"}) for role in ("prefill", "decode")},
        {role: role_with({"KVASIR_KV_DIGESTS": "false"}) for role in ("prefill", "decode")},
        {role: role_with({"KVASIR_QUANTIZATION": "int8"}) for role in ("prefill", "decode")},
        {role: role_with(args=["--quantization=int8"]) for role in ("prefill", "decode")},
    ],
)
def test_an_edit_that_changes_the_kv(edit: dict[str, Any]) -> None:
    assert kv(**edit) != kv()


@pytest.mark.parametrize(
    ("spec", "path", "words"),
    [
        (
            {"decode": role_with({"KVASIR_PAGE_SIZE": "24"})},
            "spec.decode.template.spec.containers[kvasir].env[KVASIR_PAGE_SIZE]",
            "page-size '24' cannot pair with '16' of spec.prefill",
        ),
        (
            {"prefill": role_with({"KVASIR_PAGE_SIZE": "24"})},
            "spec.prefill.template.spec.containers[kvasir].env[KVASIR_PAGE_SIZE]",
            "page-size '24' cannot pair with '16' of spec.decode",
        ),
        (
            {"prefill": role_with({"KVASIR_KV_DIGESTS": "False"})},
            "spec.prefill.template.spec.containers[kvasir].env[KVASIR_KV_DIGESTS]",
            "kv-digests 'false' cannot pair",
        ),
        (
            {"decode": role_with(args=["--enforce-eager", "--page-size=24"])},
            "spec.decode.extraArgs",
            "page-size '24' cannot pair with '16' of spec.prefill",
        ),
        (
            {"decode": role_with({"KVASIR_QUANTIZATION": "int8"})},
            "spec.decode.template.spec.containers[kvasir].env[KVASIR_QUANTIZATION]",
            "quantization 'int8' cannot pair with 'none' of spec.prefill",
        ),
        (
            {"prefill": role_with(args=["--no-kv-digests"])},
            "spec.prefill.extraArgs",
            "kv-digests 'false' cannot pair",
        ),
    ],
)
def test_roles_whose_kv_differs_are_refused_by_the_field(spec: dict[str, Any], path: str, words: str) -> None:
    with pytest.raises(InvalidService) as error:
        parse(document(**spec))
    found = [problem.reason for problem in error.value.problems if problem.path == path]
    assert any(words in reason for reason in found), error.value


def test_an_extra_flag_wins_over_the_environment_as_it_does_in_the_engine() -> None:
    both = {**role_with({"KVASIR_PAGE_SIZE": "24"}), **role_with(args=["--page-size", "16"])}
    assert kv(decode=both) == kv()


def test_both_roles_may_say_the_same_thing_their_own_way() -> None:
    service(prefill=role_with(args=["--page-size", "24"]), decode=role_with({"KVASIR_PAGE_SIZE": "24"}))


def test_pods_and_deployments_carry_the_label_and_routers_do_not() -> None:
    found = deployments(render(service(), Options()))
    for role in ("prefill", "decode"):
        for metadata in (found[role]["metadata"], found[role]["spec"]["template"]["metadata"]):
            assert metadata["labels"]["serving.kvasir.dev/kv"] == kv()
    assert "serving.kvasir.dev/kv" not in found["router"]["spec"]["template"]["metadata"]["labels"]


def test_a_new_operator_gives_the_pods_that_are_there_the_labels_that_they_have() -> None:
    assert kv() == "fe54337e"


@pytest.mark.parametrize(
    ("rollout", "path"),
    [
        ({"maxSurge": 0}, "spec.rollout.maxUnavailable"),
        ({"maxSurge": "0%", "maxUnavailable": "0"}, "spec.rollout.maxUnavailable"),
        ({"maxSurge": -1}, "spec.rollout.maxSurge"),
        ({"maxSurge": "101%"}, "spec.rollout.maxSurge"),
        ({"maxUnavailable": "half"}, "spec.rollout.maxUnavailable"),
        ({"maxUnavailable": 1.5}, "spec.rollout.maxUnavailable"),
        ({"strategy": "Recreate"}, "spec.rollout.strategy"),
    ],
)
def test_limits_that_make_no_sense_are_refused(rollout: dict[str, Any], path: str) -> None:
    with pytest.raises(InvalidService) as error:
        parse(document(rollout=rollout))
    assert [problem.path for problem in error.value.problems] == [path]


@pytest.mark.parametrize("rollout", [{}, {"maxSurge": "25%"}, {"maxSurge": 0, "maxUnavailable": 1}])
def test_limits_as_deployments_have_them_are_taken(rollout: dict[str, Any]) -> None:
    assert service(rollout=rollout).spec.rollout.max_unavailable == rollout.get("maxUnavailable", 0)

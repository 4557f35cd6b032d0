"""What spec.scaling says: which sizes contradict each other, what the router is told, what one machine refuses."""

from typing import Any

import pytest
from isvc_cases import deployments, document, main_container, service

from kvasir_operator.admission import parse
from kvasir_operator.api import InvalidService
from kvasir_operator.local.errors import LocalError
from kvasir_operator.local.machine import Machine, check
from kvasir_operator.local.manifest import Manifest
from kvasir_operator.render import Options, render


def auto(mode: str = "Auto", **more: Any) -> dict[str, Any]:
    return {"mode": mode, "auto": {"prefill": {"maxReplicas": 4}, "decode": {"maxReplicas": 8}, **more}}


def refused(**spec: Any) -> dict[str, str]:
    with pytest.raises(InvalidService) as error:
        parse(document(**spec))
    return {problem.path: problem.reason for problem in error.value.problems}


@pytest.mark.parametrize(
    ("spec", "field", "reason"),
    [
        ({"scaling": {"mode": "Auto"}}, "", "is required with mode Auto"),
        ({"scaling": {"mode": "Shadow"}}, "", "is required with mode Shadow"),
        ({"scaling": auto("Fixed")}, "", "means nothing with mode Fixed"),
        ({"scaling": auto("External")}, "", "means nothing with mode External"),
        ({"scaling": auto(prefill={})}, ".prefill.maxReplicas", "is required"),
        ({"scaling": auto(prefill={"maxReplicas": 1, "minReplicas": 2})}, ".prefill.minReplicas", "more than"),
        ({"scaling": auto(decode={"maxReplicas": 1, "minReplicas": 0})}, ".decode.minReplicas", "scaleToZero"),
        (
            {"scaling": auto(decode={"maxReplicas": 0, "minReplicas": 0})},
            ".decode.maxReplicas",
            "nothing is served",
        ),
        ({"scaling": auto(scaleToZero={"idleSeconds": 60})}, ".scaleToZero.idleSeconds", "less than stabil"),
        ({"scaling": auto(maxGpus=1)}, ".maxGpus", "which take 2"),
        (
            {"scaling": auto(maxGpus=8), "prefill": {"device": "cpu"}, "decode": {"device": "cpu"}},
            ".maxGpus",
            "no role has device cuda",
        ),
    ],
)
def test_what_contradicts_itself_is_refused_by_its_field(spec: dict[str, Any], field: str, reason: str) -> None:
    problems = refused(**spec)
    assert list(problems) == [f"spec.scaling.auto{field}"]
    assert reason in problems[f"spec.scaling.auto{field}"]


def test_without_a_router_nobody_tells_of_the_load() -> None:
    assert list(refused(scaling=auto(), router={"replicas": 0})) == ["spec.router.replicas"]


def test_decode_may_be_all_there_is() -> None:
    found = service(scaling=auto(prefill={"maxReplicas": 0, "minReplicas": 0})).spec.scaling.auto
    assert found is not None
    assert (found.prefill.max_replicas, found.decode.min_replicas) == (0, 1)


def router_args(**spec: Any) -> list[str]:
    args: list[str] = main_container(deployments(render(service(**spec), Options()))["router"])["args"]
    return args


def test_only_a_router_whose_workers_come_for_requests_holds_them() -> None:
    zero = {"holdSeconds": 90, "holdRequests": 7}
    args = router_args(scaling=auto(scaleToZero=zero))
    at = args.index("--hold-seconds")
    assert args[at : at + 4] == ["--hold-seconds", "90", "--hold-requests", "7"]
    assert "--hold-seconds" not in router_args(scaling=auto())
    assert "--hold-seconds" not in router_args(scaling=auto("Shadow", scaleToZero=zero))


def test_scaling_alone_rolls_no_pod() -> None:
    before, after = (
        {role: each["metadata"]["name"] for role, each in deployments(render(found, Options())).items()}
        for found in (service(), service(scaling=auto(scaleToZero={})))
    )
    assert before == after, "the router's pods may, workers do not"


@pytest.mark.parametrize("mode", ["Auto", "Shadow"])
def test_one_machine_refuses_what_scales(mode: str) -> None:
    cpu = {"device": "cpu"}
    found = service(prefill=cpu, decode=cpu, scaling=auto(mode))
    with pytest.raises(LocalError, match=f"spec.scaling.mode is {mode}, and nothing scales .*: use Fixed"):
        check(Manifest(found, {}), Machine())

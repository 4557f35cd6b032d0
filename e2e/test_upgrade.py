"""From the last commit's chart and operator to these, with a service running; and a release that leaves and comes
back under another name. No pod is rolled unless the spec says so."""

import io
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from e2e import kvasir, steps, tiny
from e2e.controlplane.cluster import Cluster
from e2e.steps import Object, condition, eventually, pods

NAMESPACE = "upgraded"
NAME = "stays"
NEXT = "kvasir-engine:next"
AGAIN = "kvasir-again"  # also the name of its Deployment and Lease, as it has the chart's in it
READY_SECONDS = 180
DECLARED = Path("tests/operator/corpus/revisions.yaml")


def git(*arguments: str) -> bytes:
    """What git says of this checkout; skips where it says nothing."""
    done = subprocess.run(["git", "-C", str(kvasir.REPOSITORY), *arguments], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"no last commit: {done.stderr.decode().strip()}")
    return done.stdout


@pytest.fixture(scope="module")
def earlier() -> Iterator[Path]:
    """The tree of the last commit, within the checkout, as pods see nothing else of this machine. What is not
    committed yet comes after HEAD; where all is, HEAD comes after its parent. $E2E_UPGRADE_FROM names another."""
    last = "HEAD" if git("status", "--porcelain").strip() else "HEAD^"
    revision = os.environ.get("E2E_UPGRADE_FROM", last)
    parts = ("charts", "engine", "operator", str(DECLARED))
    packed = git("archive", git("rev-parse", "--verify", revision).decode().strip(), *parts)
    cache = kvasir.REPOSITORY / ".cache"
    cache.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix="last-commit-") as folder:
        Path(folder).chmod(0o755)
        with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
            archive.extractall(folder, filter="data")
        yield Path(folder)


def upgraded(cluster: Cluster, chart: Path, *sets: str, release: str = kvasir.RELEASE) -> None:
    """`helm upgrade` or install with these values and no others, and its operator."""
    values = [word for value in sets for word in ("--set", value)]
    cluster.helm(
        "upgrade", "--install", release, str(chart), "--namespace", kvasir.NAMESPACE, "--reset-values", *values
    )
    cluster.kubectl("-n", kvasir.NAMESPACE, "rollout", "status", "deployment", release, "--timeout=120s")


@pytest.fixture(scope="module")
def code(earlier: Path) -> str:
    """The value by which Python runs the last commit's operator."""
    path = f"{earlier / 'operator'}:{earlier / 'engine'}"
    where = "import kvasir_operator, kvasir_engine; print(kvasir_operator.__file__, kvasir_engine.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", where], env={"PYTHONPATH": path}, capture_output=True, text=True, check=True
    )
    assert all(each.startswith(str(earlier)) for each in done.stdout.split())
    return path


@pytest.fixture(scope="module")
def namespace(cluster: Cluster) -> Iterator[str]:
    tiny.make()
    try:
        with steps.scratch(cluster, NAMESPACE) as name:
            yield name
            cluster.kubectl("-n", name, "delete", "kvi", "--all", "--timeout=120s")
    finally:
        upgraded(cluster, kvasir.CHART)


def service(**spec: Any) -> Object:
    """A pair of small workers, in words that the last commit knows too."""
    env = [{"name": "KVASIR_KV_CACHE_MEMORY", "value": "64Mi"}]
    workers = {
        "device": "cpu",
        "resources": {"requests": {"cpu": "100m", "memory": "256Mi"}},
        "template": {"spec": {"containers": [{"name": "kvasir", "env": env}]}},
    }
    return {
        "apiVersion": "serving.kvasir.dev/v1alpha1",
        "kind": "InferenceService",
        "metadata": {"name": NAME},
        "spec": {
            "model": {"uri": tiny.URI, "name": NAME, "dtype": "float32"},
            "prefill": workers,
            "decode": workers,
            "drain": {"deadlineSeconds": 20},
            **spec,
        },
    }


def reconciled(cluster: Cluster, release: str, change: Object) -> Object:
    """Apply a change, and return the service once that release's operator has carried it out, and it is Ready."""
    steps.apply(cluster, change, namespace=NAMESPACE)

    def done() -> Object | None:
        found = cluster.get("kvi", NAME, "-n", NAMESPACE)
        status = found.get("status", {})
        current = status.get("observedGeneration") == found["metadata"]["generation"]
        whose = status.get("operator") == f"{kvasir.NAMESPACE}/{release}"
        complete = condition(found, "Progressing").get("status") == "False"
        ready = condition(found, "Ready").get("status") == "True"
        return found if current and whose and complete and ready else None

    return eventually(done, READY_SECONDS, "the operator has carried the change out", cluster)


def running(cluster: Cluster) -> dict[str, tuple[str, int]]:
    """The service's pods by uid: image and restarts."""
    found = pods(cluster, NAMESPACE, f"serving.kvasir.dev/inferenceservice={NAME}")
    return {pod["metadata"]["uid"]: (pod["spec"]["containers"][0]["image"], steps.restarts(pod)) for pod in found}


def last_declared(tree: Path) -> dict[int, object]:
    """By number of defaults, the revisions that were declared last."""
    return {each.get("defaults", 1): each["revisions"] for each in yaml.safe_load((tree / DECLARED).read_text())}


def test_an_upgrade_from_the_last_commits_chart_rolls_no_pod_unless_the_spec_asks(
    cluster: Cluster, namespace: str, earlier: Path, code: str
) -> None:
    upgraded(cluster, earlier / "charts" / "kvasir", "env[0].name=PYTHONPATH", f"env[0].value={code}")
    reconciled(cluster, kvasir.RELEASE, service())
    before = running(cluster)
    assert len(before) == 3
    upgraded(cluster, kvasir.CHART, f"engine.image={NEXT}")
    # An edit that rolls nothing tells that the operator that runs now has looked.
    found = reconciled(cluster, kvasir.RELEASE, service(rollout={"maxSurge": 2}))
    old, new = last_declared(earlier), last_declared(kvasir.REPOSITORY)
    if all(new.get(number) == revisions for number, revisions in old.items()):
        assert running(cluster) == before
        assert found["status"]["release"]["image"] == next(iter(before.values()))[0]
    follows = {"engine": {"imagePolicy": "FollowOperator"}, "rollout": {"maxSurge": 2}}
    found = reconciled(cluster, kvasir.RELEASE, service(**follows))
    assert found["status"]["release"]["image"] == NEXT

    def all_new() -> bool:
        return {image for image, _ in running(cluster).values()} == {NEXT}

    eventually(all_new, READY_SECONDS, "all pods have the new image", cluster)
    assert not running(cluster).keys() & before.keys()


def test_a_release_that_leaves_and_comes_back_under_another_name_finds_its_services_as_they_were(
    cluster: Cluster, namespace: str
) -> None:
    upgraded(cluster, kvasir.CHART)
    reconciled(cluster, kvasir.RELEASE, service())
    before = running(cluster)
    kvasir.uninstall(cluster)
    assert running(cluster) == before, "an uninstall leaves the services to serve"
    upgraded(cluster, kvasir.CHART, f"engine.image={NEXT}", release=AGAIN)
    try:
        # The Lease that was left behind is no operator's: whoever knows that need not wait for a minute.
        cluster.kubectl("-n", kvasir.NAMESPACE, "delete", "lease", kvasir.RELEASE, "--ignore-not-found")
        reconciled(cluster, AGAIN, service(rollout={"maxSurge": 2}))
        assert running(cluster) == before
    finally:
        cluster.helm("uninstall", AGAIN, "--namespace", kvasir.NAMESPACE, "--wait")
        cluster.kubectl("-n", kvasir.NAMESPACE, "delete", "lease", AGAIN, "--ignore-not-found")
        upgraded(cluster, kvasir.CHART)
    reconciled(cluster, kvasir.RELEASE, service(rollout={"maxSurge": 1}))
    assert running(cluster) == before

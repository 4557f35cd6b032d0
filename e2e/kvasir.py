"""Kvasir in a cluster: installed by Helm as a user would, and taken out again."""

import subprocess
import sys
from pathlib import Path

from e2e.controlplane.cluster import Cluster

REPOSITORY = Path(__file__).resolve().parents[1]
CHART = REPOSITORY / "charts" / "kvasir"
RELEASE = "kvasir"
NAMESPACE = "kvasir-system"


def install(cluster: Cluster) -> None:
    """`helm install`, without waiting: pods need controllers and nodes, which may come later."""
    cluster.helm("install", RELEASE, str(CHART), "--namespace", NAMESPACE, "--create-namespace")


def uninstall(cluster: Cluster) -> None:
    """`helm uninstall`, waiting for its objects to go."""
    cluster.helm("uninstall", RELEASE, "--namespace", NAMESPACE, "--wait")


def wait_for_operator(cluster: Cluster) -> None:
    """Return when the operator's Deployment is available."""
    cluster.kubectl(
        *("-n", NAMESPACE, "wait", "deployment", "--all", "--for=condition=Available", "--timeout=120s")
    )


def fetch(uri: str) -> None:
    """`kvasir fetch` into this user's cache; seconds when it is there."""
    subprocess.run([sys.executable, "-m", "kvasir_engine.entrypoints.cli", "fetch", uri], check=True)

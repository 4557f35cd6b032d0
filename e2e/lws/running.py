"""The controller of LeaderWorkerSets as a program of the cluster."""

from collections.abc import Iterator
from contextlib import contextmanager

from e2e.controlplane.agents import python
from e2e.controlplane.cluster import Cluster
from e2e.controlplane.process import Program

_STOP_SECONDS = 5.0


@contextmanager
def controlled(cluster: Cluster) -> Iterator[Program]:
    """Have LeaderWorkerSets seen to meanwhile."""
    kubeconfig = str(cluster.root / "pki" / "node.kubeconfig")
    program = python("lws", cluster.namespace, cluster.logs, "-m", "e2e.lws", kubeconfig)
    try:
        yield program
        program.check()
    finally:
        program.terminate(_STOP_SECONDS)

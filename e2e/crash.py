"""The installed operator's place taken by one that is killed after its writes (`crashing.py`)."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager

from e2e import kvasir, netns
from e2e.controlplane.agents import python
from e2e.controlplane.cluster import Cluster
from e2e.controlplane.process import Program

_DEPLOYMENT = ("deployment", kvasir.RELEASE)
_NAME = "crashing"
_SYSTEM = ("-n", kvasir.NAMESPACE)


@contextmanager
def operator_killed(cluster: Cluster, writes: int = 1, lives: int = -1) -> Iterator[Program]:
    """Meanwhile the only operator is one whose first `lives` lives (-1: all) end after `writes` writes each.

    It has the installed one's account and arguments, but no Lease: a killed leader's is free after 15 seconds only.
    """
    installed = cluster.get(*_DEPLOYMENT, *_SYSTEM)["spec"]
    pod = installed["template"]["spec"]
    arguments = [word for word in pod["containers"][0]["args"] if word != "--leader-elect"]
    cluster.kubectl(*_SYSTEM, "scale", *_DEPLOYMENT, "--replicas=0")
    labels = ",".join(f"{key}={value}" for key, value in installed["selector"]["matchLabels"].items())
    cluster.kubectl(*_SYSTEM, "wait", "pods", "-l", labels, "--for=delete", "--timeout=120s")
    access = {"KUBECONFIG": _kubeconfig(cluster, pod["serviceAccountName"]), "POD_NAMESPACE": kvasir.NAMESPACE}
    counts = (str(writes), str(lives))
    (cluster.logs / f"{_NAME}.log").unlink(missing_ok=True)  # of this use only: `ends` reads it
    program = python(_NAME, cluster.namespace, cluster.logs, "-m", "e2e.crashing", *counts, *arguments, **access)
    try:
        yield program
        program.check()
    finally:
        program.kill()
        cluster.kubectl(*_SYSTEM, "scale", *_DEPLOYMENT, f"--replicas={installed['replicas']}")
        kvasir.wait_for_operator(cluster)


def ends(program: Program) -> list[str]:
    """The writes after which it was killed so far, as method and path."""
    return re.findall(r"^killed after (.*)$", program.log.read_text(), re.M)


def _kubeconfig(cluster: Cluster, account: str) -> str:
    token = cluster.kubectl(*_SYSTEM, "create", "token", account).stdout.strip()
    server = {
        "server": f"https://{netns.GATEWAY}:6443",
        "certificate-authority": str(cluster.root / "pki" / "ca.crt"),
    }
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "c", "cluster": server}],
        "users": [{"name": "u", "user": {"token": token}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
        "current-context": "x",
    }
    path = cluster.root / f"{account}.kubeconfig"
    path.write_text(json.dumps(config))
    return str(path)

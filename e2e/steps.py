"""What the tests do with a cluster, in a word each."""

import json
import os
import signal
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import openai

from e2e import netns
from e2e.controlplane.cluster import Cluster

Object = dict[str, Any]
T = TypeVar("T")

_POLL_SECONDS = 0.25
_MOST_RESTARTS = 2


def eventually(look: Callable[[], T | None], seconds: float, what: str, cluster: Cluster) -> T:
    """Look until there is something to return; AssertionError after `seconds`, ClusterError if the cluster dies."""
    deadline = time.monotonic() + seconds
    while not (found := look()):
        cluster.check()
        assert time.monotonic() < deadline, f"not seen within {seconds:g} s: {what}"
        time.sleep(_POLL_SECONDS)
    return found


def apply(cluster: Cluster, *objects: Mapping[str, Any], namespace: str = "default") -> None:
    """`kubectl apply` the objects."""
    items = {"apiVersion": "v1", "kind": "List", "items": list(objects)}
    cluster.kubectl("-n", namespace, "apply", "-f", "-", input=json.dumps(items))


def pods(cluster: Cluster, namespace: str, selector: str = "") -> list[Object]:
    """The namespace's pods."""
    items: list[Object] = cluster.get("pods", "-n", namespace, "-l", selector)["items"]
    return items


def ready(pod: Mapping[str, Any]) -> bool:
    """Whether the pod is Ready."""
    return condition(pod, "Ready").get("status") == "True"


def restarts(pod: Mapping[str, Any]) -> int:
    """How often the pod's container was restarted."""
    return sum(int(status["restartCount"]) for status in pod["status"].get("containerStatuses") or ())


def condition(item: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
    """A condition of an object's status, empty when it is absent."""
    found: Sequence[Mapping[str, Any]] = item.get("status", {}).get("conditions") or ()
    return next((c for c in found if c["type"] == kind), {})


def log_of(cluster: Cluster, pod: Mapping[str, Any]) -> str:
    """What the pod's container has printed."""
    meta = pod["metadata"]
    folder = cluster.root / "nodes" / "pods" / f"{meta['namespace']}_{meta['name']}_{meta['uid']}"
    path = folder / f"{pod['spec']['containers'][0]['name']}.log"
    return path.read_text(errors="replace") if path.exists() else ""


def http(cluster: Cluster, host: str, port: int, path: str) -> str:
    """GET from the test process, by a door into the cluster. Raises OSError."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://127.0.0.1:{cluster.port(host, port)}{path}", timeout=10) as response:
        body: bytes = response.read()
    return body.decode()


def wait_ready(cluster: Cluster, namespace: str, name: str, seconds: float) -> Object:
    """The InferenceService, once it is Ready; AssertionError with the conditions that are not True."""
    seen: Object = {}

    def look() -> bool:
        seen.clear()
        seen.update(cluster.get("kvi", name, "-n", namespace))
        crashed = [pod["metadata"]["name"] for pod in pods(cluster, namespace) if restarts(pod) > _MOST_RESTARTS]
        assert not crashed, f"pods crash again and again: {crashed}"
        return condition(seen, "Ready").get("status") == "True"

    try:
        eventually(look, seconds, f"{name} is Ready", cluster)
    except AssertionError as error:
        conditions = seen.get("status", {}).get("conditions") or ()
        unmet = [f"{c['type']}: {c['reason']}: {c['message']}" for c in conditions if c["status"] != "True"]
        raise AssertionError("\n".join([str(error), *unmet])) from None
    return seen


def client(cluster: Cluster, namespace: str, name: str, patience: float = 30.0) -> openai.OpenAI:
    """The official client, at the ClusterIP of the InferenceService's router. `patience`: seconds between bytes."""
    address = cluster.get("service", f"{name}-router", "-n", namespace)["spec"]["clusterIP"]
    url = f"http://127.0.0.1:{cluster.port(address, 80)}/v1"
    return openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=patience)


def pod_networks(cluster: Cluster) -> set[str]:
    """The network namespaces of pods that exist on this machine; a pod's processes cannot outlive its own."""
    return set(netns.names(f"{cluster.namespace}.pod-"))


def kill(cluster: Cluster, pod: Mapping[str, Any]) -> None:
    """SIGKILL to what runs of the pod's container."""
    address = f"{pod['status']['podIP']}/"
    (network,) = (name for name in pod_networks(cluster) if address in netns.ip("-n", name, "-br", "addr"))
    for pid in netns.ip("netns", "pids", network).split():
        with suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)


@contextmanager
def scratch(cluster: Cluster, name: str) -> Iterator[str]:
    """A Kubernetes namespace for one test."""
    cluster.kubectl("create", "namespace", name)
    yield name
    cluster.kubectl("delete", "namespace", name, "--wait=false")


def node_unknown(cluster: Cluster, name: str) -> None:
    """Write what the node lifecycle controller writes of a node whose agent is silent for its grace period.

    The period itself (40 s by default) is not waited for. Taints and evictions are the real controllers'.
    """
    unknown = {"type": "Ready", "status": "Unknown", "reason": "NodeStatusUnknown"}
    _patch_status(cluster, {"conditions": [unknown]}, "node", name)
    for pod in _pods_on(cluster, name):
        not_ready = {"conditions": [{"type": "Ready", "status": "False"}]}
        _patch_status(cluster, not_ready, "pod", pod["metadata"]["name"], "-n", pod["metadata"]["namespace"])


def forget_node(cluster: Cluster, name: str) -> None:
    """Delete a lost node and its pods, as whoever knows that the machine is no more does."""
    for pod in _pods_on(cluster, name):
        meta = pod["metadata"]
        force = ("--force", "--grace-period=0", "--ignore-not-found")
        cluster.kubectl("-n", meta["namespace"], "delete", "pod", meta["name"], *force)
    cluster.kubectl("delete", "node", name, "--ignore-not-found")


def _pods_on(cluster: Cluster, node: str) -> list[Object]:
    items: list[Object] = cluster.get("pods", "-A", "--field-selector", f"spec.nodeName={node}")["items"]
    return items


def _patch_status(cluster: Cluster, status: Mapping[str, Any], *target: str) -> None:
    cluster.kubectl("patch", *target, "--subresource=status", "-p", json.dumps({"status": status}))

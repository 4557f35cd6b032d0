"""The node agent: what a kubelet is to each node, for all nodes of a test in one process.

It registers the nodes, and runs the pods that the scheduler binds to them: as processes of this machine, started,
probed, restarted and stopped by the operator's own `kvasir_operator.pods.PodRunner`, each in its own network
namespace at its own IP (`netns.py`) and in a sandbox with its volumes and credentials (`sandbox.py`). Images are
not pulled: the commands that pods name (`kvasir`, `kvasir-operator`) are this checkout's.

Not done: logs and exec through the API (the logs are files below `state`), projected volumes beside the service
account's, init containers, cgroup limits, users. Nodes are Ready once registered; no
heartbeat follows (the controller-manager's grace period is longer than a test run).
"""

import asyncio
import logging
from datetime import UTC, datetime

from e2e import netns
from e2e.node.api import STRATEGIC, Api, ApiError, Object
from e2e.node.config import Config, Node
from e2e.node.names import Names
from e2e.node.pod import NodePod, background

log = logging.getLogger(__name__)


class Agent:
    """Runs `config.nodes` until cancelled."""

    def __init__(self, api: Api, config: Config) -> None:
        self._api = api
        self._config = config
        self._nodes = {node.name: (index, node) for index, node in enumerate(config.nodes, start=config.first)}
        self._pods: dict[str, NodePod] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._names = Names()
        self._serial = 0

    async def run(self) -> None:
        """Register the nodes and follow the pods. Cancelling kills all pods and returns when they are gone."""
        for index, node in self._nodes.values():
            await self._register(index, node)
        try:
            async with asyncio.TaskGroup() as following:
                following.create_task(self._api.mirror("/api/v1/pods", self._apply))
                following.create_task(self._api.mirror("/api/v1/secrets", self._show))
        finally:
            tasks = list(self._tasks.values())
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _register(self, index: int, node: Node) -> None:
        address = _node_address(index)
        await asyncio.to_thread(netns.ip, "-n", self._config.netns, "addr", "add", f"{address}/32", "dev", "br0")
        labels = {"kubernetes.io/hostname": node.name, "kubernetes.io/os": "linux", "kubernetes.io/arch": "amd64"}
        taints = [{"key": t.key, "effect": t.effect, "value": t.value} for t in node.taints]
        created = {
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": node.name, "labels": {**labels, **node.labels}},
            "spec": {"taints": taints},
        }
        try:
            await self._api.request("POST", "/api/v1/nodes", created)
        except ApiError as error:
            if error.status != 409:
                raise
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        ready = {
            "type": "Ready",
            "status": "True",
            "reason": "KubeletReady",
            "message": "the node agent runs",
            "lastHeartbeatTime": now,
            "lastTransitionTime": now,
        }
        addresses = [{"type": "InternalIP", "address": address}, {"type": "Hostname", "address": node.name}]
        status = {
            "capacity": node.capacity,
            "allocatable": node.capacity,
            "conditions": [ready],
            "addresses": addresses,
            "nodeInfo": _node_info(),
        }
        await self._api.request(
            "PATCH", f"/api/v1/nodes/{node.name}/status", {"status": status}, content_type=STRATEGIC
        )
        log.info("node %s registered at %s", node.name, address)

    def _apply(self, uid: str, pod: Object | None) -> None:
        self._names.update(uid, pod)
        if uid in self._pods:
            self._pods[uid].update(pod)
        elif pod is not None and pod["spec"].get("nodeName") in self._nodes and not _over(pod):
            self._begin(uid, pod)

    def _show(self, uid: str, secret: Object | None) -> None:
        """What a pod was shown of a Secret that is gone, it keeps."""
        for pod in self._pods.values():
            if secret is not None:
                pod.secret_changed(secret)

    def _begin(self, uid: str, pod: Object) -> None:
        index, node = self._nodes[pod["spec"]["nodeName"]]
        self._serial += 1
        running = NodePod(
            self._api,
            self._config,
            self._names,
            node,
            _node_address(index),
            pod,
            self._address(index),
            f"{index}-{self._serial}",
        )
        self._pods[uid] = running
        running.update(pod)

        def done(task: "asyncio.Task[None]") -> None:
            del self._pods[uid], self._tasks[uid]
            if not task.cancelled() and (error := task.exception()):
                log.error("pod %s: %r", pod["metadata"]["name"], error, exc_info=error)

        self._tasks[uid] = background(running.run(), done)

    def _address(self, index: int) -> str:
        """A free address of a node's range."""
        used = {pod.ip for pod in self._pods.values()}
        return next(ip for last in range(2, 255) if (ip := f"10.244.{index}.{last}") not in used)


def _over(pod: Object) -> bool:
    """Whether nothing runs of a deleted pod any more, and only a finalizer keeps its object."""
    meta = pod["metadata"]
    return bool(meta.get("deletionTimestamp")) and meta.get("deletionGracePeriodSeconds") == 0


def _node_address(index: int) -> str:
    return f"10.244.{index}.1"


def _node_info() -> dict[str, str]:
    known = {
        "operatingSystem": "linux",
        "architecture": "amd64",
        "kubeletVersion": "v1.20.2",
        "osImage": "Kvasir e2e",
    }
    unknown = ("machineID", "systemUUID", "bootID", "kernelVersion", "containerRuntimeVersion", "kubeProxyVersion")
    return known | dict.fromkeys(unknown, "")

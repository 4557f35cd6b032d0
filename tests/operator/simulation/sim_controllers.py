"""What else works in a cluster: the Deployment controller, kubelets and garbage collection, late and unreliable.

The controller of LeaderWorkerSets is in `sim_groups.py`.
"""

import asyncio
import hashlib
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
from sim_apply import Object
from sim_groups import GROUP, INDEX, Groups
from sim_server import SETS, Server

ROLE = "serving.kvasir.dev/role"
SERVICE = "serving.kvasir.dev/inferenceservice"
HASH = "pod-template-hash"
_ROOTS = {"deployments": "/apis/apps/v1", "leaderworkersets": SETS}
ELSEWHERE = "uid-elsewhere"  # of an owner that is no part of the simulation, and alive


@dataclass
class Weather:
    """How the cluster behaves: `fair` is what it does once the faults have stopped."""

    fair: bool = False
    controller_seconds: float = 1.0
    start_seconds: float = 20.0
    leave_seconds: float = 10.0
    fail_chance: float = 0.2


class Controllers:
    """Moves Deployments, pods and orphans on, some time after each change that concerns them."""

    def __init__(
        self, server: Server, chance: random.Random, weather: Weather, note: Callable[[str], None]
    ) -> None:
        self._server = server
        self._chance = chance
        self._weather = weather
        self._note = note
        self._due: set[str] = set()
        self._pods = 0
        self._collecting = False
        self._loop = asyncio.get_running_loop()
        self._groups = Groups(server, self._run_pod, self.evict, is_ready)
        server.watchers.append(self._changed)

    def _changed(self, plural: str, item: Object, gone: bool) -> None:
        namespace, name, keeper = item["metadata"]["namespace"], item["metadata"]["name"], plural
        if plural == "pods":
            (owner,) = item["metadata"]["ownerReferences"]
            name, keeper = owner["name"], f"{owner['kind'].lower()}s"
            if keeper == "replicasets":  # the Deployment's controller is theirs too here
                name, keeper = name.rpartition("-")[0], "deployments"
        if keeper in _ROOTS:
            self._soon(f"{_ROOTS[keeper]}/namespaces/{namespace}/{keeper}/{name}")
        # An owner that goes leaves orphans, and an operator may create one after its owner went.
        if (gone or plural != "pods") and not self._collecting:
            self._collecting = True
            self._later(self._weather.controller_seconds, self._collect)

    def _soon(self, path: str) -> None:
        if path not in self._due:
            self._due.add(path)
            self._later(self._weather.controller_seconds, lambda: self._sync(path))

    def _later(self, most: float, do: Callable[[], None]) -> None:
        self._loop.call_later(self._chance.uniform(0.01, most), do)

    # Deployments

    def _sync(self, path: str) -> None:
        self._due.discard(path)
        item = self._server.get(path)
        if item is None:
            return
        if path.startswith(SETS):
            self._groups.sync(path, item)
            return
        template, wanted = item["spec"]["template"], item["spec"].get("replicas", 1)
        revision = _hash(template)
        pods = [(p, pod) for p, pod in self._pods_of(item) if "deletionTimestamp" not in pod["metadata"]]
        newest = [p for p, pod in pods if pod["metadata"]["labels"][HASH] == revision]
        ready = [p for p, pod in pods if is_ready(pod)]
        for _ in range(min(wanted - len(newest), wanted + 1 - len(pods))):
            self._create_pod(item, revision)
        # Of those that are to go: old ones that are not ready, then old ones that are spare, then new ones.
        doomed = [p for p, _ in pods if p not in newest and (p not in ready or wanted == 0)]
        old_ready = [p for p, _ in pods if p not in newest and p in ready]
        spare = len(ready) - wanted
        doomed += [p for p in old_ready[: max(0, spare)] if p not in doomed]
        surplus = len(newest) - wanted
        if surplus > 0:
            doomed += sorted(newest, key=lambda p: p in ready)[:surplus]
        for each in doomed:
            self.evict(each)
        self._count(path)

    def _count(self, path: str) -> None:
        item = self._server.get(path)
        assert item is not None
        template = item["spec"]["template"]
        revision = _hash(template)
        pods = [pod for _, pod in self._pods_of(item) if "deletionTimestamp" not in pod["metadata"]]
        status = {
            "observedGeneration": item["metadata"]["generation"],
            "replicas": len(pods),
            "updatedReplicas": sum(pod["metadata"]["labels"][HASH] == revision for pod in pods),
            "readyReplicas": sum(map(is_ready, pods)),
        }
        status["availableReplicas"] = status["readyReplicas"]
        status["unavailableReplicas"] = max(0, item["spec"].get("replicas", 1) - status["readyReplicas"])
        self._server.replace(path, status={key: value for key, value in status.items() if value})

    def _pods_of(self, deployment: Object) -> list[tuple[str, Object]]:
        uid = deployment["metadata"]["uid"]
        return [
            (path, pod)
            for path, pod in self._server.items("pods")
            if pod["metadata"]["ownerReferences"][0]["uid"] == uid
        ]

    # Pods

    def _create_pod(self, deployment: Object, revision: str) -> None:
        self._pods += 1
        metadata, template = deployment["metadata"], deployment["spec"]["template"]
        name = f"{metadata['name']}-{revision}-{self._pods}"
        pod = {
            "metadata": {
                "name": name,
                "namespace": metadata["namespace"],
                "labels": {**template["metadata"]["labels"], HASH: revision},
                "annotations": template["metadata"].get("annotations", {}),
                "ownerReferences": [
                    {
                        "uid": metadata["uid"],
                        "name": f"{metadata['name']}-{revision}",
                        "kind": "ReplicaSet",
                        "controller": True,
                    }
                ],
            },
            "spec": {},
            "status": {"phase": "Pending"},
        }
        self._run_pod(f"/api/v1/namespaces/{metadata['namespace']}/pods/{name}", pod)

    def _run_pod(self, path: str, pod: Object) -> None:
        uid = self._server.create(path, pod, "kube-controller-manager")["metadata"]["uid"]
        self._later(self._weather.start_seconds, lambda: self._start(path, uid))

    def _start(self, path: str, uid: str) -> None:
        pod = self._server.get(path)
        if pod is None or pod["metadata"]["uid"] != uid or "deletionTimestamp" in pod["metadata"] or is_ready(pod):
            return  # the pods of a group have their predecessors' names
        if not self._weather.fair and self._chance.random() < self._weather.fail_chance:
            waiting = {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off"}}
            last = {"terminated": {"exitCode": 1, "message": "simulated"}}
            statuses = [{"name": "kvasir", "state": waiting, "lastState": last, "ready": False}]
            self._server.replace(path, status={"phase": "Running", "containerStatuses": statuses})
            self._later(self._weather.start_seconds, lambda: self._start(path, uid))
            return
        if pod["metadata"]["labels"][ROLE] == "router" and not self._has_workers(pod):
            self._later(2.0, lambda: self._start(path, uid))  # its readiness probe asks again
            return
        self.set_ready(path, True)

    def _has_workers(self, router: Object) -> bool:
        labels = router["metadata"]["labels"]
        return self._holds(labels[SERVICE]) or any(
            is_ready(pod)
            for _, pod in self._server.items("pods")
            if pod["metadata"]["labels"][SERVICE] == labels[SERVICE]
            and pod["metadata"]["labels"][ROLE] == "decode"
            and not is_follower(pod)
            and pod["metadata"]["namespace"] == router["metadata"]["namespace"]
        )

    def _holds(self, name: str) -> bool:
        """Whether its routers take requests without workers."""
        found = (
            item["spec"] for _, item in self._server.items("inferenceservices") if item["metadata"]["name"] == name
        )
        scaling: dict[str, Any] = next(found, {}).get("scaling", {})
        return scaling.get("mode") == "Auto" and "scaleToZero" in scaling["auto"]

    def set_ready(self, path: str, ready: bool) -> None:
        """What a readiness probe finds out; one that fails is ready again some time later."""
        pod = self._server.get(path)
        if pod is None or "deletionTimestamp" in pod["metadata"]:
            return
        word = "True" if ready else "False"
        conditions = [
            {"type": "PodScheduled", "status": "True"},
            {"type": "Ready", "status": word, "since": self._loop.time()},
        ]
        status = {"phase": "Running", "conditions": conditions, "podIP": path.rpartition("/")[2]}
        self._server.replace(path, status=status)
        self._note(f"pod {path.rpartition('/')[2]} ready={word}")
        if not ready:
            uid = pod["metadata"]["uid"]
            self._later(self._weather.start_seconds, lambda: self._start(path, uid))

    def evict(self, path: str) -> None:
        """Delete a pod with its grace period."""
        pod = self._server.get(path)
        if pod is None or "deletionTimestamp" in pod["metadata"]:
            return
        self._server.mark_deleted(path)
        uid = pod["metadata"]["uid"]
        self._later(self._weather.leave_seconds, lambda: self._end(path, uid))

    def _end(self, path: str, uid: str) -> None:
        pod = self._server.get(path)
        if pod is not None and pod["metadata"]["uid"] == uid:
            self._server.remove(path)

    # Garbage

    def _collect(self) -> None:
        """Remove what belongs only to owners that are gone."""
        self._collecting = False
        alive = {item["metadata"]["uid"] for _, item in self._server.everything()} | {ELSEWHERE}
        for path, item in self._server.everything():
            owners = item["metadata"].get("ownerReferences", [])
            if not owners or any(owner["uid"] in alive for owner in owners):
                continue
            if "/pods/" not in path:
                self._note(f"collected {path}")
                self._server.remove(path)
            elif "deletionTimestamp" not in item["metadata"]:
                self.evict(path)


def _hash(template: Object) -> str:
    return hashlib.sha256(msgspec.json.encode(template, order="deterministic")).hexdigest()[:8]


def is_follower(pod: Object) -> bool:
    """Whether the pod is one of a group's beside its leader, which says nothing to anybody."""
    return GROUP in pod["metadata"]["labels"] and pod["metadata"]["labels"][INDEX] != "0"


def is_ready(pod: Object, before: float = math.inf) -> bool:
    """Whether the pod's Ready condition is True, and became so before that time."""
    conditions = pod["status"].get("conditions", [])
    return any(c["type"] == "Ready" and c["status"] == "True" and c["since"] < before for c in conditions)

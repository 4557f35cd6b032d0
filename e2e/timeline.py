"""Paired capacity as the API server tells of it: every change of any worker pod, in order.

Followed by list and watch, and again when the API server goes away: what was said stands until it is back.
"""

import json
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from e2e.controlplane.cluster import Cluster
from e2e.steps import ready
from kvasir_operator.api import WORKER_ROLES, WorkerRole
from kvasir_operator.plan.rollout import Goal, RevisionGroup, State, capacity
from kvasir_operator.pods.groups import KEY_LABEL, SIZE_ANNOTATION
from kvasir_operator.render.names import INDEX_LABEL, KV_LABEL, LEADER_INDEX, REVISION_LABEL, ROLE_LABEL

Groups = tuple[RevisionGroup, ...]
_AGAIN_SECONDS = 0.2


@dataclass(frozen=True)
class Moment:
    """What was ready from one change to the next."""

    seconds: float
    window: str
    groups: Groups

    def capacity(self, targets: Mapping[WorkerRole, int]) -> float:
        """Paired capacity in units of `targets`."""
        wanted = [Goal("", "", targets[role]) for role in WORKER_ROLES]
        return float(capacity(State(wanted[0], wanted[1], self.groups)))

    def __str__(self) -> str:
        shown = "  ".join(f"{g.role[0]} {g.revision[:4]}/{g.kv[:4]} {g.ready}/{g.replicas}" for g in self.groups)
        return f"{self.seconds:6.1f} s  {self.window:<28} {shown}"


@dataclass
class Timeline:
    """The worker pods of a namespace, followed by a watch. Pods on their way out count for nothing.

    A worker over several pods counts as one while its leader is there, and as ready when all of them are.
    """

    cluster: Cluster
    namespace: str
    moments: list[Moment] = field(default_factory=list)
    window: str = "start"
    _pods: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    _began: float = field(default_factory=time.monotonic)
    _stop: threading.Event = field(default_factory=threading.Event)
    _watch: "subprocess.Popen[str] | None" = None

    def mark(self, window: str) -> None:
        """From now on changes belong to this window, which begins with what there is."""
        self.window = window
        self._note()

    def now(self) -> Groups:
        """What there is."""
        counts: dict[tuple[WorkerRole, str, str], list[int]] = {}
        for pods in self._workers():
            labels = pods[0]["metadata"]["labels"]
            key = labels[ROLE_LABEL], labels[REVISION_LABEL], labels[KV_LABEL]
            count = counts.setdefault(key, [0, 0])
            count[0] += 1
            count[1] += len(pods) == _pods_of_one(pods[0]) and all(map(ready, pods))
        return tuple(RevisionGroup(*key, *count) for key, count in sorted(counts.items(), key=lambda item: item[0]))

    def _workers(self) -> list[list[Mapping[str, Any]]]:
        """The pods of each worker whose leader is there, the leader first."""
        found: dict[str, list[Mapping[str, Any]]] = {}
        for uid, pod in list(self._pods.items()):
            if pod["metadata"].get("deletionTimestamp") or pod["status"].get("phase") in ("Succeeded", "Failed"):
                continue
            found.setdefault(pod["metadata"]["labels"].get(KEY_LABEL, uid), []).append(pod)
        workers = [sorted(pods, key=_index) for pods in found.values()]
        return [pods for pods in workers if _index(pods[0]) == LEADER_INDEX]

    def least(self, window: str, targets: Mapping[WorkerRole, int]) -> float:
        """The least paired capacity in a window, in units of `targets`."""
        return min(moment.capacity(targets) for moment in self.moments if moment.window == window)

    def _note(self) -> None:
        moment = Moment(time.monotonic() - self._began, self.window, self.now())
        last = self.moments[-1] if self.moments else None
        if last is None or (last.window, last.groups) != (moment.window, moment.groups):
            self.moments.append(moment)

    @contextmanager
    def followed(self) -> Iterator[None]:
        """Follow the pods meanwhile."""
        thread = threading.Thread(target=self._follow)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            if self._watch is not None:
                self._watch.terminate()
            thread.join()

    def _follow(self) -> None:
        selector = quote(f"{ROLE_LABEL} in (prefill,decode)")
        path = f"/api/v1/namespaces/{self.namespace}/pods?labelSelector={selector}"
        while not self._stop.is_set():
            listed = self.cluster.kubectl("get", "--raw", path, check=False).stdout
            if not listed:
                self._stop.wait(_AGAIN_SECONDS)
                continue
            pods = json.loads(listed)
            self._pods = {pod["metadata"]["uid"]: pod for pod in pods["items"]}
            self._note()
            version = pods["metadata"]["resourceVersion"]
            self._watch = self.cluster.kubectl_process("get", "--raw", f"{path}&watch=1&resourceVersion={version}")
            if self._stop.is_set():  # it may have looked for the watch just before
                self._watch.terminate()
            self._read(self._watch)
            self._watch.wait()

    def _read(self, process: "subprocess.Popen[str]") -> None:
        assert process.stdout is not None
        for line in process.stdout:  # an event each
            if not line.endswith("\n"):
                return  # cut off
            event = json.loads(line)
            pod = event["object"]
            if event["type"] == "ERROR":
                return
            if event["type"] == "DELETED":
                self._pods.pop(pod["metadata"]["uid"], None)
            else:
                self._pods[pod["metadata"]["uid"]] = pod
            self._note()


def _index(pod: Mapping[str, Any]) -> str:
    return str(pod["metadata"]["labels"].get(INDEX_LABEL, LEADER_INDEX))


def _pods_of_one(pod: Mapping[str, Any]) -> int:
    """How many pods the worker of this pod has."""
    return int((pod["metadata"].get("annotations") or {}).get(SIZE_ANNOTATION, 1))

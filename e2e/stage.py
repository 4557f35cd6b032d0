"""The service of the rollout tests: under traffic, its worker pods followed, each window held against a bound."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from e2e import steps, tiny
from e2e.controlplane.cluster import Cluster
from e2e.controlplane.process import Program
from e2e.node.config import Taint, cpu_node
from e2e.steps import Object, condition, eventually
from e2e.timeline import Timeline
from e2e.traffic import Traffic
from kvasir_operator.api import WorkerRole
from kvasir_operator.render.names import ROLE_LABEL

NAMESPACE = "rollout"
NAME = "tiny"
READY_SECONDS = 180
ROLLED_SECONDS = 120
PATIENCE = 120.0  # a router notices within 15 seconds that a worker has fallen silent
CLIENTS = 2
# Longer than the least that is sent to prefill, and of different first tokens, so that each is routed by itself.
PROMPTS = [[seed + 3 * i % 200 for i in range(90)] for seed in (5, 17, 31, 47)]
TOKENS = 60
LONG_TOKENS = 1500  # a stream of seconds, in flight when its worker and its router are told to leave

Targets = dict[WorkerRole, int]

# Where decode workers may go too, and which the tests lose.
SPARE = cpu_node("spare-1", Taint("kvasir.dev/spare", "NoSchedule"))
_TOLERATIONS = [
    {"key": SPARE.taints[0].key, "operator": "Exists"},
    # An evicted pod of a lost node is replaced after five minutes unless it says so.
    {"key": "node.kubernetes.io/unreachable", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 0},
]


def service(
    prefill: int,
    decode: int,
    digests: bool,
    deadline: int = 60,
    spread: bool = False,
    nodes: int = 1,
    prefill_nodes: int = 1,
) -> Object:
    """The tiny model in small CPU workers. `spread`: prefill workers may be on the spare node too.

    `nodes`, `prefill_nodes`: how many pods, of a rank each, a decode or prefill worker is divided among.
    """
    workers = {"device": "cpu", "resources": {"requests": {"cpu": "100m", "memory": "256Mi"}}}
    return {
        "apiVersion": "serving.kvasir.dev/v1alpha1",
        "kind": "InferenceService",
        "metadata": {"name": NAME},
        "spec": {
            "model": {"uri": tiny.URI, "name": NAME, "dtype": "float32"},
            "engine": {"kvCacheMemory": "64Mi", "kvDigests": digests},
            "prefill": {
                "replicas": prefill,
                "nodes": prefill_nodes,
                "tensorParallel": prefill_nodes,
                **workers,
                **({"template": {"spec": {"tolerations": _TOLERATIONS}}} if spread else {}),
            },
            "decode": {
                "replicas": decode,
                "nodes": nodes,
                "tensorParallel": nodes,
                **workers,
                "template": {"spec": {"tolerations": _TOLERATIONS}},
            },
            "rollout": {"maxSurge": 1, "maxUnavailable": 0},
            "drain": {"deadlineSeconds": deadline},
        },
    }


class Stage:
    """The service under traffic, and what is done to it."""

    def __init__(self, cluster: Cluster, traffic: Traffic, timeline: Timeline, spare: Program) -> None:
        self.cluster = cluster
        self.namespace = timeline.namespace
        self.traffic = traffic
        self.timeline = timeline
        self.spare = spare
        self.long = Traffic(traffic.connect, NAME, PROMPTS[:1], LONG_TOKENS)
        self.bounds: dict[str, tuple[Targets, float]] = {}
        self.leaving: list[str] = []

    def window(self, name: str, targets: Targets, bound: float = 1.0) -> None:
        """Begin a window in which paired capacity must stay at `bound`, in units of `targets`."""
        self.bounds[name] = targets, bound
        self.timeline.mark(name)
        for traffic in (self.traffic, self.long):
            traffic.mark(name)

    def edit(self, name: str, manifest: Object, targets: Targets) -> None:
        """Begin a window with a new manifest."""
        self.window(name, targets)
        steps.apply(self.cluster, manifest, namespace=self.namespace)

    def until(self, look: Any, what: str, seconds: float = ROLLED_SECONDS) -> None:
        """Look until it is so."""
        eventually(lambda: look() or None, seconds, what, self.cluster)

    def revisions(self, ready: int = 0) -> set[str]:
        """The revisions of which so many workers are ready."""
        return {group.revision for group in self.timeline.now() if group.ready >= ready}

    def ready(self, role: WorkerRole) -> int:
        """How many workers of a role are ready, of whatever revision."""
        return sum(group.ready for group in self.timeline.now() if group.role == role)

    def service(self) -> Object:
        """What is stored of the service. What its status says of leaving workers is kept."""
        found = self.cluster.get("kvi", NAME, "-n", self.namespace)
        for each in found.get("status", {}).get("leaving", []):
            has = f"{each['requests']} requests, {each['leases']} leases" if "requests" in each else "no answer"
            if (said := f"{each['pod']}: {has}") not in self.leaving:
                self.leaving.append(said)
        return found

    def drain_told(self) -> bool:
        """Whether the status has said that a leaving worker has requests to finish."""
        self.service()
        return any(re.search(r": [1-9]\d* requests", said) for said in self.leaving)

    def busy(self) -> set[str]:
        """The ready decode workers that say that they have requests in flight, by name."""
        busy = set()
        for pod in filter(steps.ready, steps.pods(self.cluster, self.namespace, f"{ROLE_LABEL}=decode")):
            with suppress(OSError):  # it may have ended since it was listed
                status = json.loads(steps.http(self.cluster, pod["status"]["podIP"], 8000, "/status"))
                if status["requests"]:
                    busy.add(pod["metadata"]["name"])
        return busy

    def on(self, node: str) -> set[str]:
        """The workers of a node that are not on their way out, by name."""
        found = steps.pods(self.cluster, self.namespace, f"{ROLE_LABEL} in (prefill,decode)")
        here = (pod["metadata"] for pod in found if pod["spec"].get("nodeName") == node)
        return {meta["name"] for meta in here if "deletionTimestamp" not in meta}

    def left_by(self, pods: set[str]) -> bool:
        """Whether the service is ready while its status has exactly these pods as leaving, without an answer."""
        found = self.service()
        leaving = found["status"].get("leaving", [])
        silent = {each["pod"] for each in leaving if "requests" not in each}
        return silent == pods and len(leaving) == len(pods) and condition(found, "Ready").get("status") == "True"

    def rolled(self, targets: Targets) -> bool:
        """One revision a role, all of it ready, and the service says so."""
        found, groups = self.service(), self.timeline.now()
        there = {g.role: (g.replicas, g.ready) for g in groups}
        if len(groups) != 2 or there != {role: (n, n) for role, n in targets.items()}:
            return False
        fresh = found["status"].get("observedGeneration") == found["metadata"]["generation"]
        return fresh and condition(found, "Ready").get("status") == "True"

    def answered(self, more: int = 3) -> None:
        """Return once so many requests ended in this window, and all that was in flight when it began."""
        name = self.traffic.window
        self.until(lambda: self.traffic.counts().get(name, 0) >= more, f"answers in the window {name!r}")
        self.until(
            lambda: not self.traffic.earlier() + self.long.earlier(), f"the end of what began before {name!r}"
        )

    def settled(self) -> None:
        """Print what happened so far, and hold it against what was promised of the windows since the last look."""
        for moment in self.timeline.moments:
            if moment.window in self.bounds:
                print(f"{moment}  paired {moment.capacity(self.bounds[moment.window][0]):.0%}")
        for said in self.leaving:
            print("leaving", said)
        for kind, traffic in (("short", self.traffic), ("long", self.long)):
            longest = max((each.seconds for each in traffic.answers if each.ended in self.bounds), default=0.0)
            broken = [each.failure for each in traffic.failures()]
            print(json.dumps({kind: traffic.counts(), "longest_seconds": round(longest, 1), "broken": broken}))
        assert not self.traffic.failures()
        assert not self.long.failures()
        for window, (targets, bound) in self.bounds.items():
            assert self.timeline.least(window, targets) >= bound, window
            assert self.traffic.counts().get(window), f"nothing was asked in the window {window!r}"
        self.bounds.clear()
        self.leaving.clear()


@contextmanager
def set_up(
    cluster: Cluster, manifest: Object, namespace: str = NAMESPACE, clients: int = CLIENTS
) -> Iterator[Stage]:
    """The service under traffic, with some of its workers on the spare node."""
    tiny.make()
    spare = cluster.join(SPARE)
    with steps.scratch(cluster, namespace):
        steps.apply(cluster, manifest, namespace=namespace)
        steps.wait_ready(cluster, namespace, NAME, READY_SECONDS)
        traffic = Traffic(lambda: steps.client(cluster, namespace, NAME, PATIENCE), NAME, PROMPTS, TOKENS)
        traffic.ask_each()
        timeline = Timeline(cluster, namespace)
        with timeline.followed(), traffic.flowing(clients):
            yield Stage(cluster, traffic, timeline, spare)
        cluster.kubectl("-n", namespace, "delete", "kvi", "--all", "--timeout=120s")
    cluster.leave(spare)
    cluster.kubectl("delete", "node", SPARE.name, "--ignore-not-found")

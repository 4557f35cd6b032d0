"""Rollouts, rollbacks and scaling in the middle of them, under traffic: no stream fails, and pairs are kept.

The timeline that is printed is what the API server told of the worker pods, ready/all by role and revision/KV.
"""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from e2e import steps, tiny
from e2e.controlplane.cluster import Cluster
from e2e.steps import Object, condition, eventually
from e2e.timeline import Timeline
from e2e.traffic import Traffic
from kvasir_operator.spec import WorkerRole

NAMESPACE = "rollout"
NAME = "tiny"
READY_SECONDS = 120
ROLLED_SECONDS = 120
CLIENTS = 2
# Longer than the least that is sent to prefill, and of different first tokens, so that each is routed by itself.
PROMPTS = [[seed + 3 * i % 200 for i in range(90)] for seed in (5, 17, 31, 47)]
TOKENS = 60
LONG_TOKENS = 1500  # a stream of seconds, in flight when its worker and its router are told to leave

Targets = dict[WorkerRole, int]


def service(prefill: int, decode: int, digests: bool, deadline: int = 60) -> Object:
    """The tiny model in small CPU workers."""
    env = {"KVASIR_KV_CACHE_MEMORY": "64Mi", "KVASIR_KV_DIGESTS": str(digests).lower()}
    workers = {
        "device": "cpu",
        "resources": {"requests": {"cpu": "100m", "memory": "256Mi"}},
        "template": {
            "spec": {"containers": [{"name": "kvasir", "env": [{"name": k, "value": v} for k, v in env.items()]}]}
        },
    }
    return {
        "apiVersion": "serving.kvasir.dev/v1alpha1",
        "kind": "InferenceService",
        "metadata": {"name": NAME},
        "spec": {
            "model": {"uri": tiny.URI, "name": NAME, "dtype": "float32"},
            "prefill": {"replicas": prefill, **workers},
            "decode": {"replicas": decode, **workers},
            "rollout": {"maxSurge": 1, "maxUnavailable": 0},
            "drain": {"deadlineSeconds": deadline},
        },
    }


class Stage:
    """The service under traffic, and what is done to it."""

    def __init__(self, cluster: Cluster, traffic: Traffic, timeline: Timeline) -> None:
        self.cluster = cluster
        self.traffic = traffic
        self.timeline = timeline
        self.long = Traffic(traffic.connect, NAME, PROMPTS[:1], LONG_TOKENS)

    def window(self, name: str, manifest: Object) -> None:
        """Apply `manifest` and begin a window with it."""
        self.timeline.mark(name)
        self.traffic.mark(name)
        steps.apply(self.cluster, manifest, namespace=NAMESPACE)

    def until(self, look: Any, what: str) -> None:
        eventually(lambda: look() or None, ROLLED_SECONDS, what, self.cluster)

    def revisions(self, ready: int = 0) -> set[str]:
        """The revisions of which so many workers are ready."""
        return {group.revision for group in self.timeline.now() if group.ready >= ready}

    def ready(self, role: WorkerRole) -> int:
        """How many workers of a role are ready, of whatever revision."""
        return sum(group.ready for group in self.timeline.now() if group.role == role)

    def rolled(self, targets: Targets) -> bool:
        """One revision a role, all of it ready, and the service says so."""
        groups = self.timeline.now()
        there = {g.role: (g.replicas, g.ready) for g in groups}
        if len(groups) != 2 or there != {role: (n, n) for role, n in targets.items()}:
            return False
        found = self.cluster.get("kvi", NAME, "-n", NAMESPACE)
        fresh = found["status"].get("observedGeneration") == found["metadata"]["generation"]
        return fresh and condition(found, "Ready").get("status") == "True"

    def answered(self, more: int = 3) -> None:
        """Return once so many requests ended in this window."""
        name = self.traffic.window
        self.until(lambda: self.traffic.counts().get(name, 0) >= more, f"answers in the window {name!r}")


@pytest.fixture(scope="module")
def stage(cluster: Cluster) -> Iterator[Stage]:
    tiny.make()
    with steps.scratch(cluster, NAMESPACE) as namespace:
        steps.apply(cluster, service(1, 2, True), namespace=namespace)
        steps.wait_ready(cluster, namespace, NAME, READY_SECONDS)
        traffic = Traffic(lambda: steps.client(cluster, namespace, NAME), NAME, PROMPTS, TOKENS)
        timeline = Timeline(cluster, namespace)
        with timeline.followed(), traffic.flowing(CLIENTS):
            yield Stage(cluster, traffic, timeline)
        cluster.kubectl("-n", namespace, "delete", "kvi", "--all", "--timeout=60s")


def report(stage: Stage) -> None:
    """Print the timeline and what the clients saw."""
    for moment in stage.timeline.moments:
        print(moment)
    for kind, traffic in (("short", stage.traffic), ("long", stage.long)):
        print(json.dumps({kind: traffic.counts(), "broken": [each.failure for each in traffic.failures()]}))


def test_rollout_scaling_and_rollback_under_traffic(stage: Stage) -> None:
    """One story: each window is judged by the smaller of the sizes before and after its edit."""
    bounds: dict[str, Targets] = {}
    try:
        stage.answered()
        first = stage.revisions()
        assert len(first) == 2

        # With digests and without do not pair: it is another KV, and pairs move together.
        bounds["rollout"] = {"prefill": 1, "decode": 2}
        stage.window("rollout", service(1, 2, False))
        stage.until(lambda: len(stage.revisions(ready=1) - first) == 2, "a pair of the new KV")
        assert stage.revisions() & first, "it is half way only"
        stage.answered(1)

        bounds["scaled up half way"] = {"prefill": 1, "decode": 2}
        stage.window("scaled up half way", service(1, 3, False))
        stage.until(lambda: stage.ready("decode") >= 3, "three decode workers are ready")
        stage.answered(1)

        bounds["rolled back and scaled down"] = {"prefill": 1, "decode": 1}
        stage.window("rolled back and scaled down", service(1, 1, True))
        stage.until(lambda: stage.rolled({"prefill": 1, "decode": 1}), "rolled back to one pair")
        stage.answered()

        # The same KV: each role rolls by itself, and so does the router.
        bounds["same KV, router too"] = {"prefill": 1, "decode": 1}
        before = stage.revisions()
        with stage.long.flowing(1):
            stage.window("same KV, router too", service(1, 1, True, deadline=61))
            stage.until(
                lambda: stage.rolled({"prefill": 1, "decode": 1}) and not before & stage.revisions(),
                "rolled to the new deadline",
            )
        stage.answered()
    finally:
        report(stage)

    assert not stage.traffic.failures()
    assert not stage.long.failures()
    for window, targets in bounds.items():
        assert stage.timeline.least(window, targets) >= 1.0, window
        assert stage.traffic.counts().get(window), f"nothing was asked in the window {window!r}"

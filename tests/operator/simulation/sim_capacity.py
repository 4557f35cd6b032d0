"""Paired capacity as it is in the simulated cluster, and whether an operator's write takes it below its bound.

A set that is to be deleted counts as gone from when the status says so: that is when it is decided.

Only what operators do is judged: pods that fail and people who meddle take capacity away too. A write may leave no
less than there was, or than the bound, by a spec that the operator can have read. A pod that has only just become
ready does not count as what there was: no operator can know of it.
"""

import math
import re
from fractions import Fraction
from typing import Any

from sim_apply import Object
from sim_controllers import ROLE, SERVICE, is_ready
from sim_server import Server
from sim_user import service_path

KV = "serving.kvasir.dev/kv"
# Longer than one reconcile takes on a network that is not slow.
READ_SECONDS = 3.0
_STATUS = re.compile(r"/inferenceservices/(?P<name>[^/]+)/status$")

# By KV fingerprint, the ready workers of prefill and decode that are to stay.
Pairs = dict[str, list[int]]


class CapacityWatch:
    """Follows the specs of InferenceServices, and weighs each write to a worker Deployment."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._specs: dict[str, list[tuple[float, Any]]] = {}
        self._before: Pairs = {}
        server.watchers.append(self._changed)

    def _changed(self, plural: str, item: Object, gone: bool) -> None:
        if plural == "inferenceservices":
            self._specs.setdefault(item["metadata"]["name"], []).append((self._server.time(), _effective(item)))

    def before(self, path: str) -> None:
        """To be called before a write to `path` has its effect."""
        if (name := self._service(path)) is not None:
            self._before = self._pairs(name, self._server.time() - READ_SECONDS)
            self._name = name

    def after(self, path: str) -> str:
        """To be called afterwards: what the write did wrong, if anything."""
        if not _keeps_pods(path) or not self._before:
            return ""
        before, self._before = self._before, {}
        after = self._pairs(self._name)
        now = self._server.time()
        specs = self._specs.get(self._name, [])
        # The one in force when the oldest possible read was made, and all since.
        readable = [
            spec for i, (_, spec) in enumerate(specs) if i + 1 == len(specs) or specs[i + 1][0] > now - READ_SECONDS
        ]
        told = [_loss(spec, before, after) for spec in readable]
        return "" if not told or "" in told else told[-1]

    def _service(self, path: str) -> str | None:
        if found := _STATUS.search(path):
            return found["name"] if self._server.get(service_path(found["name"])) is not None else None
        item = self._server.get(path) if _keeps_pods(path) else None
        if item is None or item["metadata"]["labels"].get(ROLE) not in ("prefill", "decode"):
            return None
        name: str = item["metadata"]["labels"][SERVICE]
        return name if self._server.get(service_path(name)) is not None else None

    def _pairs(self, name: str, before: float = math.inf) -> Pairs:
        pairs: Pairs = {}
        document = self._server.get(service_path(name)) or {}
        removing = document.get("status", {}).get("removing", [])
        for _, item in (*self._server.items("deployments"), *self._server.items("leaderworkersets")):
            labels = item["metadata"]["labels"]
            if (
                item["metadata"]["name"] in removing
                or labels.get(SERVICE) != name
                or labels.get(ROLE) not in ("prefill", "decode")
            ):
                continue
            uid = item["metadata"]["uid"]
            pods = (
                pod for _, pod in self._server.items("pods") if pod["metadata"]["ownerReferences"][0]["uid"] == uid
            )
            ready = sum(is_ready(pod, before) and "deletionTimestamp" not in pod["metadata"] for pod in pods)
            size = item["spec"].get("leaderWorkerTemplate", {}).get("size", 1)
            pair = pairs.setdefault(labels[KV], [0, 0])
            pair[labels[ROLE] == "decode"] += min(ready // size, item["spec"]["replicas"])
        return pairs


def _keeps_pods(path: str) -> bool:
    return "/deployments/" in path or "/leaderworkersets/" in path or _STATUS.search(path) is not None


def _effective(item: Object) -> Any:
    """The spec, with the sizes that the operator has decided on where it does."""
    scaling = item.get("status", {}).get("scaling", {})
    if item["spec"].get("scaling", {}).get("mode") != "Auto" or scaling.get("mode") != "Auto":
        return item["spec"]
    roles = {role: {**item["spec"][role], "replicas": scaling[role]["replicas"]} for role in ("prefill", "decode")}
    return {**item["spec"], **roles}


def _loss(spec: Any, before: Pairs, after: Pairs) -> str:
    """What is lost by this spec's measure; empty when nothing is that may not be."""
    targets = [spec[role]["replicas"] for role in ("prefill", "decode")]
    had, has, bound = _capacity(targets, before), _capacity(targets, after), _bound(targets, spec)
    if has >= min(had, bound):
        return ""
    return f"capacity {float(had):.0%} becomes {float(has):.0%}, bound {float(bound):.0%}: {before} {after}"


def _capacity(targets: list[int], pairs: Pairs) -> Fraction:
    total = Fraction(0)
    for pair in pairs.values():
        shares = [Fraction(ready, target) for ready, target in zip(pair, targets, strict=True) if target]
        total += min(shares, default=Fraction(0))
    return total


def _bound(targets: list[int], spec: Any) -> Fraction:
    limits = spec.get("rollout", {})
    away = limits.get("maxUnavailable", 0)
    if limits.get("maxSurge", 1) == 0 and away == 0:
        away = 1
    shares = [Fraction(min(away, target), target) for target in targets if target]
    return max(Fraction(0), 1 - max(shares, default=Fraction(1)))

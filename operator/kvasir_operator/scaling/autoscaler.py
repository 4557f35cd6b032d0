"""Decides when to measure the load of the services that the operator scales itself: an edge, with pods and a clock.

What a decision depends on is in the service's status (`scaling/roles.py`). Here is only when each was looked at,
so that no event, and no write of the operator's own, makes it look more often; and whose routers may hold requests
while there is no worker, so that they are asked every second without reconciling anything.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, Protocol

import msgspec

from kvasir_engine.status_reports import RouterStatus, WorkerStatus
from kvasir_operator.api import WORKER_ROLES, InferenceService
from kvasir_operator.plan.observed import Observed, PodState
from kvasir_operator.scaling.planner import Signals
from kvasir_operator.scaling.roles import ScalingStatus, remembered, rescaled, seconds_to_next_measurement
from kvasir_operator.scaling.signals import PodReports, median_startup_seconds, signals

# How often routers are asked whether they hold requests for a service that has no workers.
WAKE_SECONDS = 1.0
# Routers of one service that are asked for it: one that holds requests is enough.
MOST_ASKED = 8

Key = tuple[str, str]


class LoadReader(Protocol):
    """Asks pods by their addresses; one that does not answer is `None`."""

    def routers(self, ips: Sequence[str]) -> list[RouterStatus | None]: ...

    def workers(self, ips: Sequence[str]) -> list[WorkerStatus | None]: ...


class NextMeasurement(msgspec.Struct, frozen=True):
    """When the load of a service is measured next: at `due` (epoch, seconds), or when its generation changes."""

    generation: int
    due: float


class Autoscaler:
    """Scales the services of one operator. `requeue_after` queues a service (namespace, name, seconds); `report`
    gets what was decided and from what. Several threads may use it, but only one at a time for one service."""

    def __init__(
        self,
        pod_reader: LoadReader | None,
        now: Callable[[], datetime],
        requeue_after: Callable[[str, str, float], None],
        report: Callable[[Key, ScalingStatus | None, Signals | None], None] = lambda key, scaling, signals: None,
    ) -> None:
        self._pod_reader = pod_reader
        self._now = now
        self._requeue_after = requeue_after
        self._report = report
        self._lock = threading.Lock()
        self._next_measurements: dict[Key, NextMeasurement] = {}
        self._asleep: dict[Key, tuple[str, ...]] = {}
        self._woken: set[Key] = set()

    def scale(
        self, service: InferenceService, observed: Observed, status: Mapping[str, Any]
    ) -> ScalingStatus | None:
        """The sizes of a service's roles from now on; `None` where the operator does not scale them."""
        key = service.namespace, service.name
        before = remembered(status)
        if service.spec.scaling.auto is None:
            self.forget(key)
            return None
        now = self._now()
        scheduled = self._next_measurements.get(key)
        with self._lock:
            woken = key in self._woken
            self._woken.discard(key)
        left = scheduled.due - now.timestamp() if scheduled and scheduled.generation == service.generation else 0.0
        scaling = before
        if before is None or woken or left <= 0:
            measured = self._measure(observed)
            scaling = rescaled(service, observed, before, measured, now)
            left = seconds_to_next_measurement(service, measured)
            self._next_measurements[key] = NextMeasurement(service.generation, now.timestamp() + left)
            self._report(key, scaling, measured)
        if not self._sleeps(key, service, scaling, observed):
            self._requeue_after(*key, left)
        return scaling

    def forget(self, key: Key) -> None:
        """Drop a service that is deleted, or is no longer scaled here."""
        with self._lock:
            self._asleep.pop(key, None)
            self._woken.discard(key)
        if self._next_measurements.pop(key, None):
            self._report(key, None, None)

    def wake(self) -> list[Key]:
        """Ask the routers of services without workers; returns the services that hold requests, to reconcile at
        once."""
        with self._lock:
            asleep = _in_turn(self._asleep)
        if self._pod_reader is None or not asleep:
            return []
        states = self._pod_reader.routers([ip for _, ip in asleep])
        woken = {
            key for (key, _), each in zip(asleep, states, strict=True) if each and each.load and each.load.held
        }
        with self._lock:
            self._woken |= woken & self._asleep.keys()
        return sorted(woken)

    def _sleeps(
        self, key: Key, service: InferenceService, scaling: ScalingStatus | None, observed: Observed
    ) -> bool:
        """Whether both roles have no workers; then only a held request changes anything."""
        asleep = (
            service.spec.scaling.holds is not None
            and scaling is not None
            and not any(scaling.role(role).replicas for role in WORKER_ROLES)
        )
        with self._lock:
            if asleep:
                self._asleep[key] = tuple(pod.ip for pod in observed.pods if pod.role == "router" and pod.ip)
            else:
                self._asleep.pop(key, None)
        return asleep

    def _measure(self, observed: Observed) -> Signals | None:
        if self._pod_reader is None:
            return None
        pods = [pod for pod in observed.pods if pod.ip]
        routers = [pod for pod in pods if pod.role == "router"]
        workers = [pod for pod in pods if pod.role in WORKER_ROLES and pod.ready and not pod.follower]
        worker_reports = self._pod_reader.workers([pod.ip for pod in workers])
        by_role: dict[str, list[WorkerStatus | None]] = {"prefill": [], "decode": []}
        for pod, each in zip(workers, worker_reports, strict=True):
            by_role[pod.role].append(each)
        router_reports = self._pod_reader.routers([pod.ip for pod in routers])
        return signals(
            PodReports(_expected(routers, router_reports), tuple(by_role["prefill"]), tuple(by_role["decode"])),
            median_startup_seconds(observed),
        )


def _in_turn(asleep: Mapping[Key, Sequence[str]]) -> list[tuple[Key, str]]:
    """Some routers of each service, the first of every service before the second of any: a service whose routers do
    not answer does not delay others."""
    places = range(min(MOST_ASKED, max(map(len, asleep.values()), default=0)))
    return [(key, ips[place]) for place in places for key, ips in asleep.items() if place < len(ips)]


def _expected(pods: Sequence[PodState], reports: Sequence[RouterStatus | None]) -> tuple[RouterStatus | None, ...]:
    """The reports of ready routers, and of others that answered. A router that is neither has no clients."""
    return tuple(each for pod, each in zip(pods, reports, strict=True) if pod.ready or each)

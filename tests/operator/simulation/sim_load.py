"""What clients ask of the simulated services, and what their pods say of it; and whether sizes flap."""

import math
import random
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

from sim_apply import Object
from sim_controllers import ROLE, SERVICE, is_follower, is_ready
from sim_server import Server

from kvasir_engine.rolling_window import Sum
from kvasir_engine.status_reports import PairReport, RouterLoad, RouterStatus, WorkerLoad, WorkerStatus
from kvasir_operator.api import WORKER_ROLES
from kvasir_operator.plan.preload import Progress
from kvasir_operator.scaling.planner import Signals
from kvasir_operator.scaling.roles import ScalingStatus

PROMPT_SECONDS, DECODE_SECONDS = 0.2, 4.0
ITL, ITL_SLOPE = 0.010, 0.002


class Demand:
    """Arrivals a second by service, and its pods' answers: a `PodStatusReader`."""

    def __init__(self, server: Server, chance: random.Random) -> None:
        self._server = server
        self._salt = chance.random()
        self.arrivals: dict[str, float] = {}
        self.since: dict[str, float] = {}
        self.silent = 0.1  # the chance that a pod does not answer

    def set(self, name: str, arrivals: float) -> None:
        """From now on so many come."""
        self.since[name] = self._server.time()
        self.arrivals[name] = arrivals

    def progress(self, ip: str) -> Progress | None:
        return None

    def routers(self, ips: Sequence[str]) -> list[RouterStatus | None]:
        return [self._answer(ip, self._router) for ip in ips]

    def workers(self, ips: Sequence[str]) -> list[WorkerStatus | None]:
        return [self._answer(ip, self._worker) for ip in ips]

    def _answer(self, ip: str, tell: Callable[[Object], Any]) -> Any:
        pod = next((pod for _, pod in self._server.items("pods") if pod["metadata"]["name"] == ip), None)
        return None if pod is None or self._dice(ip) < self.silent else tell(pod)

    def _dice(self, ip: str) -> float:
        """Of a pod at a moment, whoever asks and however often: what more is asked changes nothing else."""
        return random.Random(f"{self._salt} {ip} {self._server.time()}").random()

    def _ready(self, service: str, role: str) -> int:
        return sum(
            is_ready(pod)
            and not is_follower(pod)
            and (pod["metadata"]["labels"][SERVICE], pod["metadata"]["labels"][ROLE]) == (service, role)
            for _, pod in self._server.items("pods")
        )

    def _router(self, pod: Object) -> RouterStatus:
        name = pod["metadata"]["labels"][SERVICE]
        arrivals, decode = self.arrivals.get(name, 0.0), self._ready(name, "decode")
        routers, running = max(1, self._ready(name, "router")), round(arrivals * DECODE_SECONDS) if decode else 0
        held = 0 if decode or not arrivals else 1
        came = round(15 * arrivals / routers)
        load = RouterLoad(
            seconds=15.0,
            arrivals=came,
            held=held,
            idle=0.0 if arrivals else self._server.time() - self.since.get(name, 0.0),
            ttft=Sum(came, came * PROMPT_SECONDS) if decode else Sum(),
            itl=Sum(100, 100 * (ITL + ITL_SLOPE * running / decode)) if running else Sum(),
            decode=Sum(10, 10 * DECODE_SECONDS),
        )
        return RouterStatus(False, held + running, "", PairReport(verified=1), load)

    def _worker(self, pod: Object) -> WorkerStatus | None:
        if is_follower(pod):
            return None  # it serves its probes only
        labels = pod["metadata"]["labels"]
        name = labels[SERVICE]
        running = 0
        if labels[ROLE] == "decode":
            running = -(
                -round(self.arrivals.get(name, 0.0) * DECODE_SECONDS) // max(1, self._ready(name, "decode"))
            )
        load = WorkerLoad(0, running, 10 * running, 1000, 100, 100 * PROMPT_SECONDS, ITL)
        return WorkerStatus(False, running, 0, None, load)


# Of a service's role: its size, and since when.
Decision = tuple[str, str, int, str]


class Listener:
    """Asks for an operator's planner, and notes in `unheard` what was decided while a ready worker was silent."""

    def __init__(self, demand: Demand, unheard: set[Decision]) -> None:
        self._demand = demand
        self._unheard = unheard
        self._silent = False

    def routers(self, ips: Sequence[str]) -> list[RouterStatus | None]:
        return self._demand.routers(ips)

    def workers(self, ips: Sequence[str]) -> list[WorkerStatus | None]:
        told = self._demand.workers(ips)
        self._silent = None in told
        return told

    def report(self, key: tuple[str, str], scaling: ScalingStatus | None, signals: Signals | None) -> None:
        """What was decided from what was just heard."""
        if scaling is not None and self._silent:
            for role in WORKER_ROLES:
                found = scaling.role(role)
                self._unheard.add((key[1], role, found.replicas, found.since))
        self._silent = False


class FlapWatch:
    """Follows the sizes that operators decide on: none goes down within the window of having gone up, nor while a
    worker was silent (`unheard`), unless the bounds became others meanwhile."""

    def __init__(self, server: Server, unheard: set[Decision], wrong: Callable[[str], None]) -> None:
        self._server = server
        self._unheard = unheard
        self._wrong = wrong
        self._last: dict[tuple[str, str], tuple[Any, int, float]] = {}  # bounds, size, the last time up
        server.watchers.append(self._changed)

    def _changed(self, plural: str, item: Object, gone: bool) -> None:
        scaling = item.get("status", {}).get("scaling", {}) if plural == "inferenceservices" else {}
        if gone or scaling.get("mode") != "Auto":
            return
        bounds = item["spec"].get("scaling", {})
        window = bounds.get("auto", {}).get("stabilizationWindowSeconds", 0)
        for role in ("prefill", "decode"):
            key, size = (item["metadata"]["uid"], role), scaling[role]["replicas"]
            # When it was decided, in whole seconds: what is written may be long on its way.
            now = datetime.fromisoformat(scaling[role]["since"]).timestamp()
            before, had, up = self._last.get(key, (bounds, size, -math.inf))
            if before != bounds:
                up = -math.inf
            if size < had and now - up < window - 1:
                self._wrong(
                    f"{role} of {item['metadata']['name']} goes from {had} to {size} {now - up:.0f} s after up"
                )
            name = item["metadata"]["name"]
            within = had <= bounds.get("auto", {}).get(role, {}).get("maxReplicas", 0)  # it need not go down
            if size < had and within and (name, role, size, scaling[role]["since"]) in self._unheard:
                self._wrong(f"{role} of {name} goes from {had} to {size} though a worker was silent")
            least = bounds.get("auto", {}).get(role, {}).get("minReplicas", 0)
            raised = size > had and not 0 < had < size == least  # which only other bounds do, and no need
            self._last[key] = bounds, size, now if raised else up


def sizes(document: Object) -> dict[str, int] | None:
    """The sizes that a service scales itself to where nobody asks; `None` where it does not scale itself."""
    scaling = document["spec"].get("scaling", {})
    if scaling.get("mode") != "Auto":
        return None
    auto = scaling["auto"]
    return {role: 0 if "scaleToZero" in auto else auto[role]["minReplicas"] for role in ("prefill", "decode")}

"""A service that scales itself, on virtual time: the real reconcile and autoscaler, a cluster in memory, and pods
that serve a load as a few numbers say. An operator can be replaced at any moment."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from isvc_cases import FakeCluster, document, made_by, settled

from kvasir_engine.rolling_window import Sum
from kvasir_engine.status_reports import PairReport, RouterLoad, RouterStatus, WorkerLoad, WorkerStatus
from kvasir_operator.plan.preload import Progress
from kvasir_operator.reconcile.reconciler import Reconciler
from kvasir_operator.render import Object, Options
from kvasir_operator.scaling.autoscaler import WAKE_SECONDS, Autoscaler

EPOCH = datetime(2026, 1, 1, tzinfo=UTC)
STARTUP = 20.0


@dataclass
class Load:
    """What clients do, a second: `arrivals`, of which each keeps prefill busy for `prompt` seconds and is decoded
    for `decode`, at `itl` with one sequence a worker and `slope` more for each other one."""

    arrivals: float = 0.0
    prompt: float = 0.1
    decode: float = 5.0
    itl: float = 0.010
    slope: float = 0.001
    pages: int = 1000
    pages_each: int = 10


@dataclass
class ScalingHarness:
    """One service, its pods and its operator. `sizes`: the time and what was decided, at each change."""

    spec: dict[str, Any]
    load: Load = field(default_factory=Load)
    seconds: float = 0.0
    silent: Callable[[str], bool] = lambda ip: False
    sizes: list[tuple[float, ...]] = field(default_factory=list)
    looks: int = 0
    reconciles: int = 0

    def __post_init__(self) -> None:
        self.cluster = FakeCluster(document(**self.spec))
        self.started: dict[str, float] = {}
        self.held = 0
        self.idle_since = 0.0
        self.restart()

    def restart(self) -> None:
        """Another operator takes over: it knows what the API server knows."""
        self.due = self.seconds
        self.autoscaler = Autoscaler(self, self.now, self._again)
        self.operator = Reconciler(
            self.cluster, Options(), lambda model: None, self.now, self, self._again, self.autoscaler
        )

    def now(self) -> datetime:
        return EPOCH + timedelta(seconds=self.seconds)

    def _again(self, namespace: str, name: str, seconds: float) -> None:
        self.due = min(self.due, self.seconds + seconds)

    def run(self, seconds: float) -> None:
        """Let time pass."""
        end = self.seconds + seconds
        while self.seconds < end:
            self.seconds = self._next(end)
            self._world()
            woken = self.autoscaler.wake()
            changed = self._world()
            if woken or changed or self.seconds >= self.due:
                self.reconcile()

    def _next(self, end: float) -> float:
        """When something happens next: where a pair is missing, routers are asked each second."""
        if not any(self.size):
            return self.seconds + WAKE_SECONDS
        starts = (since + STARTUP for since in self.started.values() if since + STARTUP > self.seconds)
        return min(end, max(self.due, self.seconds + 0.1), *starts)

    def edit(self, change: Callable[[Any], object]) -> None:
        """As `kubectl edit`."""
        found = self.cluster.services["default", "llama"]
        change(found["spec"])
        found["metadata"]["generation"] += 1
        self.reconcile()

    def reconcile(self) -> None:
        """As the queue does: at once, and again while it writes (its own writes are events)."""
        self.due = float("inf")
        for _ in range(20):
            before = len(self.cluster.calls)
            self.reconciles += 1
            self.operator.reconcile("default", "llama")
            self._world()
            if len(self.cluster.calls) == before:
                break
        else:
            raise AssertionError(f"the operator does not come to rest: {self.cluster.calls[-6:]}")
        decided = tuple(self.scaling[role]["replicas"] for role in ("prefill", "decode"))
        if not self.sizes or self.sizes[-1][1:] != decided:
            self.sizes.append((self.seconds, *decided))

    # What there is

    @property
    def size(self) -> tuple[int, int]:
        """Workers that are asked for, of all revisions."""
        return self._count("prefill"), self._count("decode")

    def _deployments(self, role: str) -> list[Object]:
        items = self.cluster.objects.values()
        return [o for o in items if o["kind"] == "Deployment" and o["metadata"]["labels"][ROLE] == role]

    def _count(self, role: str) -> int:
        return sum(o["spec"]["replicas"] for o in self._deployments(role))

    def ready(self, role: str) -> int:
        return sum(
            p["metadata"]["labels"][ROLE] == role and bool(p["status"]["conditions"])
            for p in self.cluster.listed_pods
        )

    @property
    def scaling(self) -> dict[str, Any]:
        found: dict[str, Any] = self.cluster.services["default", "llama"]["status"]["scaling"]
        return found

    def events(self) -> list[str]:
        """The sizes that were told, in order."""
        return [message for (reason, _), message in self.cluster.events.items() if reason.startswith("Scaled")]

    def _world(self) -> bool:
        """Pods come and become ready; requests are held where none is. Whether anything became another."""
        pods: list[Object] = []
        for item in [o for o in self.cluster.objects.values() if o["kind"] == "Deployment"]:
            role, name = item["metadata"]["labels"][ROLE], item["metadata"]["name"]
            for index in range(item["spec"]["replicas"]):
                key = f"{name}-{index}"
                since = self.started.setdefault(key, self.seconds)
                pods.append(self._pod(key, item, role == "router" or self.seconds - since >= STARTUP, since))
        alive = {pod["metadata"]["name"] for pod in pods}
        self.started = {key: since for key, since in self.started.items() if key in alive}
        before = self.cluster.listed_pods
        self.cluster.listed_pods = pods
        for item in [o for o in self.cluster.objects.values() if o["kind"] == "Deployment"]:
            own = [p for p in pods if p["metadata"]["name"].startswith(item["metadata"]["name"] + "-")]
            ready = sum(bool(p["status"]["conditions"]) for p in own)
            if item.get("status", {}).get("readyReplicas") != ready or "status" not in item:
                self.cluster._store(settled(item, ready))
        serves = self.ready("decode") > 0
        if serves:
            self.held = 0
        elif self.load.arrivals:
            self.held = max(1, self.held)
        if self.load.arrivals or self.held:
            self.idle_since = self.seconds
        return [p["status"] for p in pods] != [p["status"] for p in before]

    def _pod(self, name: str, item: Object, ready: bool, since: float) -> Object:
        labels = item["spec"]["template"]["metadata"]["labels"]
        became = self._time(since + STARTUP)
        conditions = [{"type": "Ready", "status": "True", "lastTransitionTime": became}] if ready else []
        metadata = {
            "name": name,
            "labels": labels,
            "creationTimestamp": self._time(since),
            "ownerReferences": [made_by(item, "ReplicaSet")],
        }
        return {"metadata": metadata, "status": {"conditions": conditions, "podIP": f"{labels[ROLE]}/{name}"}}

    @staticmethod
    def _time(seconds: float) -> str:
        return (EPOCH + timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%SZ")

    # What pods say

    def progress(self, ip: str) -> Progress | None:
        return None

    def routers(self, ips: Sequence[str]) -> list[RouterStatus | None]:
        self.looks += 1
        return [None if self.silent(ip) else self._router(len(ips)) for ip in ips]

    def workers(self, ips: Sequence[str]) -> list[WorkerStatus | None]:
        return [None if self.silent(ip) else self._worker(ip.partition("/")[0]) for ip in ips]

    def _router(self, routers: int) -> RouterStatus:
        load, running = self.load, self._running
        serves = self.ready("decode") > 0
        prefill = max(1, self.ready("prefill"))
        busy = load.arrivals * load.prompt / prefill
        arrivals = round(15 * load.arrivals / routers)
        itl = load.itl + load.slope * running / max(1, self.ready("decode"))
        waits = load.prompt / max(0.02, 1 - busy)
        told = RouterLoad(
            seconds=15.0,
            arrivals=arrivals,
            held=self.held,
            idle=self.seconds - self.idle_since,
            ttft=Sum(arrivals, arrivals * waits) if serves else Sum(),
            itl=Sum(100, 100 * itl) if running else Sum(),
            decode=Sum(10, 10 * load.decode) if serves else Sum(),
        )
        return RouterStatus(False, self.held + running, "", PairReport(verified=1), told)

    @property
    def _running(self) -> int:
        return round(self.load.arrivals * self.load.decode) if self.ready("decode") else 0

    def _worker(self, role: str) -> WorkerStatus:
        load = self.load
        running = -(-self._running // max(1, self.ready("decode"))) if role == "decode" else 0
        told = WorkerLoad(0, running, running * load.pages_each, load.pages, 100, 100 * load.prompt, load.itl)
        return WorkerStatus(False, running, 0, None, told)


ROLE = "serving.kvasir.dev/role"

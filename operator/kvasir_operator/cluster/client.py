"""The API server, and the only module that talks to it. Blocking: callers use a thread pool (`asyncio.to_thread`).

Every call made here needs a verb of the shipped Role; `KINDS` says which kinds there are to own.
"""

import hashlib
import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import quote

import kubernetes
import urllib3

from kvasir_operator.api import (
    API_VERSION,
    KIND,
    PLURAL,
    ROLE_KIND,
    ROLE_PLURAL,
    SET_API_VERSION,
    SET_KIND,
    SET_PLURAL,
)
from kvasir_operator.cluster.interface import ClusterError
from kvasir_operator.plan.observed import Reference, controller_of
from kvasir_operator.render import issued
from kvasir_operator.render.names import MANAGED_BY, SERVICE_LABEL, Object

FIELD_MANAGER = "kvasir"
TIMEOUT_SECONDS = 30.0

# The kinds that an InferenceService may own, and where the API serves them.
KINDS: dict[tuple[str, str], str] = {
    ("apps/v1", "Deployment"): "deployments",
    ("v1", "Service"): "services",
    ("v1", "ServiceAccount"): "serviceaccounts",
    ("rbac.authorization.k8s.io/v1", "Role"): "roles",
    ("rbac.authorization.k8s.io/v1", "RoleBinding"): "rolebindings",
    ("networking.k8s.io/v1", "Ingress"): "ingresses",
    ("networking.k8s.io/v1", "NetworkPolicy"): "networkpolicies",
    ("batch/v1", "Job"): "jobs",
    ("policy/v1", "PodDisruptionBudget"): "poddisruptionbudgets",
    ("monitoring.coreos.com/v1", "PodMonitor"): "podmonitors",
    ("gateway.networking.k8s.io/v1", "HTTPRoute"): "httproutes",
    ("inference.networking.k8s.io/v1", "InferencePool"): "inferencepools",
    (API_VERSION, ROLE_KIND): ROLE_PLURAL,
    (SET_API_VERSION, SET_KIND): SET_PLURAL,
}
# And what it may own where cert-manager issues pods' certificates: the rules allow it only there.
ISSUED: dict[tuple[str, str], str] = {(issued.API_VERSION, issued.KIND): "certificates"}
_PLURALS = {**KINDS, **ISSUED}


Key = tuple[str, str]


class RequestTransport(Protocol):
    """Sends one request to the API server and returns its status and body."""

    def __call__(
        self, method: str, path: str, query: Mapping[str, str], body: object, content_type: str
    ) -> tuple[int, bytes]: ...


class Cluster:
    """Reads and writes of one API server."""

    def __init__(self, transport: RequestTransport, by_cert_manager: bool = False) -> None:
        """`by_cert_manager`: it issues pods' certificates."""
        self._send = transport
        self._kinds = _PLURALS if by_cert_manager else KINDS
        self._served: dict[str, frozenset[str]] = {}
        self._lock = threading.Lock()

    def get_service(self, namespace: str, name: str) -> Object | None:
        """The InferenceService as it is stored, or `None`."""
        return self._get(object_path(API_VERSION, PLURAL, namespace, name))

    def owned(self, namespace: str, name: str, uid: str) -> list[Object]:
        """All objects that carry the labels of an InferenceService and belong to the one with this uid."""
        found: list[Object] = []
        for (api_version, kind), plural in self._kinds.items():
            if self.serves(api_version, kind):
                found.extend(self._list(api_version, kind, plural, namespace, name))
        return [o for o in found if uid in _owners(o)]

    def foreign(self, item: Object) -> bool:
        """Whether an object of `item`'s name is there that `item`'s owner does not own."""
        live = self._get(_path_of(item))
        return live is not None and not _owners(item) & _owners(live)

    def pods(self, namespace: str, name: str) -> list[Object]:
        """The pods of an InferenceService."""
        return self._list("v1", "Pod", "pods", namespace, name)

    def versions(self, api_version: str, plural: str, namespace: str = "", labels: str = "") -> dict[Key, str]:
        """The resourceVersions of a kind's objects, by namespace and name; of all namespaces if none is given."""
        query = {"labelSelector": labels} if labels else {}
        answer = self._call("GET", object_path(api_version, plural, namespace), query=query)
        found = (item["metadata"] for item in json.loads(answer)["items"])
        return {(each["namespace"], each["name"]): each["resourceVersion"] for each in found}

    def apply(self, item: Object) -> None:
        """Server-side apply `item`, taking over fields that others set. Raises ClusterError."""
        self._write("PATCH", _path_of(item), item)

    def scale(self, namespace: str, target: Reference, replicas: int, version: str) -> None:
        """Set an object's replicas. Raises ClusterError 409 if its resourceVersion is not `version`."""
        path = object_path(target.api_version, _PLURALS[target.api_version, target.kind], namespace, target.name)
        # Not an apply: that would give up every other field that this field manager has set.
        body = {"metadata": {"resourceVersion": version}, "spec": {"replicas": replicas}}
        query = {"fieldManager": FIELD_MANAGER}
        self._call("PATCH", path, query, body, "application/merge-patch+json")

    def report(self, namespace: str, target: Reference, replicas: int) -> None:
        """Set the replicas in an InferenceRole's status; nothing if it is gone."""
        body = {
            "apiVersion": target.api_version,
            "kind": target.kind,
            "metadata": {"name": target.name},
            "status": {"replicas": replicas},
        }
        path = object_path(target.api_version, _PLURALS[target.api_version, target.kind], namespace, target.name)
        self._write("PATCH", path + "/status", body, accept=(200, 201, 404))

    def controller_uid(self, namespace: str, target: Reference, uid: str) -> str:
        """The uid of what controls a ReplicaSet or StatefulSet that has this uid; "" where it is not there, or
        nothing does. Raises ClusterError."""
        found = self._get(object_path(target.api_version, f"{target.kind.lower()}s", namespace, target.name))
        if found is None or found["metadata"]["uid"] != uid:
            return ""
        owner = controller_of(found)
        return str(owner["uid"]) if owner else ""

    def put_secret(self, item: Object) -> None:
        """Have a Secret be `item`, by verbs that show nobody what it was: an update answers with what was sent,
        where a patch answers with the whole object. Raises ClusterError."""
        namespace, name = item["metadata"]["namespace"], item["metadata"]["name"]
        query = {"fieldManager": FIELD_MANAGER}
        path = object_path("v1", "secrets", namespace)
        status, answer = self._send("POST", path, query, item, "application/json")
        if status == 409:
            self._call("PUT", object_path("v1", "secrets", namespace, name), query, item)
        elif status not in (200, 201):
            raise ClusterError(status, status_message(status, answer))

    def lacks_secret(self, item: Object) -> bool:
        """Whether a Secret could be made: by a creation that is only tried. A refusal says nothing."""
        query = {"fieldManager": FIELD_MANAGER, "dryRun": "All"}
        path = object_path("v1", "secrets", item["metadata"]["namespace"])
        return self._send("POST", path, query, item, "application/json")[0] == 201

    def delete(self, namespace: str, target: Reference, uid: str = "") -> None:
        """Delete an object and what it owns; nothing if it is gone already, or if another has its name (`uid`)."""
        plural = _PLURALS[target.api_version, target.kind]
        path = object_path(target.api_version, plural, namespace, target.name)
        options: Object = {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": "Background"}
        if uid:
            options["preconditions"] = {"uid": uid}
        self._call("DELETE", path, body=options, accept=(200, 202, 404, *((409,) if uid else ())))

    def set_status(self, namespace: str, name: str, status: Mapping[str, Any], version: str = "") -> str:
        """Replace what this field manager said in the status; nothing if the InferenceService is gone.

        With a `version`, raises ClusterError 409 if its resourceVersion is another. Returns what it is afterwards.
        """
        metadata = {"name": name, **({"resourceVersion": version} if version else {})}
        body = {"apiVersion": API_VERSION, "kind": KIND, "metadata": metadata, "status": status}
        path = object_path(API_VERSION, PLURAL, namespace, name) + "/status"
        answer = json.loads(self._write("PATCH", path, body, accept=(200, 201, 404)))
        found: str = answer.get("metadata", {}).get("resourceVersion", "")
        return found

    def event(self, service: Object, warning: bool, reason: str, message: str, stamp: str, occasion: str) -> None:
        """Post an Event about an InferenceService at `stamp` (RFC 3339). It is posted once an `occasion`.

        Nothing is posted into a namespace that is being deleted.
        """
        metadata = service["metadata"]
        key = hashlib.sha256("\0".join((metadata["uid"], reason, occasion)).encode()).hexdigest()[:16]
        event = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": f"{metadata['name']}.{key}", "namespace": metadata["namespace"]},
            "involvedObject": {
                "apiVersion": API_VERSION,
                "kind": KIND,
                "name": metadata["name"],
                "namespace": metadata["namespace"],
                "uid": metadata["uid"],
            },
            "type": "Warning" if warning else "Normal",
            "reason": reason,
            "message": message[:1024],
            "firstTimestamp": stamp,
            "lastTimestamp": stamp,
            "count": 1,
            "source": {"component": "kvasir-operator"},
        }
        path = object_path("v1", "events", metadata["namespace"])
        try:
            self._call("POST", path, body=event, accept=(200, 201, 202, 409))
        except ClusterError as error:
            if not error.terminating:  # nobody will read it
                raise

    def serves(self, api_version: str, kind: str) -> bool:
        """Whether the API server serves this kind. A group that is there is asked about once."""
        with self._lock:
            known = self._served.get(api_version)
        if known is None:
            root = "/api/v1" if api_version == "v1" else f"/apis/{api_version}"
            answer = self._get(root)
            if answer is None:
                return False  # asked again next time: the group may be installed meanwhile
            known = frozenset(resource["kind"] for resource in answer["resources"])
            with self._lock:
                self._served[api_version] = known
        return kind in known

    def _list(self, api_version: str, kind: str, plural: str, namespace: str, name: str) -> list[Object]:
        labels = {**MANAGED_BY, SERVICE_LABEL: name}
        query = {"labelSelector": ",".join(f"{key}={value}" for key, value in labels.items())}
        answer = self._call("GET", object_path(api_version, plural, namespace), query=query, accept=(200, 404))
        found = json.loads(answer)
        if "items" not in found:  # the kind was removed; ask again what there is
            with self._lock:
                self._served.pop(api_version, None)
            return []
        # Items of a list do not say what they are.
        return [{**item, "apiVersion": api_version, "kind": kind} for item in found["items"]]

    def _get(self, path: str) -> Object | None:
        found: Object = json.loads(self._call("GET", path, accept=(200, 404)))
        return found or None

    def _write(self, method: str, path: str, body: Object, accept: tuple[int, ...] = (200, 201)) -> bytes:
        query = {"fieldManager": FIELD_MANAGER, "force": "true"}
        return self._call(method, path, query, body, "application/apply-patch+yaml", accept)

    def _call(
        self,
        method: str,
        path: str,
        query: Mapping[str, str] | None = None,
        body: object = None,
        content_type: str = "application/json",
        accept: tuple[int, ...] = (200,),
    ) -> bytes:
        status, answer = self._send(method, path, query or {}, body, content_type)
        if status not in accept:
            raise ClusterError(status, status_message(status, answer))
        # A plain 404 page (an unknown group on old servers) is no JSON.
        return answer if status != 404 else b"{}"


def object_path(api_version: str, plural: str, namespace: str, name: str = "") -> str:
    """Where the API server has an object, or without a name the collection. Without a namespace, that of all."""
    root = "/api/v1" if api_version == "v1" else f"/apis/{api_version}"
    where = f"/namespaces/{quote(namespace)}" if namespace else ""
    return f"{root}{where}/{plural}" + (f"/{quote(name)}" if name else "")


def _path_of(item: Object) -> str:
    plural = _PLURALS[item["apiVersion"], item["kind"]]
    return object_path(item["apiVersion"], plural, item["metadata"]["namespace"], item["metadata"]["name"])


def _owners(item: Object) -> set[str]:
    return {owner["uid"] for owner in item["metadata"].get("ownerReferences", [])}


def status_message(status: int, answer: bytes) -> str:
    """The API server's reason for refusing a request."""
    try:
        return str(json.loads(answer)["message"])
    except (ValueError, KeyError, TypeError):
        return f"HTTP {status}: {answer[:200].decode(errors='replace')}"


@dataclass(frozen=True)
class ClientTransport:
    """The official client's connection: addresses, certificates and tokens are its business.

    `left`: for how many seconds this replica may write yet. No write is begun after them, and none is waited for.
    `limit`: seconds for any request.
    """

    client: Any
    left: Callable[[], float] | None = None
    limit: float = TIMEOUT_SECONDS

    def __call__(
        self, method: str, path: str, query: Mapping[str, str], body: object, content_type: str
    ) -> tuple[int, bytes]:
        """Send and wait. Raises ClusterError with status 0 when no answer comes."""
        seconds = self.limit
        if method != "GET" and self.left is not None:
            seconds = min(seconds, self.left())
            if seconds <= 0:
                raise ClusterError(0, "this replica does not lead")
        headers = {"Accept": "application/json", "Content-Type": content_type}
        if token := self.client.configuration.auth_settings().get("BearerToken"):
            headers[token["key"]] = token["value"]  # read again each time: service account tokens are rotated
        text = None if body is None else json.dumps(body)
        url = self.client.configuration.host + path + _query(query)
        pool = self.client.rest_client.pool_manager
        try:
            timeout = urllib3.Timeout(total=seconds)
            answer = pool.request(method, url, body=text, headers=headers, timeout=timeout, retries=False)
        except urllib3.exceptions.HTTPError as error:
            raise ClusterError(0, f"the API server cannot be reached: {error}") from error
        return answer.status, answer.data


def _query(query: Mapping[str, str]) -> str:
    return "?" + "&".join(f"{key}={quote(value)}" for key, value in query.items()) if query else ""


def connect() -> Any:
    """A client of the cluster that this pod runs in, else of $KUBECONFIG or ~/.kube/config. Raises ClusterError."""
    try:
        kubernetes.config.load_incluster_config()
    except kubernetes.config.ConfigException:
        try:
            kubernetes.config.load_kube_config()
        except kubernetes.config.ConfigException as error:
            raise ClusterError(0, f"no cluster is configured: {error}") from None
    return kubernetes.client.ApiClient()

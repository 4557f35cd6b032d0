"""The Lease of coordination.k8s.io, read and written over the cluster's transport: an edge."""

import json
from typing import Any

from kvasir_operator.cluster.client import RequestTransport, object_path, status_message
from kvasir_operator.cluster.interface import ClusterError
from kvasir_operator.cluster.lease_candidate import Record

API_VERSION = "coordination.k8s.io/v1"


class ClusterLease:
    """One Lease. Plain updates, not server-side apply: a write must fail when somebody else was first."""

    def __init__(self, send: RequestTransport, namespace: str, name: str) -> None:
        self._send = send
        self._namespace = namespace
        self._name = name

    def read(self) -> Record | None:
        """As LeaseInterface has it."""
        status, answer = self._send("GET", self._path(self._name), {}, None, "application/json")
        if status == 404:
            return None
        if status != 200:
            raise ClusterError(status, status_message(status, answer))
        return record(json.loads(answer))

    def write(self, record: Record) -> bool:
        """As LeaseInterface has it."""
        metadata = {"name": self._name, "namespace": self._namespace}
        body: dict[str, Any] = {
            "apiVersion": API_VERSION,
            "kind": "Lease",
            "metadata": metadata,
            "spec": spec(record),
        }
        if record.version:
            metadata["resourceVersion"] = record.version
            status, answer = self._send("PUT", self._path(self._name), {}, body, "application/json")
        else:
            status, answer = self._send("POST", self._path(), {}, body, "application/json")
        if status in (404, 409):  # deleted, changed or created by somebody else: look again
            return False
        if status not in (200, 201):
            raise ClusterError(status, status_message(status, answer))
        return True

    def _path(self, name: str = "") -> str:
        return object_path(API_VERSION, "leases", self._namespace, name)


def record(lease: dict[str, Any]) -> Record:
    """The record of a Lease object."""
    said = lease.get("spec", {})
    return Record(
        holder=said.get("holderIdentity") or "",
        duration=said.get("leaseDurationSeconds") or 0,
        acquired=said.get("acquireTime") or "",
        renewed=said.get("renewTime") or "",
        transitions=said.get("leaseTransitions") or 0,
        version=lease["metadata"].get("resourceVersion", ""),
    )


def spec(record: Record) -> dict[str, Any]:
    """A record as a Lease's spec. Unset times are left out, since an empty string is no time."""
    times = {"acquireTime": record.acquired, "renewTime": record.renewed}
    return {
        "holderIdentity": record.holder,
        "leaseDurationSeconds": record.duration,
        "leaseTransitions": record.transitions,
        **{name: time for name, time in times.items() if time},
    }

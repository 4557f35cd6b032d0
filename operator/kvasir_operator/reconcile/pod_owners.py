"""Finds the pods of a service by their owners: from a pod's controller to an object that the service owns.

Labels prove nothing: a pod without such an owner is counted, and gets no request.
"""

import threading
from collections.abc import Iterable

from kvasir_operator.cluster.interface import ClusterInterface
from kvasir_operator.plan.observed import Reference, controller_of, is_made_for
from kvasir_operator.render.names import Object

_BETWEEN = ("ReplicaSet", "StatefulSet")
_MOST = 10_000  # controllers that are remembered


class PodOwners:
    """Follows owner references. For use in threads. The controller of a ReplicaSet or StatefulSet is read once, and
    an object that a service has owned stays its own: the pods of a deleted object leave later."""

    def __init__(self, cluster: ClusterInterface) -> None:
        self._cluster = cluster
        self._lock = threading.Lock()
        self._above: dict[str, str] = {}
        self._made: dict[str, str] = {}  # whose each object was, both by uid

    def without_foreign_addresses(
        self, namespace: str, service: str, pods: Iterable[Object], owned: Iterable[Object]
    ) -> list[Object]:
        """`pods` of the service with that uid, without the addresses of those that no object which it owns, or has
        owned, has made. Raises ClusterError.
        """
        ours = self._with_deleted(service, {item["metadata"]["uid"] for item in owned})
        return [pod if self._is_ours(namespace, pod, ours) else _unaddressed(pod) for pod in pods]

    def _with_deleted(self, service: str, owned: set[str]) -> set[str]:
        with self._lock:
            if len(self._made) >= _MOST:
                self._made.clear()
            self._made |= dict.fromkeys(owned, service)
            return {uid for uid, owner in self._made.items() if owner == service}

    def _is_ours(self, namespace: str, pod: Object, ours: set[str]) -> bool:
        owner = controller_of(pod)
        if owner is None or not pod.get("status", {}).get("podIP") or not is_made_for(pod["metadata"]):
            return False
        if owner["uid"] in ours:
            return True
        if owner["kind"] not in _BETWEEN or owner["apiVersion"] != "apps/v1":
            return False
        with self._lock:
            above = self._above.get(owner["uid"])
        if above is None:
            target = Reference(owner["apiVersion"], owner["kind"], owner["name"])
            above = self._cluster.controller_uid(namespace, target, owner["uid"])
            if above:  # who is not there may only be late
                with self._lock:
                    if len(self._above) >= _MOST:
                        self._above.clear()
                    self._above[owner["uid"]] = above
        return above in ours


def _unaddressed(pod: Object) -> Object:
    return {**pod, "status": {**pod.get("status", {}), "podIP": ""}}

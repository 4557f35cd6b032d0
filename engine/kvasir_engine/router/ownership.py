"""Finds a pod's InferenceService: follows its controllers at the API server, one after another.

Anybody can set a label. An owner reference names an object by uid, and the garbage collector deletes objects whose
owner does not exist. A worker's certificate proves its identity (`docs/security.md`).
"""

import re
from collections.abc import Mapping
from typing import Any

import httpx
import msgspec

SERVICE_GROUP, SERVICE_KIND = "serving.kvasir.dev", "InferenceService"
# What makes pods of an InferenceService's workers, and what makes those.
_PLURALS = {
    ("apps/v1", "ReplicaSet"): "replicasets",
    ("apps/v1", "Deployment"): "deployments",
    ("apps/v1", "StatefulSet"): "statefulsets",
    ("leaderworkerset.x-k8s.io/v1", "LeaderWorkerSet"): "leaderworkersets",
}
# Of an object; what else an owner reference says is no part of an address.
_NAME = re.compile(r"(?=.{1,253}$)[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_ABSENT = (400, 404, 410)
_MOST_STEPS = 3  # pod, ReplicaSet, Deployment, InferenceService


class Owners:
    """Decides which pods belong to the InferenceService with the uid `service`."""

    def __init__(self, service: str) -> None:
        self._service = service
        self._ours: set[str] = set()
        self._judged: dict[str, tuple[str, bool]] = {}

    async def owns(self, client: httpx.AsyncClient, headers: Mapping[str, str], pod: Mapping[str, Any]) -> bool:
        """Whether the pod belongs to the service. Asks the API server once for each pod and controller. Raises
        httpx.HTTPError.
        """
        metadata = pod["metadata"]
        owner = _controller(pod)
        by, verdict = self._judged.get(metadata["uid"], ("", False))
        if owner is None or by != owner["uid"]:
            verdict = owner is not None and await self._follow(client, headers, metadata["namespace"], owner)
            self._judged[metadata["uid"]] = (owner["uid"] if owner else "", verdict)
        return verdict

    def forget(self, uid: str) -> None:
        """Forget a deleted pod."""
        self._judged.pop(uid, None)

    async def _follow(
        self, client: httpx.AsyncClient, headers: Mapping[str, str], namespace: str, owner: Mapping[str, Any]
    ) -> bool:
        passed: list[str] = []
        for _ in range(_MOST_STEPS):
            if owner["uid"] in self._ours or self._is_service(owner):
                self._ours.update(passed)
                return True
            plural = _PLURALS.get((owner["apiVersion"], owner["kind"]))
            if plural is None or not _NAME.fullmatch(owner["name"]):
                return False
            path = f"/apis/{owner['apiVersion']}/namespaces/{namespace}/{plural}/{owner['name']}"
            response = await client.get(path, headers=dict(headers))
            if response.status_code in _ABSENT:
                return False
            response.raise_for_status()
            found = msgspec.json.decode(response.content)
            above = _controller(found)
            if found["metadata"]["uid"] != owner["uid"] or above is None:
                return False
            passed.append(owner["uid"])
            owner = above
        return False

    def _is_service(self, owner: Mapping[str, Any]) -> bool:
        group = owner["apiVersion"].partition("/")[0]
        return (group, owner["kind"], owner["uid"]) == (SERVICE_GROUP, SERVICE_KIND, self._service)


def _controller(item: Mapping[str, Any]) -> Mapping[str, Any] | None:
    found: Mapping[str, Any] | None = next(
        (each for each in item["metadata"].get("ownerReferences") or () if each.get("controller")), None
    )
    return found

"""A controller of LeaderWorkerSets: what LeaderWorkerSet's own does to sets whose groups are recreated as a whole.

Which pods a group has is `kvasir_operator.pods.groups`. Deleting is left to the garbage collector by owner
references, scheduling to the scheduler. A group is deleted in the foreground (all its pods at once, the leader's
object last) when a container of it was restarted, a pod of it is deleted or has ended, or its template is another;
when nothing of it is left it is made anew. Not done: rolling updates of several groups one by one, events.
"""

import asyncio
import logging
from collections.abc import Mapping
from datetime import UTC, datetime

from e2e.node.api import Api, ApiError, Object
from kvasir_operator.api.kinds import SET_API_VERSION, SET_KIND, SET_PLURAL
from kvasir_operator.pods import groups
from kvasir_operator.render.names import INDEX_LABEL, LEADER_INDEX, SET_LABEL

log = logging.getLogger(__name__)

_RETRY_SECONDS = 0.5
_MERGE = "application/merge-patch+json"
Key = tuple[str, str]


def restarted(pod: Mapping[str, object]) -> str:
    """Why the pod's group has to be made anew; empty: nothing happened to this pod."""
    status, meta = _part(pod, "status"), _part(pod, "metadata")
    name = meta["name"]
    if meta.get("deletionTimestamp"):
        return f"{name} is deleted"
    if status.get("phase") in ("Failed", "Succeeded"):
        return f"{name} has ended"
    if any(each["restartCount"] for each in status.get("containerStatuses") or ()):
        return f"a container of {name} was restarted"
    return ""


def ready(pod: Mapping[str, object]) -> bool:
    """Whether the pod is Ready, and to stay."""
    conditions = {each["type"]: each["status"] for each in _part(pod, "status").get("conditions") or ()}
    return conditions.get("Ready") == "True" and not _part(pod, "metadata").get("deletionTimestamp")


def _part(item: Mapping[str, object], name: str) -> Object:
    part = item.get(name)
    return part if isinstance(part, dict) else {}


class Controller:
    """Sees to all LeaderWorkerSets of a cluster until cancelled."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._sets: dict[str, Object] = {}
        self._pods: dict[str, Object] = {}
        self._dirty: set[Key] = set()
        self._wake = asyncio.Event()

    async def run(self) -> None:
        """Follow sets and pods, and act."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._api.mirror(f"/apis/{SET_API_VERSION}/{SET_PLURAL}", self._set))
            group.create_task(self._api.mirror("/api/v1/pods", self._pod))
            group.create_task(self._work())

    def _set(self, uid: str, item: Object | None) -> None:
        if item is None:
            self._sets.pop(uid, None)
            return
        # A list's items do not say what they are.
        self._sets[uid] = {**item, "apiVersion": SET_API_VERSION, "kind": SET_KIND}
        self._mark((item["metadata"]["namespace"], item["metadata"]["name"]))

    def _pod(self, uid: str, pod: Object | None) -> None:
        last = self._pods.pop(uid, None)
        if pod is not None and SET_LABEL in (pod["metadata"].get("labels") or {}):
            self._pods[uid] = last = {**pod, "apiVersion": "v1", "kind": "Pod"}
        if last is not None:
            self._mark(_set_of(last))

    def _mark(self, key: Key) -> None:
        self._dirty.add(key)
        self._wake.set()

    async def _work(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            keys, self._dirty = self._dirty, set()
            for key in sorted(keys):
                item = next((each for each in self._sets.values() if _key(each) == key), None)
                if item is None or item["metadata"].get("deletionTimestamp"):
                    continue
                try:
                    await self._reconcile(item, [pod for pod in self._pods.values() if _set_of(pod) == key])
                except ApiError as error:
                    if error.status not in (404, 409):
                        raise
                    # The watches have not told all yet.
                    asyncio.get_running_loop().call_later(_RETRY_SECONDS, self._mark, key)

    async def _reconcile(self, item: Object, found: list[Object]) -> None:
        namespace = item["metadata"]["namespace"]
        by_name = {pod["metadata"]["name"]: pod for pod in found}
        whole = 0
        leaders = []
        if not found:
            await self._create("services", namespace, groups.service(item))
        for number in range(groups.replicas(item)):
            leader, *workers = groups.pods(item, number)
            there = by_name.get(leader["metadata"]["name"])
            if there is None:
                await self._create("pods", namespace, leader)
            elif _owner(there) == item["metadata"]["uid"]:
                leaders.append(there)
                whole += await self._group(item, there, workers, by_name)
        wanted = {groups.leader_name(item, number) for number in range(groups.replicas(item))}
        for pod in found:
            meta = pod["metadata"]
            surplus = meta["labels"][INDEX_LABEL] == LEADER_INDEX and meta["name"] not in wanted
            if surplus and not meta.get("deletionTimestamp"):
                await self._delete(pod, "Background")
        await self._status(item, len(leaders), whole)

    async def _group(self, item: Object, leader: Object, workers: list[Object], by_name: dict[str, Object]) -> bool:
        """See to one group whose leader is there; whether all of it is ready."""
        uid = leader["metadata"]["uid"]
        if leader["metadata"].get("deletionTimestamp"):
            return False  # its workers go with it, now or when it is gone
        pods = [leader]
        for worker in workers:
            there = by_name.get(worker["metadata"]["name"])
            if there is None:
                await self._create("pods", item["metadata"]["namespace"], groups.owned_by(worker, leader))
            elif _owner(there) == uid:
                pods.append(there)
        why = next(filter(None, map(restarted, pods)), "")
        if leader["metadata"]["labels"][groups.REVISION_LABEL] != groups.revision(item):
            why = "its template is another"
        if why:
            log.info("group %s is made anew: %s", leader["metadata"]["name"], why)
            await self._delete(leader, "Foreground")
            return False
        return len(pods) == groups.size(item) and all(map(ready, pods))

    async def _create(self, plural: str, namespace: str, item: Object) -> None:
        try:
            await self._api.request("POST", f"/api/v1/namespaces/{namespace}/{plural}", item)
        except ApiError as error:
            if error.status == 403:  # a namespace that is being deleted
                return
            if error.status != 409 or plural == "pods":
                raise

    async def _delete(self, pod: Object, propagation: str) -> None:
        meta = pod["metadata"]
        options = {"propagationPolicy": propagation, "preconditions": {"uid": meta["uid"]}}
        await self._api.request("DELETE", f"/api/v1/namespaces/{meta['namespace']}/pods/{meta['name']}", options)

    async def _status(self, item: Object, there: int, whole: int) -> None:
        wanted = groups.replicas(item)
        available = whole >= wanted
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        conditions = [
            _condition("Available", available, "AllGroupsReady", "all groups are ready"),
            _condition("Progressing", not available, "GroupsProgressing", "groups are being created"),
        ]
        last = {each["type"]: each for each in item.get("status", {}).get("conditions") or ()}
        for each in conditions:
            old = last.get(each["type"], {})
            each["lastTransitionTime"] = now if old.get("status") != each["status"] else old["lastTransitionTime"]
        status = {
            "replicas": there,
            "readyReplicas": whole,
            "updatedReplicas": there,
            "hpaPodSelector": f"{SET_LABEL}={item['metadata']['name']},{INDEX_LABEL}={LEADER_INDEX}",
            "conditions": conditions,
        }
        if item.get("status") != status:
            namespace, name = _key(item)
            path = f"/apis/{SET_API_VERSION}/namespaces/{namespace}/{SET_PLURAL}/{name}/status"
            await self._api.request("PATCH", path, {"status": status}, content_type=_MERGE)


def _condition(kind: str, holds: bool, reason: str, message: str) -> Object:
    return {"type": kind, "status": str(holds), "reason": reason, "message": message}


def _key(item: Object) -> Key:
    return item["metadata"]["namespace"], item["metadata"]["name"]


def _set_of(pod: Object) -> Key:
    return pod["metadata"]["namespace"], pod["metadata"]["labels"][SET_LABEL]


def _owner(pod: Object) -> str:
    """The uid of the object that the pod goes with."""
    return next((str(each["uid"]) for each in pod["metadata"].get("ownerReferences") or ()), "")

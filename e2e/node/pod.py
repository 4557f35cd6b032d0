"""One pod on one node, from its binding to its deletion."""

import asyncio
import base64
import contextlib
import copy
import logging
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx

from e2e import netns
from e2e.node.api import STRATEGIC, Api, ApiError, Object
from e2e.node.config import Config, Node
from e2e.node.names import Names
from e2e.node.projected import project
from e2e.node.sandboxed import HOSTS, prepare
from kvasir_operator.pods import Backoff, PodError, PodRunner

log = logging.getLogger(__name__)

_RETRY_SECONDS = 1.0
# A crash is shown sooner than in Kubernetes (10 s): tests wait for it.
_BACKOFF = Backoff(base=2.0, cap=30.0)


class NodePod:
    """Runs a pod bound to a node: network, volumes, processes, status, and the end that the API asks for."""

    def __init__(
        self,
        api: Api,
        config: Config,
        names: Names,
        node: Node,
        host_ip: str,
        pod: Object,
        ip: str,
        serial: str,
    ) -> None:
        meta = pod["metadata"]
        self.node = node.name
        self.ip = ip
        self._api = api
        self._config = config
        self._names = names
        self._spec = node
        self._host_ip = host_ip
        self._pod = pod
        self._path = f"/api/v1/namespaces/{meta['namespace']}/pods/{meta['name']}"
        self._name = f"{meta['namespace']}/{meta['name']}"
        self._netns = f"{config.netns}.pod-{serial}"
        self._link = f"v{serial}"
        self._state: Path = config.state / "pods" / f"{meta['namespace']}_{meta['name']}_{meta['uid']}"
        self._runner: PodRunner | None = None
        self._deleted = asyncio.Event()
        self._grace = 0.0
        self._gone = False
        self._dirty = asyncio.Event()
        self._waiting: str | None = None

    def update(self, pod: Object | None) -> None:
        """The object changed; `None`: it was removed without waiting for us."""
        if pod is None:
            self._gone = True
            self._deleted.set()
            if self._runner is not None:
                self._runner.kill()
        elif pod["metadata"].get("deletionTimestamp"):
            grace = pod["metadata"].get("deletionGracePeriodSeconds")
            self._grace = 30.0 if grace is None else float(grace)
            self._deleted.set()

    def secret_changed(self, secret: Object) -> None:
        """A Secret of the pod's namespace is new or another: its volumes show it, as a kubelet's will."""
        meta = secret["metadata"]
        if meta["namespace"] != self._pod["metadata"]["namespace"]:
            return
        for volume in self._pod["spec"].get("volumes") or ():
            source = volume.get("secret") or {}
            folder = self._state / "volumes" / volume["name"]
            if source.get("secretName") == meta["name"] and folder.is_dir():
                data = {key: base64.b64decode(value) for key, value in (secret.get("data") or {}).items()}
                wanted = {i["key"]: i["path"] for i in source.get("items") or ()} or {key: key for key in data}
                project(folder, {path: data[key] for key, path in wanted.items() if key in data})

    async def run(self) -> None:
        """Live the pod's life; returns when it is deleted and nothing of it is left. Cancelling kills it."""
        pushing = asyncio.ensure_future(self._push_status())
        try:
            await asyncio.to_thread(netns.add_pod, self._config.netns, self._netns, self._link, self.ip)
            await self._start()
            await self._ended()
        finally:
            if self._runner is not None:
                self._runner.kill()
                await self._runner.stop(0)
            pushing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await pushing
            await asyncio.to_thread(netns.delete, self._netns)
            self._names.leave(self._state / HOSTS)
        await self._remove()

    async def _start(self) -> None:
        """Start the containers; what is missing (a Secret, an account) may still come."""
        while not self._deleted.is_set():
            try:
                pod, host, prefix = await prepare(
                    self._api, self._config, self._spec, self._pod, self.ip, self._host_ip, self._netns, self._state
                )
                self._names.follow(self._state / HOSTS)
                runner = PodRunner(
                    pod,
                    self.ip,
                    self._state,
                    host,
                    exec_prefix=prefix,
                    backoff=_BACKOFF,
                    on_change=lambda _: self._dirty.set(),
                    on_event=self._event,
                )
                await runner.start()
            except (PodError, httpx.HTTPError, ApiError) as error:
                self._waiting = str(error)
                self._dirty.set()
                log.warning("pod %s waits: %s", self._name, error)
                await self._deleted_within(_RETRY_SECONDS)
            else:
                self._waiting = None
                self._runner = runner
                log.info("pod %s runs on %s at %s", self._name, self.node, self.ip)
                return

    async def _deleted_within(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._deleted.wait()

    async def _ended(self) -> None:
        await self._deleted.wait()
        if self._runner is not None and not self._gone:
            await self._runner.stop(self._grace)

    async def _remove(self) -> None:
        """Tell the API server that nothing runs any more, which removes the object."""
        shutil.rmtree(self._state / "volumes", ignore_errors=True)
        if self._gone:
            return
        await self._patch()
        options = {"gracePeriodSeconds": 0, "preconditions": {"uid": self._pod["metadata"]["uid"]}}
        try:
            await self._api.request("DELETE", self._path, options)
        except ApiError as error:
            if error.status not in (404, 409):
                raise
        log.info("pod %s is gone", self._name)

    def _status(self) -> dict[str, Any]:
        if self._runner is not None:
            status = copy.deepcopy(self._runner.status())
        else:
            waiting = {"reason": "CreateContainerConfigError", "message": self._waiting or ""}
            statuses = [
                {"name": c["name"], "image": c["image"], "imageID": "", "ready": False, "restartCount": 0}
                | {"state": {"waiting": waiting}, "lastState": {}}
                for c in self._pod["spec"]["containers"]
            ]
            status = {"phase": "Pending", "hostIP": self._host_ip, "containerStatuses": statuses, "conditions": []}
        for condition in status["conditions"]:
            # A merge leaves what is not named: say that these are no more.
            condition.setdefault("reason", None)
            condition.setdefault("message", None)
        return status

    async def _patch(self) -> None:
        if self._runner is None and self._waiting is None:
            return
        body = {"metadata": {"uid": self._pod["metadata"]["uid"]}, "status": self._status()}
        try:
            await self._api.request("PATCH", f"{self._path}/status", body, content_type=STRATEGIC)
        except ApiError as error:
            # 404 and 409: the object is gone, or is another of the same name by now.
            if error.status not in (404, 409):
                raise

    async def _push_status(self) -> None:
        """Write the status whenever it changed; many changes at once are one write."""
        while True:
            await self._dirty.wait()
            self._dirty.clear()
            try:
                await self._patch()
            except (ApiError, httpx.HTTPError) as error:
                log.warning("status of pod %s: %s; again", self._name, error)
                self._dirty.set()
                await asyncio.sleep(_RETRY_SECONDS)

    def _event(self, kind: str, reason: str, message: str) -> None:
        log.info("pod %s: %s: %s", self._name, reason, message)
        meta = self._pod["metadata"]
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        event = {
            "metadata": {"generateName": f"{meta['name']}.", "namespace": meta["namespace"]},
            "involvedObject": {
                "apiVersion": "v1",
                "kind": "Pod",
                "name": meta["name"],
                "namespace": meta["namespace"],
                "uid": meta["uid"],
            },
            "type": kind,
            "reason": reason,
            "message": message,
            "source": {"component": "kubelet", "host": self.node},
            "firstTimestamp": now,
            "lastTimestamp": now,
            "count": 1,
        }
        background(self._post_event(event))

    async def _post_event(self, event: Object) -> None:
        with contextlib.suppress(ApiError, httpx.HTTPError):
            await self._api.request("POST", f"/api/v1/namespaces/{event['metadata']['namespace']}/events", event)


_tasks: set["asyncio.Task[None]"] = set()


def background(work: Any, done: "Callable[[asyncio.Task[None]], None] | None" = None) -> "asyncio.Task[None]":
    """Run `work` as a task that is kept until it ends."""
    task: asyncio.Task[None] = asyncio.ensure_future(work)
    _tasks.add(task)
    task.add_done_callback(_tasks.discard)
    if done is not None:
        task.add_done_callback(done)
    return task

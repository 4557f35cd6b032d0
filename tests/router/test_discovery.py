"""Workers as pods, watched through an API server's real HTTP."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from kvasir_engine.api.http.server import listen
from kvasir_engine.router.discovery import (
    ClusterAccess,
    DiscoveryError,
    pod_worker,
    static_workers,
    watched_pods,
    worker_ports,
    worker_url,
)

SELECTOR = "serving.kvasir.dev/role in (prefill,decode)"


def pod(name: str, ip: str | None = None, **changes: Any) -> dict[str, Any]:
    ports = [{"name": "metrics", "containerPort": 9}, {"name": "http", "containerPort": 8000}]
    made: dict[str, Any] = {
        "metadata": {"name": name, "uid": f"uid-{name}", "resourceVersion": "0"},
        "spec": {"containers": [{"name": "other"}, {"name": "worker", "ports": ports}]},
        "status": {"phase": "Running"} | ({"podIP": ip} if ip else {}),
    }
    for path, value in changes.items():
        part, _, key = path.partition("_")
        made[part][key] = value
    return made


@dataclass
class FakeApiServer:
    """Pods with list and watch; it can forget its history (410) and drop its watches."""

    pods: dict[str, dict[str, Any]] = field(default_factory=dict)
    version: int = 10
    watches: list[asyncio.Queue[dict[str, Any] | None]] = field(default_factory=list)
    lists: int = 0
    fail_lists: int = 0
    gone: bool = False
    tokens: list[str] = field(default_factory=list)
    queries: list[dict[str, str]] = field(default_factory=list)
    url: str = ""
    owners: dict[str, dict[str, Any]] = field(default_factory=dict)
    fail_owners: int = 0
    asked: list[str] = field(default_factory=list)

    def set(self, changed: dict[str, Any]) -> None:
        kind = "MODIFIED" if changed["metadata"]["uid"] in self.pods else "ADDED"
        self.pods[changed["metadata"]["uid"]] = changed
        self._tell(kind, changed)

    def delete(self, name: str) -> None:
        self._tell("DELETED", self.pods.pop(f"uid-{name}"))

    def _tell(self, kind: str, changed: dict[str, Any]) -> None:
        self.version += 1
        changed["metadata"]["resourceVersion"] = str(self.version)
        self.tell({"type": kind, "object": changed})

    def tell(self, event: dict[str, Any] | None) -> None:
        """An event to every watch; `None` ends them."""
        for watch in self.watches:
            watch.put_nowait(event)

    def app(self) -> FastAPI:
        app = FastAPI()

        @app.get("/api/v1/namespaces/prod/pods")
        async def pods(request: Request) -> Response:
            self.tokens.append(request.headers.get("authorization", ""))
            self.queries.append(dict(request.query_params))
            if request.query_params.get("watch") == "true":
                if self.gone:
                    self.gone = False
                    return JSONResponse({"kind": "Status", "code": 410}, 410)
                return StreamingResponse(self._stream(), media_type="application/json")
            self.lists += 1
            if self.fail_lists:
                self.fail_lists -= 1
                return JSONResponse({"kind": "Status", "message": "etcd is away"}, 500)
            body = {"metadata": {"resourceVersion": str(self.version)}, "items": list(self.pods.values())}
            return JSONResponse(body)

        @app.get("/apis/{group}/v1/namespaces/prod/{plural}/{name}")
        async def owner(group: str, plural: str, name: str) -> Response:
            self.asked.append(f"{plural}/{name}")
            if self.fail_owners:
                self.fail_owners -= 1
                return JSONResponse({"kind": "Status", "message": "etcd is away"}, 500)
            found = self.owners.get(f"{group}/{plural}/{name}")
            return JSONResponse(found) if found else JSONResponse({"kind": "Status", "code": 404}, 404)

        return app

    async def _stream(self) -> AsyncIterator[str]:
        queue: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self.watches.append(queue)
        try:
            while (event := await queue.get()) is not None:
                yield json.dumps(event) + "\n"
        finally:
            self.watches.remove(queue)


@contextlib.asynccontextmanager
async def api_server() -> AsyncIterator[FakeApiServer]:
    fake = FakeApiServer()
    sock = listen("127.0.0.1", 0)
    fake.url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    server = uvicorn.Server(
        uvicorn.Config(fake.app(), log_config=None, lifespan="off", timeout_graceful_shutdown=1)
    )
    server.capture_signals = contextlib.nullcontext  # type: ignore[assignment, method-assign]
    serving = asyncio.create_task(server.serve(sockets=[sock]))
    try:
        yield fake
    finally:
        fake.tell(None)
        server.should_exit = True
        await serving


@dataclass
class Followed:
    """The sets that a discovery has yielded, newest last."""

    sets: list[dict[str, str]] = field(default_factory=list)
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def until(self, names: set[str]) -> dict[str, str]:
        async with asyncio.timeout(60), self.changed:
            await self.changed.wait_for(lambda: bool(self.sets) and set(self.sets[-1].values()) == names)
            return self.sets[-1]


@contextlib.asynccontextmanager
async def following(
    access: ClusterAccess, owner: str = "", ports: Sequence[str] = ("http",)
) -> AsyncIterator[Followed]:
    followed = Followed()

    async def follow() -> None:
        async for workers in watched_pods(access, SELECTOR, owner, ports):
            async with followed.changed:
                followed.sets.append(dict(workers))
                followed.changed.notify_all()

    task = asyncio.create_task(follow())
    try:
        yield followed
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def watching(server: FakeApiServer) -> None:
    async with asyncio.timeout(60):
        while not server.watches:  # noqa: ASYNC110
            await asyncio.sleep(0.002)


async def test_pods_come_change_and_go(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("first\n")
    async with api_server() as server:
        server.set(pod("a", "10.0.0.1"))
        access = ClusterAccess(server.url, "prod", token)
        async with following(access) as followed:
            assert await followed.until({"a"}) == {"ws://10.0.0.1:8000": "a"}
            await watching(server)
            server.set(pod("b"))  # no IP yet
            server.set(pod("b", "fd00::2"))
            assert (await followed.until({"a", "b"}))["ws://[fd00::2]:8000"] == "b"
            server.set(pod("a", "10.0.0.1", metadata_deletionTimestamp="now"))
            await followed.until({"b"})
            server.delete("a")
            server.set(pod("c", "10.0.0.3"))
            await followed.until({"b", "c"})
            server.delete("b")
            await followed.until({"c"})
        assert server.lists == 1
        assert server.queries[1]["resourceVersion"] == "11"
        assert {query["labelSelector"] for query in server.queries} == {SELECTOR}
        assert set(server.tokens) == {"Bearer first"}


async def test_a_watch_that_ends_goes_on_from_where_it_was_with_the_present_token(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("first")
    async with api_server() as server:
        async with following(ClusterAccess(server.url, "prod", token)) as followed:
            await followed.until(set())
            await watching(server)
            server.set(pod("a", "10.0.0.1"))
            await followed.until({"a"})
            server.tell({"type": "BOOKMARK", "object": {"metadata": {"resourceVersion": "77"}}})
            token.write_text("second")
            server.tell(None)
            async with asyncio.timeout(60):
                while len(server.queries) < 3 or not server.watches:  # noqa: ASYNC110
                    await asyncio.sleep(0.002)
            server.set(pod("b", "10.0.0.2"))
            await followed.until({"a", "b"})
        assert server.lists == 1
        assert server.queries[2]["resourceVersion"] == "77"
        assert server.tokens[-1] == "Bearer second"


def reference(kind: str, name: str, uid: str, version: str = "apps/v1") -> list[dict[str, Any]]:
    return [{"apiVersion": version, "kind": kind, "name": name, "uid": uid, "controller": True}]


SERVICE = reference("InferenceService", "llama", "uid-llama", "serving.kvasir.dev/v1alpha1")


def owned(path: str, uid: str, owners: list[dict[str, Any]]) -> tuple[str, dict[str, Any]]:
    return path, {"metadata": {"uid": uid, "ownerReferences": owners}}


def serving(api: FakeApiServer) -> None:
    """What an operator's Deployment and LeaderWorkerSet are to their pods."""
    api.owners |= dict(
        [
            owned("apps/deployments/llama-decode-1", "uid-d", SERVICE),
            owned("apps/replicasets/llama-decode-1-x", "uid-r", reference("Deployment", "llama-decode-1", "uid-d")),
            owned("leaderworkerset.x-k8s.io/leaderworkersets/llama-prefill-1-0", "uid-l", SERVICE),
            owned(
                "apps/statefulsets/llama-prefill-1-0",
                "uid-s",
                reference("LeaderWorkerSet", "llama-prefill-1-0", "uid-l", "leaderworkerset.x-k8s.io/v1"),
            ),
            owned("apps/deployments/theirs", "uid-t", reference("Other", "o", "uid-o", "example.org/v1")),
            owned("apps/replicasets/theirs-x", "uid-tr", reference("Deployment", "theirs", "uid-t")),
            owned("apps/replicasets/alone", "uid-a", []),
        ]
    )


OURS = reference("ReplicaSet", "llama-decode-1-x", "uid-r")


def held(name: str, ip: str, owners: list[dict[str, Any]]) -> dict[str, Any]:
    return pod(name, ip, metadata_ownerReferences=owners, metadata_namespace="prod")


async def test_pods_are_followed_to_their_service_once_for_each_owner() -> None:
    async with api_server() as api:
        serving(api)
        api.set(held("d1", "10.0.0.1", OURS))
        api.set(held("p1", "10.0.0.2", reference("StatefulSet", "llama-prefill-1-0", "uid-s")))
        async with following(ClusterAccess(api.url, "prod"), "uid-llama") as found:
            await found.until({"d1", "p1"})
            await watching(api)
            asked = len(api.asked)
            api.set(held("d2", "10.0.0.3", OURS))
            await found.until({"d1", "d2", "p1"})
            assert len(api.asked) == asked == 4


@pytest.mark.parametrize(
    ("owners", "why"),
    [
        ([], "labels alone"),
        (reference("ReplicaSet", "llama-decode-1-x", "uid-other"), "the uid of another"),
        (reference("ReplicaSet", "not-there", "uid-r2"), "what is not there"),
        (reference("ReplicaSet", "theirs-x", "uid-tr"), "somebody else's"),
        (reference("ReplicaSet", "alone", "uid-a"), "nobody's"),
        (reference("ReplicaSet", "../../../../api/v1/pods", "uid-r3"), "what is no name"),
        (reference("ReplicaSet", "a/b?c=%2e#d", "uid-r4"), "what is no name"),
        (reference("Pod", "d1", "uid-d1", "v1"), "a kind that makes no pods here"),
        (
            reference("InferenceService", "other", "uid-other", "serving.kvasir.dev/v1alpha1"),
            "another service of this kind",
        ),
        (reference("InferenceService", "llama", "uid-llama", "example.org/v1"), "another's InferenceService"),
        ([{**OURS[0], "controller": False}], "an owner that does not control it"),
    ],
)
async def test_a_pod_with_the_labels_that_is_somebody_elses_is_no_worker(
    owners: list[dict[str, Any]], why: str
) -> None:
    async with api_server() as api:
        serving(api)
        api.set(held("theirs", "10.0.0.9", owners))
        async with following(ClusterAccess(api.url, "prod"), "uid-llama") as found:
            await watching(api)
            api.set(held("d1", "10.0.0.1", OURS))
            await found.until({"d1"})
            assert all("theirs" not in each.values() for each in found.sets), why


async def test_an_owner_that_cannot_be_asked_for_is_asked_for_again(caplog: pytest.LogCaptureFixture) -> None:
    async with api_server() as api:
        serving(api)
        api.set(held("d1", "10.0.0.1", OURS))
        async with following(ClusterAccess(api.url, "prod"), "uid-llama") as found:
            await found.until({"d1"})
            await watching(api)
            api.fail_owners = 1
            api.set(held("p1", "10.0.0.2", reference("StatefulSet", "llama-prefill-1-0", "uid-s")))
            await found.until({"d1", "p1"})
            assert all("d1" in each.values() for each in found.sets)
            assert "cannot watch pods" in caplog.text


async def test_with_certificates_a_worker_is_spoken_to_where_it_proves_who_it_is() -> None:
    ports = [{"name": "http", "containerPort": 8000}, {"name": "worker", "containerPort": 8443}]
    both = pod("d1", "10.0.0.1", spec_containers=[{"name": "kvasir", "ports": ports}])
    plain = pod("d2", "10.0.0.2")
    assert pod_worker(both) == ("ws://10.0.0.1:8000", "d1")
    secure = worker_ports(secure=True, plain=False)
    assert pod_worker(both, secure) == ("wss://10.0.0.1:8443", "d1")
    assert pod_worker(plain, secure) is None
    rolling = worker_ports(secure=True, plain=True)
    assert pod_worker(both, rolling) == ("wss://10.0.0.1:8443", "d1")
    assert pod_worker(plain, rolling) == ("ws://10.0.0.2:8000", "d2")
    async with api_server() as api:
        api.set(plain)
        api.set(both)
        async with following(ClusterAccess(api.url, "prod"), ports=secure) as found:
            assert await found.until({"d1"}) == {"wss://10.0.0.1:8443": "d1"}


@pytest.mark.parametrize("in_stream", [True, False])
async def test_a_version_that_is_too_old_is_listed_again(in_stream: bool, caplog: pytest.LogCaptureFixture) -> None:
    async with api_server() as server:
        server.set(pod("a", "10.0.0.1"))
        async with following(ClusterAccess(server.url, "prod")) as followed:
            await followed.until({"a"})
            await watching(server)
            server.pods["uid-b"] = pod("b", "10.0.0.2")  # an event that no watch gets
            if in_stream:
                server.tell({"type": "ERROR", "object": {"kind": "Status", "code": 410, "message": "too old"}})
            else:
                server.gone = True
                server.tell(None)
            await followed.until({"a", "b"})
        assert server.lists == 2
    assert not caplog.records  # it is part of watching, and no trouble


async def test_an_api_server_in_trouble_leaves_the_known_workers(caplog: pytest.LogCaptureFixture) -> None:
    async with api_server() as server:
        server.set(pod("a", "10.0.0.1"))
        async with following(ClusterAccess(server.url, "prod")) as followed:
            await followed.until({"a"})
            await watching(server)
            server.fail_lists = 2
            server.tell({"type": "ERROR", "object": {"kind": "Status", "code": 500, "message": "oh no"}})
            server.pods["uid-b"] = pod("b", "10.0.0.2")
            await followed.until({"a", "b"})
        assert followed.sets == [{"ws://10.0.0.1:8000": "a"}, followed.sets[-1]]
    assert "oh no" in caplog.text


@pytest.mark.parametrize(
    "unfit",
    [
        pod("x"),
        pod("x", "10.0.0.1", metadata_deletionTimestamp="now"),
        pod("x", "10.0.0.1", status_phase="Failed"),
        pod("x", "10.0.0.1", status_phase="Succeeded"),
        pod("x", "10.0.0.1", spec_containers=[{"name": "worker", "ports": [{"containerPort": 8000}]}]),
    ],
)
def test_pods_that_are_no_workers(unfit: dict[str, Any]) -> None:
    assert pod_worker(unfit) is None


@pytest.mark.parametrize("url", ["http://h:1", "ws://h:1", "h:1", "http://h:1/"])
async def test_urls(url: str) -> None:
    assert [each async for each in static_workers([url])] == [{"ws://h:1": "h:1"}]


@pytest.mark.parametrize("url", ["ftp://h:1", "http://h:1/path", "", "http://"])
def test_urls_that_are_none(url: str) -> None:
    with pytest.raises(DiscoveryError):
        worker_url(url)


def test_access_in_a_pod(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(DiscoveryError, match="KUBERNETES_SERVICE_HOST"):
        ClusterAccess.in_cluster(None, tmp_path)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.96.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "6443")
    with pytest.raises(DiscoveryError, match="namespace"):
        ClusterAccess.in_cluster(None, tmp_path)
    (tmp_path / "namespace").write_text("prod\n")
    access = ClusterAccess.in_cluster(None, tmp_path)
    assert (access.server, access.namespace) == ("https://10.96.0.1:6443", "prod")
    assert ClusterAccess.in_cluster("other", tmp_path).namespace == "other"

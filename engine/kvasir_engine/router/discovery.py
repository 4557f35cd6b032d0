"""Finds the workers: fixed URLs, or the pods that a label selector matches.

A discovery yields the whole set each time it changes, as the workers' names by URL (ws://host:port).
"""

import asyncio
import logging
import os
import random
import ssl
import time
from collections.abc import AsyncIterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import msgspec

from kvasir_engine.errors import UserError
from kvasir_engine.router.ownership import Owners

log = logging.getLogger("router")

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
WATCH_SECONDS = 300
FIRST_BACKOFF = 0.2
MOST_BACKOFF = 10.0


class DiscoveryError(UserError):
    """The discovery cannot be set up as configured; the message is one sentence for the user."""


def worker_url(url: str) -> str:
    """`url` (http, ws or a bare host:port) as ws://host:port. Raises DiscoveryError."""
    parts = urlsplit(url if "://" in url else f"ws://{url}")
    scheme = {"http": "ws", "ws": "ws", "https": "wss", "wss": "wss"}.get(parts.scheme)
    if scheme is None or not parts.hostname or parts.path.strip("/"):
        raise DiscoveryError(f"not a worker's URL: {url!r} (expected http://host:port)")
    return f"{scheme}://{parts.netloc}"


async def static_workers(urls: Sequence[str]) -> AsyncIterator[Mapping[str, str]]:
    """The given workers, once."""
    yield {worker_url(url): urlsplit(worker_url(url)).netloc for url in urls}


@dataclass(frozen=True)
class ClusterAccess:
    """How to reach the API server. The token file is read for every request: kubelets rotate it."""

    server: str
    namespace: str
    token_file: Path | None = None
    ca_file: Path | None = None

    @classmethod
    def in_cluster(cls, namespace: str | None, account: Path = SERVICE_ACCOUNT) -> "ClusterAccess":
        """The access that Kubernetes gives to a pod. Raises DiscoveryError outside of one."""
        host, port = os.environ.get("KUBERNETES_SERVICE_HOST"), os.environ.get("KUBERNETES_SERVICE_PORT", "443")
        if not host:
            raise DiscoveryError("--watch-pods works in a pod only: KUBERNETES_SERVICE_HOST is not set")
        try:
            namespace = namespace or (account / "namespace").read_text().strip()
        except OSError as error:
            raise DiscoveryError(f"cannot read the pod's namespace: {error}") from error
        server = f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}"
        return cls(server, namespace, account / "token", account / "ca.crt")

    def client(self) -> httpx.AsyncClient:
        verify = ssl.create_default_context(cafile=str(self.ca_file)) if self.ca_file else True
        timeout = httpx.Timeout(10, read=WATCH_SECONDS + 30)
        return httpx.AsyncClient(base_url=self.server, verify=verify, timeout=timeout, trust_env=False)

    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.token_file.read_text().strip()}"} if self.token_file else {}


class _Expired(Exception):
    """The watch's resource version is too old: list again."""


PLAIN_PORT, TLS_PORT = "http", "worker"


def worker_ports(secure: bool, plain: bool) -> tuple[str, ...]:
    """The names of the ports on which workers accept routers, the preferred one first.

    `secure`: the router has a certificate and requires the workers'. A pod without the TLS port is then no worker,
    unless `plain` workers are accepted too: otherwise a pod without a certificate could just omit the port.
    """
    return (TLS_PORT, *((PLAIN_PORT,) if plain else ())) if secure else (PLAIN_PORT,)


def pod_worker(pod: Mapping[str, Any], ports: Sequence[str] = (PLAIN_PORT,)) -> tuple[str, str] | None:
    """A pod's (URL, name) if it is a worker to connect to: it has an IP, has not finished and is not being deleted.

    `ports`: from `worker_ports`.
    """
    metadata, status = pod.get("metadata", {}), pod.get("status", {})
    ip = status.get("podIP")
    if not ip or metadata.get("deletionTimestamp") or status.get("phase") in ("Succeeded", "Failed"):
        return None
    host = f"[{ip}]" if ":" in ip else ip
    listening = {
        port.get("name"): port["containerPort"]
        for container in pod.get("spec", {}).get("containers", [])
        for port in container.get("ports", [])
    }
    for name in ports:
        if name in listening:
            return f"{'wss' if name == TLS_PORT else 'ws'}://{host}:{listening[name]}", metadata["name"]
    return None


async def watched_pods(
    access: ClusterAccess, selector: str, owner: str = "", ports: Sequence[str] = (PLAIN_PORT,)
) -> AsyncIterator[Mapping[str, str]]:
    """The workers among the pods that `selector` matches, by list and watch, until the iterator is closed.

    `owner`: the uid of the InferenceService that must own the pods; empty: any owner. `ports`: from `worker_ports`.
    While the API server cannot be reached, the last known set stays valid.
    """
    owners = Owners(owner) if owner else None
    path = f"/api/v1/namespaces/{access.namespace}/pods"
    backoff = FIRST_BACKOFF
    async with access.client() as client:
        while True:
            try:
                pods, version = await _list(client, access, path, selector)
                ours = {uid for uid, pod in pods.items() if await _owned(client, access, owners, pod)}
                last = _workers(pods, ours, ports)
                yield last
                while True:
                    begun = time.monotonic()
                    async for kind, pod in _watch(client, access, path, selector, version):
                        backoff = FIRST_BACKOFF
                        version = pod["metadata"]["resourceVersion"]
                        if kind == "DELETED":
                            uid = pod["metadata"]["uid"]
                            pods.pop(uid, None)
                            ours.discard(uid)
                            if owners:
                                owners.forget(uid)
                        elif kind in ("ADDED", "MODIFIED"):
                            uid = pod["metadata"]["uid"]
                            pods[uid] = pod
                            own = await _owned(client, access, owners, pod)
                            (ours.add if own else ours.discard)(uid)
                        workers = _workers(pods, ours, ports)
                        if workers != last:
                            last = workers
                            yield last
                    if time.monotonic() - begun < MOST_BACKOFF:  # a watch usually lasts for minutes
                        await asyncio.sleep(FIRST_BACKOFF)
            except _Expired:
                pass
            except (httpx.HTTPError, OSError, msgspec.DecodeError, KeyError) as error:
                log.warning("cannot watch pods selector=%r reason=%r", selector, f"{type(error).__name__}: {error}")
            await asyncio.sleep(backoff * random.uniform(0.5, 1))
            backoff = min(2 * backoff, MOST_BACKOFF)


def _workers(pods: Mapping[str, Mapping[str, Any]], ours: Set[str], ports: Sequence[str]) -> dict[str, str]:
    found = (pod_worker(pod, ports) for uid, pod in pods.items() if uid in ours)
    return dict(worker for worker in found if worker is not None)


async def _owned(
    client: httpx.AsyncClient, access: ClusterAccess, owners: Owners | None, pod: Mapping[str, Any]
) -> bool:
    return owners is None or await owners.owns(client, access.headers(), pod)


async def _list(
    client: httpx.AsyncClient, access: ClusterAccess, path: str, selector: str
) -> tuple[dict[str, Mapping[str, Any]], str]:
    """Pods by uid, and the resource version at which to start a watch."""
    response = await client.get(path, params={"labelSelector": selector}, headers=access.headers())
    response.raise_for_status()
    found = msgspec.json.decode(response.content)
    return {pod["metadata"]["uid"]: pod for pod in found.get("items") or []}, found["metadata"]["resourceVersion"]


async def _watch(
    client: httpx.AsyncClient, access: ClusterAccess, path: str, selector: str, version: str
) -> AsyncIterator[tuple[str, Mapping[str, Any]]]:
    """The events of one watch, until the server closes it. Raises _Expired."""
    params: dict[str, str | int] = {
        "labelSelector": selector,
        "watch": "true",
        "resourceVersion": version,
        "allowWatchBookmarks": "true",
        "timeoutSeconds": WATCH_SECONDS,
    }
    async with client.stream("GET", path, params=params, headers=access.headers()) as response:
        if response.status_code == 410:
            raise _Expired
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line:
                continue
            event = msgspec.json.decode(line)
            if event["type"] == "ERROR":
                status = event.get("object", {})
                if status.get("code") == 410:
                    raise _Expired
                raise OSError(f"watch: {status.get('message', status)}")
            yield event["type"], event["object"]

"""The Kubernetes API as the node agent needs it: requests, and mirrors of collections kept by list and watch."""

import asyncio
import json
import logging
import ssl
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import httpx

Object = dict[str, Any]
log = logging.getLogger(__name__)

_RETRY_SECONDS = 0.5
_WATCH_SECONDS = 300
STRATEGIC = "application/strategic-merge-patch+json"


class ApiError(Exception):
    """The API server's refusal."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status


class Api:
    """An API server, by a kubeconfig in JSON with certificate files (`pki.Authority.kubeconfig`)."""

    def __init__(self, kubeconfig: Path) -> None:
        config = json.loads(kubeconfig.read_text())
        cluster, user = config["clusters"][0]["cluster"], config["users"][0]["user"]
        context = ssl.create_default_context(cafile=cluster["certificate-authority"])
        context.load_cert_chain(user["client-certificate"], user["client-key"])
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=8)
        self._client = httpx.AsyncClient(
            base_url=cluster["server"], verify=context, trust_env=False, limits=limits, timeout=30.0
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()

    async def request(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        content_type: str = "application/json",
    ) -> Object:
        """One request. Raises ApiError for what the server refuses, httpx.HTTPError when it cannot be reached."""
        content = None if body is None else json.dumps(body)
        response = await self._client.request(method, path, content=content, headers={"Content-Type": content_type})
        if response.is_error:
            raise ApiError(response.status_code, response.text[:500])
        result: Object = response.json()
        return result

    async def find(self, path: str) -> Object | None:
        """GET, `None` when there is no such object."""
        try:
            return await self.request("GET", path)
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    async def mirror(self, path: str, apply: Callable[[str, Object | None], None]) -> None:
        """For ever: `apply(uid, object)` for what is new or changed, `apply(uid, None)` for what is gone."""
        known: set[str] = set()
        while True:
            try:
                await self._follow(path, known, apply)
            except (ApiError, httpx.HTTPError) as error:
                log.warning("watch of %s: %s; listing anew", path, error or type(error).__name__)
                await asyncio.sleep(_RETRY_SECONDS)

    async def _follow(self, path: str, known: set[str], apply: Callable[[str, Object | None], None]) -> None:
        """One list and one watch. `known` are the objects applied so far."""
        listed = await self.request("GET", path)
        items: dict[str, Object] = {item["metadata"]["uid"]: item for item in listed["items"]}
        for uid in known - set(items):
            apply(uid, None)
        known.clear()
        known.update(items)
        for uid, item in items.items():
            apply(uid, item)
        params = {
            "watch": "true",
            "resourceVersion": listed["metadata"]["resourceVersion"],
            "timeoutSeconds": str(_WATCH_SECONDS),
        }
        timeout = httpx.Timeout(30.0, read=_WATCH_SECONDS + 30.0)
        async with self._client.stream("GET", path, params=params, timeout=timeout) as response:
            if response.is_error:
                raise ApiError(response.status_code, (await response.aread()).decode(errors="replace")[:500])
            async for line in response.aiter_lines():
                event = json.loads(line)
                if event["type"] == "ERROR":
                    raise ApiError(event["object"].get("code") or 500, event["object"].get("message") or "")
                uid = event["object"]["metadata"]["uid"]
                if event["type"] == "DELETED":
                    known.discard(uid)
                    apply(uid, None)
                else:
                    known.add(uid)
                    apply(uid, event["object"])

"""The Service proxy: ClusterIPs as listening sockets in the cluster's namespace, balanced over ready endpoints.

What kube-proxy's userspace mode was. Pods reach a ClusterIP by their default route, which leads to the bridge. TCP
only; no NodePorts, no session affinity. Connections that are open when an endpoint goes away stay open, as with
kube-proxy.
"""

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from e2e import netns
from e2e.node.api import Api, Object
from e2e.relay import refuse, relay

log = logging.getLogger(__name__)

#: Where a Service listens: ClusterIP and port.
Front = tuple[str, int]
#: Addresses and ports behind it.
Backends = tuple[tuple[str, int], ...]


def _key(item: Object) -> tuple[str, str]:
    return item["metadata"]["namespace"], item["metadata"]["name"]


def fronts(services: Sequence[Object], endpoints: Sequence[Object]) -> dict[Front, Backends]:
    """PURE: where to listen, and the ready endpoints behind each place."""
    ready = {_key(item): item.get("subsets") or () for item in endpoints}
    result: dict[Front, Backends] = {}
    for service in services:
        address = service["spec"].get("clusterIP")
        if not address or address == "None":
            continue
        for port in service["spec"].get("ports") or ():
            if port.get("protocol", "TCP") != "TCP":
                continue
            backends = [
                (target["ip"], target_port["port"])
                for subset in ready.get(_key(service), ())
                for target_port in subset.get("ports") or ()
                if target_port.get("name", "") == port.get("name", "")
                for target in subset.get("addresses") or ()
            ]
            result[address, port["port"]] = tuple(backends)
    return result


@dataclass
class _Listener:
    server: asyncio.Server
    backends: Backends
    turn: int = field(default=0)

    def next(self) -> tuple[str, int] | None:
        """The next endpoint's turn."""
        if not self.backends:
            return None
        self.turn += 1
        return self.backends[self.turn % len(self.backends)]


class Proxy:
    """Follows Services and Endpoints until cancelled."""

    def __init__(self, api: Api, namespace: str) -> None:
        self._api = api
        self._namespace = namespace
        self._services: dict[str, Object] = {}
        self._endpoints: dict[str, Object] = {}
        self._listeners: dict[Front, _Listener] = {}
        self._changed = asyncio.Event()

    async def run(self) -> None:
        """Keep the listeners as the API says."""
        async with asyncio.TaskGroup() as group:
            for path, known in (("services", self._services), ("endpoints", self._endpoints)):
                group.create_task(self._follow(path, known))
            group.create_task(self._keep())

    async def _follow(self, resource: str, known: dict[str, Object]) -> None:
        def apply(uid: str, item: Object | None) -> None:
            if item is None:
                known.pop(uid, None)
            else:
                known[uid] = item
            self._changed.set()

        await self._api.mirror(f"/api/v1/{resource}", apply)

    async def _keep(self) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            await self._sync(fronts(list(self._services.values()), list(self._endpoints.values())))

    async def _sync(self, desired: Mapping[Front, Backends]) -> None:
        for front in self._listeners.keys() - desired.keys():
            self._listeners.pop(front).server.close()
            if front[0] not in {address for address, _ in desired}:
                await self._address("del", front[0])
        for front, backends in desired.items():
            if front in self._listeners:
                self._listeners[front].backends = backends
                continue
            if front[0] not in {address for address, _ in self._listeners}:
                await self._address("replace", front[0])
            self._listeners[front] = _Listener(await self._listen(front), backends)
            log.info("service %s:%d", *front)

    async def _address(self, action: str, address: str) -> None:
        await asyncio.to_thread(netns.ip, "-n", self._namespace, "addr", action, f"{address}/32", "dev", "lo")

    async def _listen(self, front: Front) -> asyncio.Server:
        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            backend = self._listeners[front].next() if front in self._listeners else None
            if backend is None:
                refuse(writer)
            else:
                await relay(reader, writer, *backend)

        return await asyncio.start_server(connected, *front)

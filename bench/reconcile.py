"""How long the operator takes for many InferenceServices at once, on one core, and how much memory it holds.

`python -m bench.reconcile` queues 200 services at the same moment, again and again: when they are new, when their
pods have become ready, when nothing has changed, and when all of them are edited. It runs the operator's own queue,
reconcile and API client, on one core; the API server is a dictionary in the same process, whose work is counted
too, so that of the network is what is missing. A service's latency is the time from the moment at which all were
queued to the end of its reconcile.
"""

import argparse
import asyncio
import json
import os
import resource
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping
from typing import Any
from urllib.parse import unquote

from bench.machine import describe

import kvasir_operator.controller  # noqa: F401 - what a real process has loaded counts as memory
from kvasir_operator.api import API_VERSION, KIND, PLURAL
from kvasir_operator.cluster.client import KINDS, Cluster
from kvasir_operator.reconcile.reconciler import Reconciler
from kvasir_operator.reconcile.work_queue import WorkQueue
from kvasir_operator.render import Options
from kvasir_operator.render.names import SERVICE_LABEL, Object

P99_SECONDS = 2.0
MEMORY_MB = 250.0
NAMESPACE = "default"

Key = tuple[str, str]


class MemoryServer:
    """An API server that keeps what is applied, found by its path, and by its service for lists."""

    def __init__(self) -> None:
        self._objects: dict[str, Object] = {}
        self._lists: dict[tuple[str, str], dict[str, Object]] = defaultdict(dict)
        self._version = 0
        self.requests = 0

    def __call__(
        self, method: str, path: str, query: Mapping[str, str], body: Any, content_type: str
    ) -> tuple[int, bytes]:
        """`cluster.Transport`."""
        self.requests += 1
        path = unquote(path)
        if "/namespaces/" not in path:
            version = path.removeprefix("/apis/").removeprefix("/api/")
            kinds = [{"kind": kind} for api_version, kind in KINDS if api_version == version]
            return 200, json.dumps({"resources": kinds}).encode()
        match method:
            case "GET" if "labelSelector" in query:
                labels = dict(pair.split("=") for pair in query["labelSelector"].split(","))
                items = list(self._lists[path, labels[SERVICE_LABEL]].values())
                return 200, json.dumps({"items": items}).encode()
            case "GET":
                item = self._objects.get(path)
                return (200, json.dumps(item).encode()) if item is not None else (404, b"{}")
            case "PATCH" if path.endswith("/status"):
                self._objects[path.removesuffix("/status")]["status"] = body["status"]
                return 200, b"{}"
            case "PATCH":
                self.put(path, self._merged(path, body, content_type))
                return 200, b"{}"
            case "DELETE":
                self._lists[self._list_of(path, self._objects.pop(path))].pop(path)
                return 200, b"{}"
            case _:
                return 201, b"{}"

    def put(self, path: str, item: Object) -> None:
        """Store an object."""
        self._version += 1
        item["metadata"]["resourceVersion"] = str(self._version)
        self._objects[path] = item
        self._lists[self._list_of(path, item)][path] = item

    def edit(self, name: str, change: Callable[[Object], None]) -> None:
        """Change the spec of an InferenceService."""
        item = self._objects[service_path(name)]
        change(item["spec"])
        item["metadata"]["generation"] += 1

    def settle(self) -> None:
        """Let the pods of every Deployment be ready."""
        for item in self._objects.values():
            if item.get("kind") == "Deployment":
                size = item["spec"]["replicas"]
                counts = dict.fromkeys(("replicas", "readyReplicas", "updatedReplicas"), size)
                item["status"] = {"observedGeneration": 1, **counts}

    def _merged(self, path: str, body: Any, content_type: str) -> Object:
        live = self._objects.get(path, {})
        if content_type == "application/merge-patch+json":
            return {**live, "spec": {**live["spec"], **body["spec"]}}
        kept = {name: live["status"] for name in ("status",) if name in live}
        return {**body, "metadata": dict(body["metadata"]), **kept}

    @staticmethod
    def _list_of(path: str, item: Object) -> tuple[str, str]:
        return path.rpartition("/")[0], item["metadata"].get("labels", {}).get(SERVICE_LABEL, "")


def service_path(name: str) -> str:
    """Where an InferenceService is."""
    return f"/apis/{API_VERSION}/namespaces/{NAMESPACE}/{PLURAL}/{name}"


def service(number: int) -> Object:
    """One service of the usual size."""
    return {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "metadata": {"name": f"model-{number}", "namespace": NAMESPACE, "uid": f"uid-{number}", "generation": 1},
        "spec": {
            "model": {"uri": "hf://meta-llama/Llama-3.1-8B-Instruct"},
            "prefill": {"replicas": 2},
            "decode": {"replicas": 3},
        },
    }


async def together(
    names: list[str], handle: Callable[[Key], Awaitable[bool]], server: MemoryServer
) -> tuple[list[float], int]:
    """Queue all at once. Their latencies in seconds, ascending, and the requests that were sent."""
    done: dict[str, float] = {}
    finished = asyncio.Event()

    async def timed(key: Key) -> bool:
        alive = await handle(key)
        done[key[1]] = time.perf_counter()
        if len(done) == len(names):
            finished.set()
        return alive

    queue: WorkQueue[Key] = WorkQueue(timed)
    sent, begin = server.requests, time.perf_counter()
    for name in names:
        queue.add((NAMESPACE, name))
    await finished.wait()
    await queue.close()
    return sorted(at - begin for at in done.values()), server.requests - sent


async def measure(count: int) -> tuple[dict[str, tuple[list[float], int]], float]:
    """The latencies of each occasion, and the memory held at most, in MB."""
    server = MemoryServer()
    names = []
    for number in range(count):
        item = service(number)
        names.append(item["metadata"]["name"])
        server.put(service_path(names[-1]), item)
    reconciler = Reconciler(Cluster(server), Options(), lambda model: None)

    async def handle(key: Key) -> bool:
        return await asyncio.to_thread(reconciler.reconcile, *key)

    found = {"created": await together(names, handle, server)}
    server.settle()
    found["pods ready"] = await together(names, handle, server)
    found["nothing new"] = await together(names, handle, server)
    for name in names:
        server.edit(name, lambda spec: spec.update(drain={"deadlineSeconds": 60}))
    found["all edited"] = await together(names, handle, server)
    return found, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def report(count: int, found: Mapping[str, tuple[list[float], int]], memory: float) -> list[str]:
    """The figures, a line each."""
    lines = [f"{count} InferenceServices at once, one core; {describe()}"]
    for occasion, (latencies, requests) in found.items():
        p50, p99 = latencies[len(latencies) // 2], latencies[min(len(latencies) - 1, int(0.99 * len(latencies)))]
        each = latencies[-1] / len(latencies)
        lines.append(
            f"  {occasion:<12} p50 {p50:6.2f} s  p99 {p99:6.2f} s  {1000 * each:6.2f} ms and"
            f" {requests / len(latencies):5.1f} requests each"
        )
    worst = max(latencies[min(len(latencies) - 1, int(0.99 * len(latencies)))] for latencies, _ in found.values())
    lines.append(
        f"  worst p99 {worst:.2f} s of {P99_SECONDS:g} s allowed, memory {memory:.0f} MB of {MEMORY_MB:g} MB"
    )
    return lines


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--services", type=int, default=200)
    arguments = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    found, memory = asyncio.run(measure(arguments.services))
    print("\n".join(report(arguments.services, found, memory)))


if __name__ == "__main__":
    main()

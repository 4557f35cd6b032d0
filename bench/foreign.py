"""How much memory the operator holds beside pods that are none of its own.

`python -m bench.foreign` starts `kvasir-operator run` twice as a process of its own, against a stand-in for an
API server on loopback: without other pods, and beside 10,000 of a usual size. The stand-in answers lists in chunks,
gives foreign pods to whoever asks without a label selector, and holds watches open. Printed is the operator's
resident memory at its highest, from the kernel, and what it was sent, seconds after all of its watches have opened.
"""

import argparse
import asyncio
import json
import os
import socket
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import msgspec
import yaml
from aiohttp import web
from bench.machine import describe

from kvasir_operator.api import GROUP, KIND, PLURAL, VERSION
from kvasir_operator.controller import WATCHED

MEMORY_MB = 512.0
START_SECONDS = 60.0
KINDS = {
    ("", "v1", "pods"): "Pod",
    ("", "v1", "services"): "Service",
    ("", "v1", "namespaces"): "Namespace",
    ("apps", "v1", "deployments"): "Deployment",
    ("batch", "v1", "jobs"): "Job",
    (GROUP, VERSION, PLURAL): KIND,
    (GROUP, VERSION, "inferenceroles"): "InferenceRole",
}


class Found(msgspec.Struct, frozen=True):
    """One run: the most memory held, in MB, and how many objects of a kind the operator was sent."""

    megabytes: float
    sent: Counter[str]


def pod(number: int) -> dict[str, object]:
    """A pod as a cluster has thousands: two containers, with what a kubelet says of them."""
    names = ("main", "proxy")
    env = [{"name": f"SETTING_{i}", "value": f"value-{number}-{i}"} for i in range(20)]
    mounts = [{"name": "token", "mountPath": "/var/run/secrets/kubernetes.io/serviceaccount", "readOnly": True}]
    return {
        "metadata": {
            "name": f"web-{number}",
            "namespace": f"team-{number % 50}",
            "uid": f"uid-{number}",
            "resourceVersion": str(number + 1),
            "labels": {"app": f"web-{number % 200}", "pod-template-hash": f"{number:010x}"},
            "managedFields": [{"manager": "kubelet", "operation": "Update", "fieldsV1": {"f:status": {}}}],
        },
        "spec": {
            "containers": [{"name": n, "image": f"shop/{n}", "env": env, "volumeMounts": mounts} for n in names]
        },
        "status": {
            "phase": "Running",
            "conditions": [{"type": t, "status": "True"} for t in ("Initialized", "Ready", "PodScheduled")],
            "containerStatuses": [{"name": n, "ready": True, "restartCount": 0, "state": {}} for n in names],
        },
    }


class Server:
    """The stand-in. `watching`: set when every kind that the operator watches is watched."""

    def __init__(self, pods: int) -> None:
        self._pods = [pod(number) for number in range(pods)]
        self._left = {"/".join(each) for each in WATCHED} | {f"{GROUP}/{VERSION}/{PLURAL}"}
        self.watching = asyncio.Event()
        self.sent: Counter[str] = Counter()
        self.selectors: dict[str, str] = {}

    def application(self) -> web.Application:
        """What answers."""
        found = web.Application()
        found.router.add_route("*", "/{path:.*}", self._answer)
        return found

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        parts = request.path.strip("/").split("/")
        if request.method != "GET":
            return web.json_response({}, status=201)
        if parts == ["api"]:
            return web.json_response({"versions": ["v1"]})
        if parts == ["apis"]:
            return web.json_response({"groups": list(_groups())})
        group, rest = ("", parts[1:]) if parts[0] == "api" else (parts[1], parts[2:])
        if len(rest) == 1:
            return web.json_response({"resources": list(_resources(group, rest[0]))})
        if rest[-1] == "version" or (group, rest[0], rest[-1]) not in KINDS:
            return web.json_response({}, status=404)
        return await self._objects(request, (group, rest[0], rest[-1]))

    async def _objects(self, request: web.Request, which: tuple[str, str, str]) -> web.StreamResponse:
        selector = request.query.get("labelSelector", "")
        name = "/".join(which)
        if "watch" not in request.query:
            # Nobody's pod has a label of the operator's.
            items = self._pods if which[2] == "pods" and not selector else []
            begin, size = int(request.query.get("continue", "0")), int(request.query.get("limit", "0"))
            chunk = items[begin : begin + size] if size else items
            after = {"continue": str(begin + size)} if size and begin + size < len(items) else {}
            self.sent[which[2]] += len(chunk)
            listed = {"kind": f"{KINDS[which]}List", "apiVersion": which[1], "items": chunk}
            return web.json_response({**listed, "metadata": {"resourceVersion": str(len(items) + 1), **after}})
        self.selectors[which[2]] = selector
        stream = web.StreamResponse()
        await stream.prepare(request)
        self._left.discard(name)
        if not self._left:
            self.watching.set()
        await asyncio.sleep(float(request.query.get("timeoutSeconds", "240")))
        return stream


def _groups() -> Iterator[dict[str, object]]:
    for group, version in sorted({(group, version) for group, version, _ in KINDS if group}):
        found = {"groupVersion": f"{group}/{version}", "version": version}
        yield {"name": group, "versions": [found], "preferredVersion": found}


def _resources(group: str, version: str) -> Iterator[dict[str, object]]:
    for (of, at, plural), kind in KINDS.items():
        if (of, at) == (group, version):
            verbs = ["list", "watch", "patch", "get"]
            namespaced = plural != "namespaces"
            yield {
                "name": plural,
                "kind": kind,
                "namespaced": namespaced,
                "verbs": verbs,
                "singularName": kind.lower(),
            }


async def run(pods: int, settle: float = 3.0) -> tuple[Found, Server]:
    """Start the operator beside so many foreign pods, and measure it `settle` seconds after its watches opened."""
    server = Server(pods)
    runner = web.AppRunner(server.application(), shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "kubeconfig"
        config.write_text(yaml.safe_dump(_kubeconfig(f"http://127.0.0.1:{port}")))
        command = [sys.executable, "-m", "kvasir_operator", "run", "--all-namespaces", "--own-namespace", "kvasir"]
        env = {**os.environ, "KUBECONFIG": str(config)}
        with (Path(folder) / "log").open("w+b") as log:
            process = await asyncio.create_subprocess_exec(
                *command, "--liveness", f"http://127.0.0.1:{_free_port()}/healthz", env=env, stderr=log
            )
            opened = asyncio.create_task(server.watching.wait())
            ended = asyncio.create_task(process.wait())
            try:
                await asyncio.wait((opened, ended), timeout=START_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                if not opened.done():
                    log.seek(0)
                    raise RuntimeError(f"the operator does not watch:\n{log.read().decode()}")
                await asyncio.wait((ended,), timeout=settle)
                memory = _highest(process.pid)
            finally:
                opened.cancel()
                if process.returncode is None:
                    process.kill()
                await ended
                await runner.cleanup()
    return Found(memory, server.sent), server


def _kubeconfig(url: str) -> dict[str, object]:
    context = {"name": "stand-in", "context": {"cluster": "stand-in", "user": "nobody"}}
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "stand-in", "cluster": {"server": url}}],
        "users": [{"name": "nobody", "user": {}}],
        "contexts": [context],
        "current-context": "stand-in",
    }


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _highest(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"no memory is known of process {pid}")


def report(pods: int, alone: Found, beside: Found) -> list[str]:
    """The figures, a line each."""
    size = len(json.dumps(pod(0)))
    return [
        f"the operator beside {pods} foreign pods of {size} bytes; {describe()}",
        f"  without them {alone.megabytes:6.1f} MB",
        f"  beside them  {beside.megabytes:6.1f} MB of {MEMORY_MB:g} MB; "
        f"{beside.sent['pods']} pods were sent to it",
    ]


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pods", type=int, default=10_000)
    arguments = parser.parse_args()

    async def both() -> list[str]:
        (alone, _), (beside, _) = await run(0), await run(arguments.pods)
        return report(arguments.pods, alone, beside)

    print("\n".join(asyncio.run(both())))


if __name__ == "__main__":
    main()

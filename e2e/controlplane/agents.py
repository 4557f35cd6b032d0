"""The node agents of a cluster (`e2e/node`): one for the nodes that stay, and one for each that may be lost."""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from e2e import netns
from e2e.controlplane.process import Program
from e2e.node.config import Config, Node

_STOP_SECONDS = 15.0
_REPOSITORY = str(Path(__file__).resolve().parents[2])


def python(name: str, namespace: str, logs: Path, *arguments: str, **environment: str) -> Program:
    """This checkout's Python in a cluster's namespace, without this machine's clusters and settings."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("KUBE", "KVASIR_"))}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [_REPOSITORY, env.get("PYTHONPATH")]))
    return Program(name, namespace, [sys.executable, *arguments], logs, {**env, **environment})


class Agents:
    """The agents of one cluster, below its folder `root`. `volumes` stand for the pods' volumes of these names."""

    def __init__(self, namespace: str, root: Path, pki: Path, volumes: Mapping[str, Path]) -> None:
        self._namespace = namespace
        self._root = root
        self._pki = pki
        self._volumes = dict(volumes)
        self._running: dict[Program, range] = {}  # and the numbers of their nodes
        self._next = 1

    def start(self, nodes: Sequence[Node], *, proxy: bool) -> Program:
        """Start an agent, which registers its nodes. `proxy`: it is the Service proxy too."""
        numbers = range(self._next, self._next + len(nodes))
        self._next = numbers.stop
        config = Config(
            kubeconfig=self._pki / "node.kubeconfig",
            ca=self._pki / "ca.crt",
            netns=self._namespace,
            state=self._root / "nodes",
            nodes=tuple(nodes),
            volumes=self._volumes,
            first=numbers.start,
            proxy=proxy,
        )
        name = "node-agent" if proxy else f"node-agent-{numbers.start}"
        path = self._root / f"{name}.json"
        path.write_bytes(msgspec.json.encode(config, enc_hook=str))
        agent = python(name, self._namespace, self._root / "logs", "-m", "e2e.node", str(path))
        self._running[agent] = numbers
        return agent

    def lose(self, agent: Program, *, silently: bool) -> None:
        """Kill an agent and what runs on its nodes. `silently`: nothing of it reaches the rest of the cluster."""
        numbers = self._running.pop(agent)
        if silently:
            ours = tuple(f"v{number}-" for number in numbers)
            links = [link for link in netns.links(self._namespace) if link.startswith(ours)]
            netns.ip("-n", self._namespace, batch=[f"link set {link} down" for link in links])
        agent.kill()
        for number in numbers:
            for name in netns.names(f"{self._namespace}.pod-{number}-"):
                netns.delete(name)

    def leave(self, agent: Program) -> None:
        """Let an agent stop its pods and end, unless it was lost."""
        if self._running.pop(agent, None) is not None:
            agent.terminate(_STOP_SECONDS)

    def running(self) -> list[Program]:
        """Those that were not lost."""
        return list(self._running)

    def stop(self) -> None:
        """Let all stop their pods, and wait for it."""
        for agent in self._running:
            agent.terminate(_STOP_SECONDS)
        self._running.clear()

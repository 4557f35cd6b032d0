"""A Kubernetes control plane in a network namespace of its own.

The test process stays in the host's namespace and reaches the cluster through doors on its loopback (`forward.py`):
the admin kubeconfig's server is such a door, so kubectl, helm and any client work from outside as they are.

The controller-manager is started apart (`start_controllers`), after the custom resources are defined: its garbage
collector learns of new kinds by a resync that can take 40 s, and the children of a deleted object would stay that
long.
"""

import itertools
import json
import os
import re
import shutil
import ssl
import subprocess
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from e2e import netns
from e2e.controlplane.agents import Agents
from e2e.controlplane.binaries import Binaries
from e2e.controlplane.forward import Forwarder
from e2e.controlplane.pki import Authority, service_account_keys
from e2e.controlplane.process import ClusterError, Program
from e2e.node.config import Node

SERVICE_NETWORK = "10.96.0.0/16"
_API_PORT = 6443
_START_SECONDS = 240.0
# What Kvasir's own accounts do is noted, for tests to hold against their rules.
_AUDIT = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "rules": [
        {"level": "Metadata", "userGroups": ["system:serviceaccounts:kvasir-system"]},
        {"level": "None"},
    ],
}
_APISERVER = "kube-apiserver"
_serial = itertools.count()


def version(binary: Path) -> tuple[int, int]:
    """A Kubernetes program's major and minor version, as it says itself."""
    output = subprocess.run([binary, "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"v(\d+)\.(\d+)", output)
    if match is None:
        raise ClusterError(f"{binary} --version says {output!r}")
    return int(match.group(1)), int(match.group(2))


def _no_insecure_port(binary: Path) -> list[str]:
    """Controller-manager and scheduler served plain HTTP on all addresses too, up to 1.22, unless told not to."""
    return ["--port=0"] if version(binary) < (1, 23) else []


class Cluster:
    """A control plane below `root` (certificates, etcd's data, `logs/`).

    `start` brings up etcd, the API server and the scheduler; `start_controllers` the controller-manager;
    `start_nodes` the node agent. `stop` may be called at any time and removes all processes and namespaces.
    """

    def __init__(self, binaries: Binaries, root: Path) -> None:
        self.root = root
        self.logs = root / "logs"
        self.kubeconfig = root / "pki" / "admin.kubeconfig"
        self.namespace = f"{netns.owner()}.{next(_serial)}"
        self._binaries = binaries
        self._programs: list[Program] = []
        self._agents: Agents | None = None
        self._forwarder: Forwarder | None = None

    def start(self) -> None:
        """Return when the API server is ready. Raises ClusterError or netns.NetworkError, after cleaning up."""
        try:
            self._start()
        except BaseException:
            self.stop()
            raise

    def _start(self) -> None:
        netns.sweep()
        self.logs.mkdir(parents=True)
        netns.add_cluster(self.namespace)
        self._forwarder = Forwarder(self.namespace)
        etcd = self._start_etcd()
        self._make_credentials()
        etcd.wait_until("healthy", lambda: self._healthy("127.0.0.1", 2379, "/health", tls=False), _START_SECONDS)
        self._start_apiserver()
        self._run(
            "kube-scheduler",
            self._binaries.scheduler,
            f"--kubeconfig={self._pki / 'scheduler.kubeconfig'}",
            "--leader-elect=false",
            *_no_insecure_port(self._binaries.scheduler),
        )

    @property
    def _pki(self) -> Path:
        return self.root / "pki"

    def _run(self, name: str, binary: Path, *arguments: str) -> Program:
        program = Program(name, self.namespace, [str(binary), *arguments], self.logs)
        self._programs.append(program)
        return program

    def _start_etcd(self) -> Program:
        client, peer = "http://127.0.0.1:2379", "http://127.0.0.1:2380"
        return self._run(
            "etcd",
            self._binaries.etcd,
            f"--data-dir={self.root / 'etcd'}",
            "--unsafe-no-fsync",
            f"--listen-client-urls={client}",
            f"--advertise-client-urls={client}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster=default={peer}",
        )

    def _make_credentials(self) -> None:
        authority = Authority(self._pki, "kvasir-e2e")
        names = [
            "kubernetes",
            "kubernetes.default",
            "kubernetes.default.svc",
            "kubernetes.default.svc.cluster.local",
        ]
        addresses = ["127.0.0.1", netns.GATEWAY, "10.96.0.1"]
        authority.issue("apiserver", "kube-apiserver", hosts=[*names, "localhost", *addresses])
        service_account_keys(self._pki)
        Authority(self._pki / "aggregator", "kvasir-e2e-aggregator").issue("client", "front-proxy-client")
        inside = f"https://{netns.GATEWAY}:{_API_PORT}"
        for name, user in (
            ("scheduler", "system:kube-scheduler"),
            ("controller-manager", "system:kube-controller-manager"),
        ):
            authority.kubeconfig(name, inside, user)
        authority.kubeconfig("node", inside, "e2e-node-agent", groups=["system:masters"])
        outside = f"https://127.0.0.1:{self.port(netns.GATEWAY, _API_PORT)}"
        authority.kubeconfig("admin", outside, "e2e-admin", groups=["system:masters"])

    def _start_apiserver(self) -> None:
        pki = self._pki
        policy = self.root / "audit.yaml"
        policy.write_text(json.dumps(_AUDIT))
        server = self._run(
            _APISERVER,
            self._binaries.apiserver,
            "--etcd-servers=http://127.0.0.1:2379",
            f"--advertise-address={netns.GATEWAY}",
            f"--secure-port={_API_PORT}",
            f"--service-cluster-ip-range={SERVICE_NETWORK}",
            "--authorization-mode=Node,RBAC",
            "--allow-privileged=true",
            f"--audit-policy-file={policy}",
            f"--audit-log-path={self.logs / 'audit.log'}",
            f"--client-ca-file={pki / 'ca.crt'}",
            f"--tls-cert-file={pki / 'apiserver.crt'}",
            f"--tls-private-key-file={pki / 'apiserver.key'}",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-key-file={pki / 'service-accounts.pub'}",
            f"--service-account-signing-key-file={pki / 'service-accounts.key'}",
            f"--requestheader-client-ca-file={pki / 'aggregator' / 'ca.crt'}",
            "--requestheader-allowed-names=front-proxy-client",
            "--requestheader-extra-headers-prefix=X-Remote-Extra-",
            "--requestheader-group-headers=X-Remote-Group",
            "--requestheader-username-headers=X-Remote-User",
            f"--proxy-client-cert-file={pki / 'aggregator' / 'client.crt'}",
            f"--proxy-client-key-file={pki / 'aggregator' / 'client.key'}",
        )
        server.wait_until("ready", lambda: self._healthy(netns.GATEWAY, _API_PORT, "/readyz"), _START_SECONDS)

    def restart_apiserver(self) -> None:
        """Kill the API server and start it again; returns when it is ready. etcd stays."""
        server = next(program for program in self._programs if program.name == _APISERVER)
        self._programs.remove(server)  # its end is no failure
        server.kill()
        self._start_apiserver()

    def start_controllers(self) -> None:
        """Start the controller-manager, once the custom resources are defined; returns when it is healthy."""
        manager = self._run(
            "kube-controller-manager",
            self._binaries.controller_manager,
            f"--kubeconfig={self._pki / 'controller-manager.kubeconfig'}",
            f"--service-account-private-key-file={self._pki / 'service-accounts.key'}",
            f"--root-ca-file={self._pki / 'ca.crt'}",
            "--use-service-account-credentials=true",
            "--leader-elect=false",
            # The node agent registers nodes as Ready once and sends no heartbeats.
            "--node-monitor-grace-period=24h",
            "--node-monitor-period=1s",
            "--kube-api-qps=200",
            "--kube-api-burst=400",
            *_no_insecure_port(self._binaries.controller_manager),
        )
        manager.wait_until("healthy", lambda: self._healthy("127.0.0.1", 10257, "/healthz"), _START_SECONDS)

    def start_nodes(self, nodes: Sequence[Node], volumes: Mapping[str, Path]) -> None:
        """Start the node agent and Service proxy (`e2e/node`); returns when all `nodes` are Ready.

        `volumes`: folders of this machine that stand for the pods' volumes of these names.
        """
        self._agents = Agents(self.namespace, self.root, self._pki, volumes)
        self._joined(self._agents.start(nodes, proxy=True), nodes)

    def join(self, node: Node) -> Program:
        """Add a node with an agent of its own, for `lose`; returns the agent when the node is Ready."""
        assert self._agents is not None, "no nodes are started"
        agent = self._agents.start([node], proxy=False)
        self._joined(agent, [node])
        return agent

    def lose(self, agent: Program, *, silently: bool) -> None:
        """End a node's agent and all that runs there. `silently`: its network first, so that nobody hears."""
        assert self._agents is not None, "no nodes are started"
        self._agents.lose(agent, silently=silently)

    def leave(self, agent: Program) -> None:
        """Take the node of an agent that was not lost out of the cluster: another may have its name."""
        assert self._agents is not None, "no nodes are started"
        self._agents.leave(agent)

    def _joined(self, agent: Program, nodes: Sequence[Node]) -> None:
        def ready() -> bool:
            items: list[dict[str, Any]] = self.get("nodes")["items"]
            up = {node["metadata"]["name"] for node in items if _schedulable(node)}
            return {node.name for node in nodes} <= up

        agent.wait_until("all nodes Ready", ready, _START_SECONDS)

    def _healthy(self, host: str, port: int, path: str, *, tls: bool = True) -> bool:
        context = None
        if tls:
            # Only an answer is wanted here; the controller-manager's certificate is one it made up itself.
            context = ssl._create_unverified_context()
        url = f"{'https' if tls else 'http'}://127.0.0.1:{self.port(host, port)}{path}"
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), *([urllib.request.HTTPSHandler(context=context)] if context else [])
        )
        try:
            with opener.open(url, timeout=5) as response:
                return bool(response.status == 200)
        except OSError:
            return False

    def port(self, host: str, port: int) -> int:
        """A port of the host's 127.0.0.1 that leads to an address inside: a pod, a Service."""
        assert self._forwarder is not None, "not started"
        return self._forwarder.port(host, port)

    def kubectl(
        self, *arguments: str, input: str | None = None, check: bool = True
    ) -> "subprocess.CompletedProcess[str]":
        """Run kubectl as cluster admin. With `check`, raises ClusterError with its words when it fails."""
        return self._tool(
            [str(self._binaries.kubectl), "--kubeconfig", str(self.kubeconfig), *arguments], input, check
        )

    def helm(self, *arguments: str, check: bool = True) -> "subprocess.CompletedProcess[str]":
        """Run helm as cluster admin, as `kubectl` does."""
        return self._tool([str(self._binaries.helm), "--kubeconfig", str(self.kubeconfig), *arguments], None, check)

    def kubectl_process(self, *arguments: str) -> "subprocess.Popen[str]":
        """kubectl as cluster admin, left running, its output to be read; the caller ends it."""
        command = [str(self._binaries.kubectl), "--kubeconfig", str(self.kubeconfig), *arguments]
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=self._environment()
        )

    def _environment(self) -> dict[str, str]:
        home = self.root / "home"
        home.mkdir(exist_ok=True)
        return {"HOME": str(home), "PATH": os.environ.get("PATH", "")}

    def _tool(self, command: Sequence[str], input: str | None, check: bool) -> "subprocess.CompletedProcess[str]":
        env = self._environment()
        done = subprocess.run(command, input=input, capture_output=True, text=True, env=env, check=False)
        if check and done.returncode:
            raise ClusterError(f"`{' '.join(command)}` failed with {done.returncode}: {done.stderr or done.stdout}")
        return done

    def get(self, *arguments: str) -> dict[str, Any]:
        """`kubectl get ARGUMENTS -o json`, parsed."""
        result: dict[str, Any] = json.loads(self.kubectl("get", *arguments, "-o", "json").stdout)
        return result

    def check(self) -> None:
        """Raise ClusterError when a part of the cluster has ended."""
        for program in [*self._programs, *(self._agents.running() if self._agents else [])]:
            program.check()

    def processes(self) -> list[int]:
        """Process ids in the pods' namespaces."""
        pods = netns.names(f"{self.namespace}.")
        return [int(pid) for name in pods for pid in netns.ip("netns", "pids", name).split()]

    def stop(self) -> None:
        """End everything and remove the namespaces; idempotent. Logs stay, etcd's data does not."""
        if self._agents is not None:
            self._agents.stop()
            self._agents = None
        # Nothing of the control plane is kept: no reason to wait for its graceful end.
        for program in reversed(self._programs):
            program.kill()
        self._programs.clear()
        if self._forwarder is not None:
            self._forwarder.close()
            self._forwarder = None
        for name in netns.names(self.namespace):
            netns.delete(name)
        shutil.rmtree(self.root / "etcd", ignore_errors=True)


def _schedulable(node: Mapping[str, Any]) -> bool:
    conditions = {c["type"]: c["status"] for c in node["status"].get("conditions") or ()}
    taints = {taint["key"] for taint in node["spec"].get("taints") or ()}
    return conditions.get("Ready") == "True" and "node.kubernetes.io/not-ready" not in taints

"""The stage itself: what pods, Services and accounts are here is what they are in a real cluster."""

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from e2e import netns, steps
from e2e.controlplane.binaries import Binaries
from e2e.controlplane.cluster import Cluster
from e2e.controlplane.process import ClusterError
from e2e.node.proxy import fronts
from e2e.steps import Object, apply, eventually, pods

PATIENCE = 120.0


@pytest.fixture(scope="module")
def namespace(nodes: Cluster) -> Iterator[str]:
    with steps.scratch(nodes, "machinery") as name:
        yield name


def pod(name: str, command: list[str], **spec: Any) -> Object:
    """A pod of one container named c."""
    container = {"name": "c", "image": "checkout", "command": command, **spec.pop("container", {})}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name},
        "spec": {"containers": [container], "restartPolicy": "Never", **spec},
    }


def finished(cluster: Cluster, namespace: str, name: str) -> Object:
    """The pod, once it has ended."""

    def look() -> Object | None:
        found = cluster.get("pod", name, "-n", namespace)
        return found if found["status"]["phase"] in ("Succeeded", "Failed") else None

    return eventually(look, PATIENCE, f"pod {name} ended", cluster)


LOOK_AROUND = """
import json, os, pathlib, socket, ssl, urllib.error, urllib.request
account = pathlib.Path("/var/run/secrets/kubernetes.io/serviceaccount")

def write(path):
    try:
        pathlib.Path(path).write_text("x")
        return "written"
    except OSError as error:
        return os.strerror(error.errno)

def api(path):
    server = f"https://{os.environ['KUBERNETES_SERVICE_HOST']}:{os.environ['KUBERNETES_SERVICE_PORT']}"
    request = urllib.request.Request(server + path)
    request.add_header("Authorization", "Bearer " + (account / "token").read_text())
    context = ssl.create_default_context(cafile=str(account / "ca.crt"))
    try:
        with urllib.request.urlopen(request, context=context, timeout=60) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return [error.code, json.load(error)["message"]]

def reach(address):
    try:
        socket.create_connection((address, 443), timeout=10).close()
        return "connected"
    except OSError as error:
        return os.strerror(error.errno)

print(json.dumps({
    "secret": pathlib.Path("/etc/secret/password").read_text(),
    "config": pathlib.Path("/etc/config/answer").read_text(),
    "environment": os.environ["ANSWER"],
    "hostname": socket.gethostname(),
    "ip": os.environ["POD_IP"],
    "resolved": socket.gethostbyname(socket.gethostname()),
    "root": write("/outside"),
    "emptyDir": write("/var/lib/scratch/x"),
    "secret write": write("/etc/secret/password"),
    "tmp": write("/tmp/kvasir-e2e-looker"),
    "shm": os.statvfs("/dev/shm").f_blocks * os.statvfs("/dev/shm").f_frsize,
    "capabilities": open("/proc/self/status").read().split("CapEff:")[1].split()[0],
    "interfaces": sorted(os.listdir("/sys/class/net")),
    "pid": os.getpid(),
    "processes": sorted(int(name) for name in os.listdir("/proc") if name.isdigit()),
    "namespace": (account / "namespace").read_text(),
    "allowed": api("/api/v1/namespaces/machinery/pods"),
    "forbidden": api("/api/v1/namespaces/machinery/secrets"),
    "world": reach("192.0.2.1"),
}))
"""


def test_a_pod_sees_its_volumes_account_and_network_and_nothing_else(nodes: Cluster, namespace: str) -> None:
    account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "looker"}}
    role = {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "Role",
        "metadata": {"name": "looker"},
        "rules": [{"apiGroups": [""], "resources": ["pods"], "verbs": ["list"]}],
    }
    binding = {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "RoleBinding",
        "metadata": {"name": "looker"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "looker"},
        "subjects": [{"kind": "ServiceAccount", "name": "looker", "namespace": namespace}],
    }
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s"}, "stringData": {"password": "mead"}}
    config = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "c"}, "data": {"answer": "42"}}
    looker = pod(
        "looker",
        ["python3", "-c", LOOK_AROUND],
        serviceAccountName="looker",
        volumes=[
            {"name": "secret", "secret": {"secretName": "s"}},
            {"name": "config", "configMap": {"name": "c"}},
            {"name": "scratch", "emptyDir": {}},
            {"name": "tmp", "emptyDir": {}},
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "128Mi"}},
        ],
        container={
            "env": [
                {"name": "ANSWER", "valueFrom": {"configMapKeyRef": {"name": "c", "key": "answer"}}},
                {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
            ],
            "securityContext": {"readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}},
            "volumeMounts": [
                {"name": "secret", "mountPath": "/etc/secret", "readOnly": True},
                {"name": "config", "mountPath": "/etc/config"},
                {"name": "scratch", "mountPath": "/var/lib/scratch"},
                {"name": "tmp", "mountPath": "/tmp"},
                {"name": "shm", "mountPath": "/dev/shm"},
            ],
        },
    )
    apply(nodes, account, role, binding, secret, config, looker, namespace=namespace)

    done = finished(nodes, namespace, "looker")
    assert done["status"]["phase"] == "Succeeded", steps.log_of(nodes, done)
    seen = json.loads(steps.log_of(nodes, done).splitlines()[-1])
    code, message = seen.pop("forbidden")
    assert code == 403
    assert 'User "system:serviceaccount:machinery:looker" cannot list resource "secrets"' in message
    address = done["status"]["podIP"]
    assert address.startswith("10.244.")
    assert seen == {
        "secret": "mead",
        "config": "42",
        "environment": "42",
        "hostname": "looker",
        "ip": address,
        "resolved": address,
        "root": "Read-only file system",
        "emptyDir": "written",
        "secret write": "Read-only file system",
        "tmp": "written",
        "shm": 128 << 20,
        "capabilities": "0000000000000000",
        "interfaces": ["eth0", "lo"],
        "pid": 1,
        "processes": [1],
        "namespace": namespace,
        "allowed": 200,
        "world": "Network is unreachable",
    }
    assert not Path("/tmp/kvasir-e2e-looker").exists(), "a pod's /tmp is the machine's"


def test_a_service_reaches_ready_pods_from_pods_and_from_the_test(nodes: Cluster, namespace: str) -> None:
    template = {
        "metadata": {"labels": {"app": "web"}},
        "spec": {
            # As process 1 it does not hear a SIGTERM that it does not handle.
            "terminationGracePeriodSeconds": 1,
            "containers": [
                {
                    "name": "c",
                    "image": "checkout",
                    "command": ["sh", "-c", "echo $POD > /srv/name && exec python3 -m http.server 8000 -d /srv"],
                    "env": [{"name": "POD", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}],
                    "ports": [{"name": "http", "containerPort": 8000}],
                    "readinessProbe": {"httpGet": {"path": "/name", "port": "http"}, "periodSeconds": 1},
                    "volumeMounts": [{"name": "srv", "mountPath": "/srv"}],
                }
            ],
            "volumes": [{"name": "srv", "emptyDir": {}}],
        },
    }
    deployment = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "web"},
        "spec": {"replicas": 2, "selector": {"matchLabels": {"app": "web"}}, "template": template},
    }
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "web"},
        "spec": {"selector": {"app": "web"}, "ports": [{"name": "http", "port": 80, "targetPort": "http"}]},
    }
    apply(nodes, deployment, service, namespace=namespace)
    nodes.kubectl("-n", namespace, "rollout", "status", "deployment/web", "--timeout=120s")
    names = {item["metadata"]["name"] for item in pods(nodes, namespace, "app=web")}
    front = nodes.get("service", "web", "-n", namespace)["spec"]["clusterIP"]

    answered: set[str] = set()

    def both() -> bool:
        try:
            answered.add(steps.http(nodes, front, 80, "/name").strip())
        except OSError:
            return False  # the proxy has not heard of the endpoints yet
        return answered == names

    eventually(both, PATIENCE, "both pods answered through the Service", nodes)
    fetch = f"import urllib.request as u; print(u.urlopen('http://{front}/name', timeout=60).read().decode())"
    apply(nodes, pod("client", ["python3", "-c", fetch]), namespace=namespace)
    assert steps.log_of(nodes, finished(nodes, namespace, "client")).strip() in names

    nodes.kubectl("-n", namespace, "delete", "deployment", "web")
    eventually(lambda: not pods(nodes, namespace, "app=web"), PATIENCE, "pods gone", nodes)
    with pytest.raises(OSError, match=r"reset|closed|without"):
        steps.http(nodes, front, 80, "/name")


def test_deletion_waits_for_the_graceful_end(nodes: Cluster, namespace: str) -> None:
    script = "trap 'echo leaving; exit 0' TERM; echo up; while :; do sleep 0.1; done"
    apply(nodes, pod("polite", ["sh", "-c", script]), namespace=namespace)

    def running() -> Object | None:
        found = nodes.get("pod", "polite", "-n", namespace)
        return found if "up" in steps.log_of(nodes, found) else None

    found = eventually(running, PATIENCE, "pod runs", nodes)
    before = steps.pod_networks(nodes)
    nodes.kubectl("-n", namespace, "delete", "pod", "polite", "--timeout=120s")
    assert steps.log_of(nodes, found).split() == ["up", "leaving"]
    assert len(before - steps.pod_networks(nodes)) == 1


def test_a_crashing_pod_reports_its_last_words_and_restarts(nodes: Cluster, namespace: str) -> None:
    crash = pod("crash", ["sh", "-c", "echo 'kvasir: error: no mead' >&2; exit 3"], restartPolicy="Always")
    apply(nodes, crash, namespace=namespace)

    def look() -> Object | None:
        status = nodes.get("pod", "crash", "-n", namespace)["status"].get("containerStatuses")
        state: Object | None = status[0] if status and "waiting" in status[0]["state"] else None
        return state if state and state["restartCount"] else None

    state = eventually(look, PATIENCE, "pod backs off", nodes)
    assert state["state"]["waiting"]["reason"] == "CrashLoopBackOff"
    assert state["lastState"]["terminated"]["exitCode"] == 3
    assert state["lastState"]["terminated"]["message"] == "kvasir: error: no mead"


def test_a_pod_waits_for_the_secret_it_names(nodes: Cluster, namespace: str) -> None:
    late = {"env": [{"name": "S", "valueFrom": {"secretKeyRef": {"name": "late", "key": "k"}}}]}
    apply(nodes, pod("late", ["sh", "-c", "echo $S"], container=late), namespace=namespace)

    def waits() -> bool:
        status = nodes.get("pod", "late", "-n", namespace)["status"].get("containerStatuses")
        return bool(status) and "secret 'late' not found" in status[0]["state"]["waiting"]["message"]

    eventually(waits, PATIENCE, "pod waits for its secret", nodes)
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "late"}, "stringData": {"k": "came"}}
    apply(nodes, secret, namespace=namespace)
    assert steps.log_of(nodes, finished(nodes, namespace, "late")).strip() == "came"


def test_a_failed_start_leaves_nothing(programs: Binaries, tmp_path: Path) -> None:
    broken = Cluster(replace(programs, etcd=Path("/bin/false")), tmp_path / "c")
    with pytest.raises(ClusterError, match="etcd ended with 1"):
        broken.start()
    assert netns.names(broken.namespace) == []


def test_a_killed_run_leaves_no_process_and_its_namespaces_are_swept(programs: Binaries, tmp_path: Path) -> None:
    script = (
        "import sys, pathlib; from e2e.controlplane import binaries; from e2e.controlplane.cluster import Cluster;"
        "c = Cluster(binaries.find(), pathlib.Path(sys.argv[1])); c.start(); print(c.namespace, flush=True);"
        "sys.stdin.read()"
    )
    run = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "c")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[1],
        text=True,
    )
    assert run.stdout is not None
    namespace = run.stdout.readline().strip()
    orphans = [int(pid) for pid in Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()]
    assert len(orphans) == 3
    handles = [os.pidfd_open(pid) for pid in orphans]
    run.send_signal(signal.SIGKILL)
    run.communicate()
    for handle in handles:
        _wait_for_end(handle)
    assert namespace in netns.sweep()
    assert netns.names(namespace) == []


_PEER = "import socket, time; s = socket.create_server(('', 8000)); print(flush=True); time.sleep(600)"
_DEAD = (
    "import socket, time; s = socket.create_connection(('10.244.1.2', 8000)); print(flush=True); time.sleep(600)"
)


def test_a_dead_pods_address_is_free_though_its_goodbye_was_not_heard(programs: Binaries) -> None:
    """Its socket, and so its namespace, outlive it: the peer was cut off first, and acknowledges nothing."""
    cluster = f"{netns.owner()}.goodbye"
    peer, dead = f"{cluster}.pod-1-1", f"{cluster}.pod-1-2"
    netns.add_cluster(cluster)
    processes = []
    try:
        for name, link, address, script in ((peer, "v1", "10.244.1.2", _PEER), (dead, "v2", "10.244.1.3", _DEAD)):
            netns.add_pod(cluster, name, link, address)
            command = netns.command(name, [sys.executable, "-c", script])
            processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
            assert processes[-1].stdout is not None
            assert processes[-1].stdout.readline() == "\n"
        netns.ip("-n", cluster, "link", "set", "v1", "down")
        netns.delete(dead)
        assert netns.links(cluster, "type", "veth") == ["v1"]
    finally:
        for name in netns.names(cluster):
            netns.delete(name)
        for process in processes:
            process.communicate()


def _wait_for_end(handle: int) -> None:

    readable, _, _ = select.select([handle], [], [], 10.0)
    os.close(handle)
    assert readable, "a process of a killed run still runs"


def test_only_ready_endpoints_stand_behind_a_service() -> None:
    service = {
        "metadata": {"namespace": "n", "name": "s"},
        "spec": {"clusterIP": "10.96.0.9", "ports": [{"name": "http", "port": 80, "targetPort": 8000}]},
    }
    headless = {"metadata": {"namespace": "n", "name": "h"}, "spec": {"clusterIP": "None", "ports": [{"port": 1}]}}
    endpoints = {
        "metadata": {"namespace": "n", "name": "s"},
        "subsets": [
            {
                "addresses": [{"ip": "10.244.1.2"}],
                "notReadyAddresses": [{"ip": "10.244.1.3"}],
                "ports": [{"name": "http", "port": 8000}, {"name": "other", "port": 9}],
            }
        ],
    }
    assert fronts([service, headless], [endpoints]) == {("10.96.0.9", 80): (("10.244.1.2", 8000),)}
    assert fronts([service], []) == {("10.96.0.9", 80): ()}

"""The stand-in for LeaderWorkerSet's controller: what groups are here is what they are where the real one runs."""

import sys
from collections.abc import Iterator
from typing import Any

import pytest

from e2e import steps
from e2e.controlplane.cluster import Cluster
from e2e.lws.running import controlled
from e2e.steps import Object, eventually, pods
from kvasir_operator.api.kinds import SET_API_VERSION, SET_KIND

pytestmark = pytest.mark.soak  # `test_groups.py` runs groups each time

PATIENCE = 120.0
# Each worker of a group tells the leader its number, whose address it is told by name.
MEET = """
import os, socket, time
place, leader = os.environ["LWS_WORKER_INDEX"], os.environ["LWS_LEADER_ADDRESS"]
if place == "0":
    door = socket.create_server(("", 5557))
    for _ in range(int(os.environ["LWS_GROUP_SIZE"]) - 1):
        print("met", door.accept()[0].recv(1).decode(), flush=True)
else:
    while True:
        try:
            socket.create_connection((leader, 5557)).send(place.encode())
            break
        except OSError:
            time.sleep(0.1)
time.sleep(3600)
"""


@pytest.fixture(scope="module")
def namespace(nodes: Cluster) -> Iterator[str]:
    with controlled(nodes), steps.scratch(nodes, "sets") as name:
        yield name


def made(replicas: int, **leader: Any) -> Object:
    """A set of groups of three."""
    container = {"name": "c", "image": "checkout", "command": [sys.executable, "-c", MEET]}
    template = {"spec": {"containers": [container], "terminationGracePeriodSeconds": 1}}
    return {
        "apiVersion": SET_API_VERSION,
        "kind": SET_KIND,
        "metadata": {"name": "meet"},
        "spec": {
            "replicas": replicas,
            "leaderWorkerTemplate": {"size": 3, "workerTemplate": template, **leader},
        },
    }


def applied(cluster: Cluster, namespace: str, item: Object) -> None:
    """Apply the set, and return once all its groups are ready, and no other."""
    steps.apply(cluster, item, namespace=namespace)
    wanted = item["spec"]["replicas"]

    def ready() -> bool:
        status = cluster.get("lws", "meet", "-n", namespace).get("status", {})
        there = len(pods(cluster, namespace)) == 3 * wanted
        return there and (status.get("replicas", 0), status.get("readyReplicas", 0)) == (wanted, wanted)

    eventually(ready, PATIENCE, f"{wanted} groups are ready", cluster)


def uids(cluster: Cluster, namespace: str) -> dict[str, str]:
    return {pod["metadata"]["name"]: pod["metadata"]["uid"] for pod in pods(cluster, namespace)}


def test_groups_meet_by_name_come_back_as_a_whole_and_go_with_their_set(nodes: Cluster, namespace: str) -> None:
    applied(nodes, namespace, made(2))
    before = uids(nodes, namespace)
    assert sorted(before) == [f"meet-{group}{worker}" for group in "01" for worker in ("", "-1", "-2")]
    by_name = {pod["metadata"]["name"]: pod for pod in pods(nodes, namespace)}

    def met() -> bool:
        logs = [steps.log_of(nodes, by_name[leader]).split() for leader in ("meet-0", "meet-1")]
        return all({*log[1::2]} == {"1", "2"} for log in logs)

    eventually(met, PATIENCE, "the leaders have met their workers", nodes)
    assert nodes.get("lws", "meet", "-n", namespace)["status"]["conditions"][0]["status"] == "True"

    steps.kill(nodes, by_name["meet-1-2"])

    def anew() -> bool:
        now = uids(nodes, namespace)
        return now.keys() == before.keys() and {name for name in now if now[name] != before[name]} == {
            "meet-1",
            "meet-1-1",
            "meet-1-2",
        }

    eventually(anew, PATIENCE, "one group is made anew, the other is as it was", nodes)
    applied(nodes, namespace, made(1))
    assert all(uids(nodes, namespace)[name] == before[name] for name in ("meet-0", "meet-0-1", "meet-0-2"))

    nodes.kubectl("-n", namespace, "delete", "lws", "meet", "--timeout=120s")
    eventually(lambda: not pods(nodes, namespace), PATIENCE, "all pods have gone with the set", nodes)
    eventually(lambda: not nodes.get("services", "-n", namespace)["items"], PATIENCE, "and its Service", nodes)


def test_the_scale_subresource_counts_groups(nodes: Cluster, namespace: str) -> None:
    applied(nodes, namespace, made(0))
    nodes.kubectl("-n", namespace, "scale", "lws", "meet", "--replicas=1")
    eventually(lambda: len(pods(nodes, namespace)) == 3, PATIENCE, "a group is made", nodes)
    nodes.kubectl("-n", namespace, "delete", "lws", "meet", "--timeout=120s")

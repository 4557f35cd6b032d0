"""Two nodes in network namespaces of their own: the ranks meet over the link between them, until it is cut."""

import ctypes
import os
import random
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from node_workers import TwoNodes, errors
from rank_workers import SECONDS, Greedy, Request, Router, Worker

from kvasir_engine import keepalive

pytestmark = [
    pytest.mark.dataplane,
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root"),
]

COUNT, NETWORK = 6, "10.245.0"
TOKEN_BYTES = 3 * 2 * 4 * 16 * 4
"""Layers, K and V, heads, dimensions, bytes."""
_CLONE_NEWNET = 0x40000000


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=SECONDS)


@pytest.fixture
def namespaces() -> Iterator[list[str]]:
    """Two of them, `eth0` of one wired to that of the other."""
    names = [f"kvasir-nodes-{os.getpid()}-{node}" for node in range(2)]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("-n", names[0], "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", names[1])
        for node, name in enumerate(names):
            ip("-n", name, "addr", "add", f"{NETWORK}.{node + 1}/24", "dev", "eth0")
            for link in ("lo", "eth0"):
                ip("-n", name, "link", "set", link, "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


def link_bytes(name: str) -> int:
    """Bytes that a namespace's `eth0` has sent."""
    command = ["ip", "netns", "exec", name, "cat", "/sys/class/net/eth0/statistics/tx_bytes"]
    return int(subprocess.run(command, check=True, capture_output=True, timeout=SECONDS).stdout)


def enter(names: list[str], node: int) -> None:
    """Move this process into its node's namespace, where it gives up sooner than in earnest."""
    with Path("/run/netns", names[node]).open() as namespace:
        if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")
    keepalive.IDLE_SECONDS, keepalive.SILENT_SECONDS = 1, 2
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.pop(name, None)  # a test before this one may have had ranks in its own process, on loopback
    os.environ["UCX_TLS"] = "tcp,self"  # on one machine it would take shared memory


def test_the_tokens_are_those_of_one_rank_until_the_link_is_cut_and_then_both_nodes_say_so(
    folder: Path, greedy: Greedy, namespaces: list[str]
) -> None:
    setups = [partial(enter, namespaces, node) for node in range(2)]
    nodes = TwoNodes(folder, "both", (f"{NETWORK}.1", 5557), setups)
    leader, follower = nodes.leader, nodes.follower
    try:
        router = Router(leader, leader)
        request = Request("alone", greedy.prompt(random.Random(9), 70, COUNT), COUNT)
        router.ask_decode(request)
        router.run()
        assert request.output == greedy(request.prompt, COUNT)
        for log in (leader.log, follower.log):
            assert f"model ranks meet address=tcp://{NETWORK}.1:" in log.read_text()
            assert "interface=eth0" in log.read_text()
        ip("-n", namespaces[1], "link", "set", "eth0", "down")
        for process in (leader.process, follower.process):
            process.join(SECONDS)
            assert process.exitcode == 1
        silent = "is silent: it has answered nothing for 2 s; the worker ends with it"
        assert errors(leader.log) == [f"node 1 of 2 at {NETWORK}.2 {silent}"]
        assert errors(follower.log) == [f"the leader at {NETWORK}.1:5557 {silent}"]
    finally:
        nodes.kill()


@pytest.mark.soak
def test_kv_goes_from_each_node_over_the_link(folder: Path, greedy: Greedy, namespaces: list[str]) -> None:
    setups = [partial(enter, namespaces, node) for node in range(2)]
    nodes = TwoNodes(folder, "prefill", (f"{NETWORK}.1", 5557), setups)
    decode = Worker(folder, "decode", 1, 16, setup=setups[0])
    try:
        router = Router(nodes.leader, decode)
        for length in (75, 120):
            request = Request(f"over {length}", greedy.prompt(random.Random(length), length, COUNT), COUNT)
            router.ask(request)
            router.run()
            assert request.output == greedy(request.prompt, COUNT)
        sent = link_bytes(namespaces[1])
        assert sent > (75 + 120) * TOKEN_BYTES // 2, "rank 1's half of the KV"
    finally:
        nodes.kill()
        decode.process.kill()
        decode.process.join()

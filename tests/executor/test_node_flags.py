"""What --nnodes, --node-rank and --dist-init-addr may say, and what each machine's part is."""

import os
import socket
from pathlib import Path

import pytest
import torch
from rank_workers import engine_options
from typer.testing import CliRunner

from kvasir_engine.entrypoints.cli import app
from kvasir_engine.errors import ModelError, UserError
from kvasir_engine.executor.node_listener import NodeListener
from kvasir_engine.executor.node_protocol import NodeSettings
from kvasir_engine.model import rendezvous
from kvasir_engine.model.loading.weight_loader import choose_device
from kvasir_engine.nodes import Nodes, nodes_of

FOR_SEVERAL = "--node-rank and --dist-init-addr are for a worker on several nodes: say --nnodes"
REFUSED = {
    "no multiple": ((2, 0, "leader:5557", 3), "--tensor-parallel 3 is no multiple of --nnodes 2"),
    "rank too high": ((2, 2, "leader:5557", 4), "--node-rank 2 is not one of the 2 nodes, 0 to 1"),
    "rank too low": ((2, -1, "leader:5557", 4), "--node-rank -1 is not one of the 2 nodes, 0 to 1"),
    "no address": ((2, 1, "", 4), "--nnodes 2 needs --dist-init-addr, HOST:PORT of node 0"),
    "no port": ((2, 1, "leader", 4), "--dist-init-addr 'leader' is not HOST:PORT"),
    "no host": ((2, 1, ":5557", 4), "--dist-init-addr ':5557' is not HOST:PORT"),
    "odd port": ((2, 1, "leader:70000", 4), "--dist-init-addr 'leader:70000' is not HOST:PORT"),
    "rank of one": ((1, 1, "", 4), FOR_SEVERAL),
    "address of one": ((1, 0, "leader:5557", 4), FOR_SEVERAL),
}


@pytest.mark.parametrize("what", REFUSED)
def test_flags_that_do_not_fit_are_refused_in_one_line(what: str) -> None:
    (count, rank, address, size), line = REFUSED[what]
    flags = ["--nnodes", str(count), "--node-rank", str(rank), "--dist-init-addr", address]
    arguments = ["worker", "--role", "both", "--model", "file:///nowhere", "--tensor-parallel", str(size), *flags]
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, UserError)
    assert str(result.exception) == line


def test_flags_that_fit() -> None:
    assert nodes_of(1, 0, "", 3) is None
    assert nodes_of(2, 1, "a.b.svc:5557", 4) == Nodes(2, 1, "a.b.svc", 5557)
    assert nodes_of(2, 0, "[fd00::1]:5557", 4) == Nodes(2, 0, "fd00::1", 5557)


def test_each_node_has_its_part_of_the_ranks_in_order() -> None:
    assert [list(Nodes(3, node, "leader", 1).ranks(6)) for node in range(3)] == [[0, 1], [2, 3], [4, 5]]


def test_each_node_counts_its_own_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [choose_device("cuda", rank, 4, 2).index for rank in range(4)] == [0, 1, 0, 1]
    with pytest.raises(ModelError, match="size 8 needs 4 GPUs on each of 2 nodes, and 2 are visible"):
        choose_device("cuda", 0, 8, 2)


def test_a_port_that_is_taken_is_said_before_the_model_is_fetched() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"cannot listen for other nodes on port {port}: "):
            NodeListener(Nodes(2, 0, "127.0.0.1", port), lambda: None)


def test_nodes_that_meet_on_loopback_listen_nowhere_else_and_others_everywhere() -> None:
    assert [Nodes(2, 0, host, 1).on_loopback for host in ("127.0.0.9", "::1", "10.0.0.1", "a.b")] == [
        True,
        True,
        False,
        False,
    ]


def test_the_first_field_that_differs_is_named(folder: Path) -> None:
    nodes = Nodes(2, 0, "127.0.0.1", 1)
    one, other = (
        NodeSettings.of(engine_options(folder, 2, 16, nodes, role=role), folder) for role in ("prefill", "decode")
    )
    assert one.mismatch(other) == "role is 'prefill' at the leader and 'decode' at the node"
    assert one.mismatch(one) is None


def test_the_interface_of_an_address() -> None:
    assert rendezvous.interface_to("tcp://127.0.0.1:5557") == "lo"
    assert rendezvous.interface_of("127.3.2.1") == "lo"
    assert rendezvous.interface_of("203.0.113.7") is None


def test_the_users_interface_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "bond0")
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)
    rendezvous.use_interface("tcp://127.0.0.1:5557", 2)
    assert (os.environ["GLOO_SOCKET_IFNAME"], os.environ["NCCL_SOCKET_IFNAME"]) == ("bond0", "=lo")

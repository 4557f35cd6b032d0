"""What a link costs is measured once, with pages that are there anyway, and says how many layers go together."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from peer import FINGERPRINT, LAYERS, Peer, Side

from kvasir_engine.connector import receiver, sender
from kvasir_engine.connector.fabric import Fabric, fabric_env
from kvasir_engine.connector.fabric_rate import ANY_FABRIC, CUDA_IPC, USUAL_NIC, FabricRate, fabric_rate, nic_rate
from kvasir_engine.connector.layout import Cut
from kvasir_engine.connector.link_probe import MOST_PAGES, ROUNDS, LinkProbes
from kvasir_engine.connector.nixl_agent import PeerDied, TransferHandle
from kvasir_engine.connector.notifications import Complete
from kvasir_engine.connector.push_size import LinkCost
from kvasir_engine.kv.spec import KVSpec
from kvasir_engine.protocol import Endpoint, Lease, Region
from kvasir_engine.status_reports import LinkReport

LLAMA = KVSpec.uniform(32, 8, 16, 256)  # 64 KiB a layer of a page
PAGES = tuple(range(100))


@dataclass
class ScriptedAgent:
    """An agent whose writes take what a cost says, by a clock of its own; a poll is some of that time."""

    cost: LinkCost
    spec: KVSpec = LLAMA
    whole: bool = True
    now: float = 0.0
    fails: bool = False
    dead: bool = False
    writes: list[tuple[int, range]] = field(default_factory=list)
    cancelled: list[TransferHandle] = field(default_factory=list)

    @property
    def endpoint(self) -> Endpoint:
        fingerprint = FINGERPRINT.__class__("m", "", "bfloat16", "pages", 16, len(self.spec.layers), 8, 128, "rope")
        return Endpoint("own", 1, b"", Region(0, 200, self.spec.page_bytes), fingerprint)

    def sent(self, agent: str) -> Cut:
        return Cut.whole_pages(self.spec)

    def sends_whole_pages(self, agent: str) -> bool:
        return self.whole

    def write(self, agent: str, local: tuple[int, ...], remote: tuple[int, ...], layers: range) -> TransferHandle:
        if self.dead:
            raise PeerDied(agent)
        assert len(local) == len(remote)
        self.writes.append((len(local), layers))
        pieces = 1 if layers.step == 1 else len(layers)
        size = len(local) * len(layers) * (self.spec.page_bytes // len(self.spec.layers))
        self._ends = self.now + self.cost.seconds(len(local) * pieces, size)
        return TransferHandle(None, "PROC")

    def poll(self, agent: str, transfer: TransferHandle) -> bool | None:
        if self.dead:
            raise PeerDied(agent)
        if self.now < self._ends:
            self.now = self._ends  # by the next turn it has ended
            return None
        return not self.fails

    def cancel(self, transfer: TransferHandle) -> None:
        self.cancelled.append(transfer)


def probes(agent: ScriptedAgent, fabric: FabricRate = ANY_FABRIC) -> tuple[LinkProbes, list[tuple[str, int]]]:
    learned: list[tuple[str, int]] = []
    made: Any = LinkProbes(agent, fabric, lambda *what: learned.append(what), lambda: agent.now)  # type: ignore[arg-type]
    return made, learned


def measured(
    agent: ScriptedAgent, fabric: FabricRate = ANY_FABRIC
) -> tuple[LinkReport | None, list[tuple[str, int]]]:
    found, learned = probes(agent, fabric)
    assert found.wants("peer")
    found.begin("peer", PAGES, PAGES)
    assert not found.wants("peer")
    for _ in range(100):
        if not found.busy("peer"):
            break
    else:
        raise AssertionError("it does not end")
    assert len(found) == 0
    return found.links.get("peer"), learned


@pytest.mark.parametrize(
    ("cost", "layers"),
    [
        (LinkCost(7.8e-6, 260e9), 32),
        (LinkCost(0.2e-6, 46e9), 1),
        (LinkCost(1e-6, 100e9), 8),
        (LinkCost(0.0, 1e9), 1),
    ],
)
def test_what_a_link_costs_is_found_and_chooses_how_many_layers_go_together(cost: LinkCost, layers: int) -> None:
    agent = ScriptedAgent(cost)
    link, learned = measured(agent)
    assert link is not None
    assert link.bytes_per_second == pytest.approx(cost.bytes_per_second, rel=1e-3)
    assert link.descriptor_seconds == pytest.approx(cost.descriptor_seconds, abs=1e-9)
    assert (link.transport, link.problem) == ("auto", "")
    assert learned == [("peer", layers)]
    assert link.layers_a_push == layers
    assert len(agent.writes) == 1 + 2 * ROUNDS
    assert max(count for count, _ in agent.writes) <= MOST_PAGES


def test_a_slow_link_is_not_kept_busy_with_being_measured() -> None:
    agent = ScriptedAgent(LinkCost(0.0, 50e6))  # 42 ms a page
    link, learned = measured(agent)
    assert link is not None
    assert link.bytes_per_second == pytest.approx(50e6, rel=1e-3)
    assert agent.writes == [(1, range(32))]
    assert learned == [("peer", 1)]


def test_pages_that_are_divided_otherwise_there_go_by_layer_and_their_rate_is_known() -> None:
    agent = ScriptedAgent(LinkCost(7.8e-6, 260e9), whole=False)
    link, learned = measured(agent)
    assert link is not None
    assert all(layers == range(32) for _, layers in agent.writes)
    assert learned == [("peer", 1)]


def test_of_a_model_of_one_layer_there_is_nothing_to_choose() -> None:
    link, learned = measured(ScriptedAgent(LinkCost(1e-6, 1e9), KVSpec.uniform(1, 8, 16, 256)))
    assert link is not None
    assert learned == [("peer", 1)]


def test_a_write_that_fails_tells_nothing() -> None:
    assert measured(ScriptedAgent(LinkCost(1e-6, 1e9), fails=True)) == (None, [])


def test_a_peer_that_dies_meanwhile_is_reported_and_its_write_cancelled() -> None:
    agent = ScriptedAgent(LinkCost(1e-6, 1e9))
    found, learned = probes(agent)
    found.begin("peer", PAGES, PAGES)
    assert found.busy("peer")
    agent.dead = True
    with pytest.raises(PeerDied):
        found.busy("peer")
    found.died("peer")
    assert len(agent.cancelled) == 1
    assert (len(found), found.links, learned) == (0, {}, [])
    assert found.wants("peer")


def test_a_peer_that_came_back_is_another_and_measured_anew() -> None:
    agent = ScriptedAgent(LinkCost(1e-6, 1e9))
    found, _ = probes(agent)
    found.begin("peer", PAGES, PAGES)
    while found.busy("peer"):
        pass
    found.died("peer")
    assert not found.links
    assert found.wants("peer")


def test_a_tenth_of_what_the_fabric_should_give_is_a_problem_with_what_to_look_at() -> None:
    link, _ = measured(ScriptedAgent(LinkCost(1e-6, 0.45e9)), fabric_rate("rdma", True, {}, 50e9))
    assert link is not None
    assert link.transport == "rdma"
    assert link.problem.startswith("0.45 GB/s by rdma, which should give 50: UCX went another way")
    assert "UCX_TLS" in link.problem
    assert fabric_rate("rdma", True, {}, 50e9).problem(5.1e9) == ""


@pytest.mark.parametrize(
    ("fabric", "cuda", "tls", "nic", "name", "expected"),
    [
        ("rdma", True, "rc,ud,dc,self,cuda_copy,cuda_ipc", 50e9, "rdma", 50e9),
        ("rdma", False, "rc,ud,dc,self", None, "rdma", USUAL_NIC),
        ("rdma", False, "rc,ud,dc,self", 0.0, "rdma", USUAL_NIC),
        ("shm", True, "sm,tcp,self,cuda_copy,cuda_ipc", None, "shm", CUDA_IPC),
        ("shm", False, "sm,tcp,self", None, "shm", 0.0),
        ("tcp", True, "tcp,self", 50e9, "tcp", 0.0),
        ("auto", True, "", 50e9, "auto", 50e9),
        ("auto", True, "", None, "auto", 0.0),
        ("auto", False, "tcp", 50e9, "tcp", 0.0),
    ],
)
def test_what_a_fabric_should_give(
    fabric: Fabric, cuda: bool, tls: str, nic: float | None, name: str, expected: float
) -> None:
    rate = fabric_rate(fabric, cuda, {"UCX_TLS": tls}, nic)
    assert (rate.name, rate.expected) == (name, expected)
    assert bool(rate.problem(1.0)) == (expected > 0)
    assert bool(rate.look) == (expected > 0)


def test_the_rate_of_a_machines_rdma_devices_is_the_kernels_word(tmp_path: Path) -> None:
    assert nic_rate(tmp_path / "none") is None
    for name, said in (("mlx5_0", "100 Gb/sec (4X EDR)\n"), ("mlx5_1", "400 Gb/sec (4X NDR)\n"), ("odd", "fast\n")):
        (tmp_path / name / "ports/1").mkdir(parents=True)
        (tmp_path / name / "ports/1/rate").write_text(said)
    assert nic_rate(tmp_path) == 50e9


# -- the machine that waits for layers


KEY = ("peer", 1)


def posted(effects: Any) -> list[range]:
    return [each.layers for each in effects if isinstance(each, sender.Post)]


def opened(layers: int, together: int) -> sender.Sender:
    machine = sender.Sender(layers)
    machine.together("peer", together)
    list(machine.open(KEY, 1, 9.0))
    return machine


@pytest.mark.parametrize("layers", range(1, 9))
@pytest.mark.parametrize("together", range(1, 10))
def test_layers_go_together_as_soon_as_all_of_them_are_computed(layers: int, together: int) -> None:
    machine, went = opened(layers, together), []
    for layer in range(layers):
        for post in posted(machine.push(KEY, sender.Push((1, 2), (3, 4), layer), 0.0)):
            assert post.stop == layer + 1, "it waited longer than for its last layer"
            went.append(post)
    assert [layer for post in went for layer in post] == list(range(layers))
    assert all(len(post) == together for post in went[:-1])


def test_whole_pages_wait_for_nothing_and_other_agents_go_by_layer() -> None:
    machine = opened(4, 4)
    assert posted(machine.push(KEY, sender.Push((1,), (1,)), 0.0)) == [range(4)]
    list(machine.open(("other", 1), 1, 9.0))
    assert posted(machine.push(("other", 1), sender.Push((1,), (1,), 0), 0.0)) == [range(1)]


def test_layers_that_do_not_follow_one_another_wait_for_nobody() -> None:
    machine = opened(4, 4)
    assert posted(machine.push(KEY, sender.Push((1,), (1,), 0), 0.0)) == []
    assert posted(machine.push(KEY, sender.Push((1,), (1,), 2), 0.0)) == [range(1)]  # the peer is to say so


def test_a_lease_that_ends_does_not_wait_for_layers() -> None:
    machine = opened(4, 4)
    list(machine.push(KEY, sender.Push((1,), (1,), 0), 0.0))
    effects = list(machine.withdraw(KEY, "aborted", 0.0))
    assert [type(each).__name__ for each in effects] == ["Failed", "NotifyHolder"]


# -- real NIXL


@pytest.mark.dataplane
@pytest.mark.parametrize("fabric", ["shm", "tcp"])
def test_a_link_is_measured_under_the_first_lease_and_nothing_else_is_touched(
    fabric: Fabric, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in fabric_env(fabric, cuda=False).items():
        monkeypatch.setenv(name, value)
    side, peer = Side(0x77), Peer(0x11)
    try:
        found = []
        for number, pages in ((1, [40, 7, 9]), (2, [41, 8])):
            lease = Lease(number, 0x77, pages, 0, 60.0, "kvasir-11", 0x11)
            side.grant(lease, peer.endpoint)
            peer.open(side.endpoint, lease)
            for layer in range(LAYERS):
                peer.push([3, 4, 5][: len(pages)], pages, layer, final=layer == LAYERS - 1)
            peer.complete(Complete(number, 0x77, 16 * len(pages), len(pages), 9))
            side.wait(receiver.Settled)
            assert (side.pool[pages] == [[3], [4], [5]][: len(pages)]).all()
            side.pool[pages] = 0
            assert not side.pool.any()
            found.append(peer.links())
            assert [type(peer.event()) for _ in range(2)] == [sender.Done] * 2
        (link,) = found[0].values()
        assert link.peer == side.endpoint.agent
        assert link.transport == os.environ["UCX_TLS"]
        assert link.bytes_per_second > 0
        assert 1 <= link.layers_a_push <= LAYERS
        assert found[1] == found[0], "once is enough"
    finally:
        peer.close()
        side.handoff.stop()

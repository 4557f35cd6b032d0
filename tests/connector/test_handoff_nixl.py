"""Handoffs between two processes over real NIXL: bytes, order, abort, death."""

import os
import queue
import signal
import subprocess
import sys
from collections.abc import Iterator

import msgspec
import pytest
from peer import FINGERPRINT, LAYERS, PAGE_BYTES, SPOILED, Peer, Side

from kvasir_engine.connector import receiver, sender
from kvasir_engine.connector.fabric import Fabric, fabric_env
from kvasir_engine.connector.notifications import Complete
from kvasir_engine.protocol import HEADS_APART, LayerRun, Lease

pytestmark = pytest.mark.dataplane

HOLDER_EPOCH = 0x77


@pytest.fixture
def side() -> Iterator[Side]:
    side = Side(HOLDER_EPOCH)
    yield side
    side.handoff.stop()


@pytest.fixture
def peer() -> Iterator[Peer]:
    peer = Peer(0x11)
    yield peer
    peer.close()


def lease_of(id_: int, pages: list[int], seconds: float = 60.0) -> Lease:
    return Lease(id_, HOLDER_EPOCH, pages, 0, seconds, "kvasir-11", 0x11)


def complete(lease: Lease) -> Complete:
    return Complete(lease.id, lease.epoch, 16 * len(lease.pages), len(lease.pages), 9)


def test_pages_arrive_before_the_completion_and_nothing_else_is_touched(side: Side, peer: Peer) -> None:
    lease = lease_of(1, [40, 7, 9])
    side.grant(lease, peer.endpoint)
    peer.open(side.endpoint, lease)
    peer.push([3, 4], [40, 7])
    for layer in range(LAYERS):
        peer.push([5], [9], layer)
    peer.complete(complete(lease))
    settled = side.wait(receiver.Settled)
    assert settled.complete == complete(lease)
    assert (side.pool[[40, 7, 9]] == [[3], [4], [5]]).all()
    side.pool[[40, 7, 9]] = 0
    assert not side.pool.any()
    assert [type(peer.event()) for _ in range(3)] == [sender.Done] * 3


def test_layers_that_differ_arrive_each_with_its_own_bytes() -> None:
    """A latent, and K and V of two sizes, one of them of two heads."""
    kinds = [LayerRun(1, 2, 1, 16), LayerRun(1, 1, 1, 128), LayerRun(1, 2, 2, 16), LayerRun(1, 2, 1, 16)]
    holder = msgspec.structs.replace(FINGERPRINT, layout=HEADS_APART, kv=kinds)
    alike = msgspec.structs.replace(holder, kv=msgspec.UNSET)
    assert str(holder.mismatch(alike)).startswith("kv: ")
    side, peer = Side(HOLDER_EPOCH, holder), Peer(0x11, holder)
    try:
        lease = lease_of(1, [40, 7])
        side.grant(lease, peer.endpoint)
        peer.open(side.endpoint, lease)
        peer.push([3], [40])
        for layer in range(LAYERS):
            peer.push([4], [7], layer)
        peer.complete(complete(lease))
        settled = side.wait(receiver.Settled)
        assert settled.complete == complete(lease)
        assert (side.pool[[40, 7]] == [[3], [4]]).all()
        side.pool[[40, 7]] = 0
        assert not side.pool.any()
        assert side.handoff.stats.received_bytes == 2 * PAGE_BYTES
    finally:
        peer.close()
        side.handoff.stop()


def test_a_layer_that_did_not_come_is_missed(side: Side, peer: Peer) -> None:
    lease = lease_of(8, [2, 5])
    side.grant(lease, peer.endpoint)
    peer.open(side.endpoint, lease)
    peer.push([3], [2])
    for layer in range(1, LAYERS):
        peer.push([4], [5], layer)
    peer.complete(complete(lease))
    while isinstance(rejected := side.events.get(timeout=60), receiver.Rejected):
        assert "layers 1 to" in rejected.why or "0 were written" in rejected.why
    assert isinstance(rejected, receiver.Reclaimed)
    assert "wrote 1 pages of 2" in rejected.reason


@pytest.mark.parametrize("layerwise", [True, False])
def test_a_page_that_is_not_what_was_sent_is_found_by_its_digest(side: Side, layerwise: bool) -> None:
    peer = Peer(0x13, spoils=True)
    try:
        lease = lease_of(8, [2, 5])
        side.grant(lease, peer.endpoint)
        peer.open(side.endpoint, lease)
        peer.push([SPOILED - 1], [2])
        for layer in range(LAYERS) if layerwise else [None]:
            peer.push([SPOILED], [5], layer)
        peer.complete(complete(lease))
        reclaimed = side.wait(receiver.Reclaimed)
        assert reclaimed.code == "kv_digest_mismatch"
        assert reclaimed.reason.startswith("1 of ")
        assert side.handoff.stats.digest_failures == 1
    finally:
        peer.close()


def test_an_aborted_lease_comes_back_when_the_writer_says_it_stopped(side: Side, peer: Peer) -> None:
    lease = lease_of(2, [1, 2, 3])
    side.grant(lease, peer.endpoint)
    peer.open(side.endpoint, lease)
    peer.push([3], [1])
    assert isinstance(peer.event(), sender.Done)
    side.revoke(lease.id)
    assert side.wait(receiver.Fenced).code == "lease_aborted"
    assert side.wait(receiver.Reclaimed).proof == "acknowledged"
    assert isinstance(peer.event(), sender.Failed)
    side.pool[:] = 0
    peer.push([4, 5], [2, 3])  # too late: it must not be written
    peer.complete(complete(lease))
    after = lease_of(3, [8])
    side.grant(after, peer.endpoint)
    peer.open(side.endpoint, after)
    peer.push([6], [8])
    peer.complete(complete(after))
    assert side.wait(receiver.Settled).lease == 3
    assert not side.pool[[1, 2, 3]].any()


def test_a_lease_aborted_before_its_prompt_reached_the_writer_comes_back_at_first_contact(
    side: Side, peer: Peer
) -> None:
    lease = lease_of(4, [1, 2])
    side.grant(lease, peer.endpoint)
    side.revoke(lease.id)
    assert side.wait(receiver.Fenced).code == "lease_aborted"
    assert side.wait(receiver.Reclaimed).proof == "acknowledged"
    peer.open(side.endpoint, lease)  # the prompt comes after all
    assert isinstance(peer.event(), sender.Failed)
    after = lease_of(5, [8])
    side.grant(after, peer.endpoint)
    peer.open(side.endpoint, after)
    peer.push([6], [8])
    peer.complete(complete(after))
    assert side.wait(receiver.Settled).lease == 5


def test_the_death_of_a_writer_is_noticed_without_asking_and_is_proof(side: Side, peer: Peer) -> None:
    lease = lease_of(7, [1, 2])
    side.grant(lease, peer.endpoint)
    peer.open(side.endpoint, lease)
    peer.push([3], [1])
    assert isinstance(peer.event(), sender.Done)
    peer.kill()
    reclaimed = side.wait(receiver.Reclaimed)  # nobody asked: the holder's own pings found out
    assert (reclaimed.proof, reclaimed.lease) == ("writer_died", 7)


def test_a_stopped_writer_is_fenced_and_never_trusted(
    side: Side, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = lease_of(5, [1, 2])
    side.grant(lease, peer.endpoint)
    peer.open(side.endpoint, lease)
    peer.push([3], [1])
    assert isinstance(peer.event(), sender.Done)
    assert peer.process.pid is not None
    os.kill(peer.process.pid, signal.SIGSTOP)
    monkeypatch.setattr(receiver, "SILENCE", 0.5)
    try:
        assert side.wait(receiver.Fenced).code == "lease_writer_silent"
        with pytest.raises(queue.Empty):  # nothing comes back while it may still write
            side.events.get(timeout=1.0)
    finally:
        os.kill(peer.process.pid, signal.SIGCONT)
    assert side.wait(receiver.Reclaimed).proof == "acknowledged"


@pytest.mark.parametrize("fabric", ["shm", "tcp"])
def test_an_agent_starts_where_a_fabric_is_named(fabric: Fabric) -> None:
    script = "from peer import Side; side = Side(1); side.handoff.stop()"
    environment = os.environ | fabric_env(fabric, cuda=False) | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True, timeout=300)


def test_a_writer_whose_kv_differs_is_refused_by_the_field(side: Side) -> None:
    other = Peer(0x12, msgspec.structs.replace(FINGERPRINT, dtype="bfloat16"))
    try:
        side.grant(lease_of(6, [1]), other.endpoint)
        assert "dtype: 'float32', 'bfloat16'" in side.wait(receiver.Reclaimed).reason
        other.open(side.endpoint, lease_of(6, [1]))
        failed = other.event()
        assert isinstance(failed, sender.Failed)
        assert "dtype" in failed.reason
    finally:
        other.close()


TWO_HEADS = msgspec.structs.replace(FINGERPRINT, layout=HEADS_APART, kv_heads=2)


@pytest.mark.parametrize(
    ("theirs", "reasons"),
    [
        ({"page_size": 24}, ["page_size: 16, 24 (neither is a multiple of the other)"]),
        ({"head_dim": 17}, ["head_dim: 16, 17"]),
        ({"tensor_parallel": 2}, ["page_bytes: 4096, 4096", "names 1 ranks, rank 1 is needed"]),
    ],
)
def test_what_cannot_be_written_is_refused_with_the_reason(
    peer: Peer, theirs: dict[str, int], reasons: list[str]
) -> None:
    side = Side(HOLDER_EPOCH, TWO_HEADS)
    try:
        claimed = msgspec.structs.replace(TWO_HEADS, **theirs)
        side.grant(lease_of(6, [1]), msgspec.structs.replace(peer.endpoint, fingerprint=claimed))
        for reason in reasons:
            reclaimed = side.wait(receiver.Reclaimed)
            assert reclaimed.proof == "never_connected"
            assert reason in reclaimed.reason
    finally:
        side.handoff.stop()

"""Digests from when pages were written, over real NIXL: what changed since is found by whoever gets it."""

from collections.abc import Iterator

import pytest
from peer import LAYERS, Peer, Side

from kvasir_engine.connector import receiver, sender
from kvasir_engine.connector.commands import Lend, Read
from kvasir_engine.connector.notifications import Complete, Stopped
from kvasir_engine.connector.sender import Push
from kvasir_engine.protocol import Lease, Loan

pytestmark = pytest.mark.dataplane

EPOCH, PEER = 0x7A, 0x31
ALL = range(LAYERS)


@pytest.fixture
def side() -> Iterator[Side]:
    side = Side(EPOCH)
    yield side
    side.handoff.stop()


@pytest.fixture
def peer() -> Iterator[Peer]:
    peer = Peer(PEER)
    yield peer
    peer.close()


def hand_off(
    side: Side, peer: Peer, id_: int, local: list[int], remote: list[int], layerwise: bool = False
) -> None:
    lease = Lease(id_, EPOCH, remote, 0, 60.0, peer.endpoint.agent, PEER)
    side.grant(lease, peer.endpoint)
    peer.open(side.endpoint, lease)
    for layer in ALL if layerwise else [None]:
        peer.push(local, remote, layer)
    peer.complete(Complete(id_, EPOCH, 16 * len(remote), len(remote), 9))


@pytest.mark.parametrize("layerwise", [True, False])
def test_a_page_that_changed_after_it_was_written_is_found_by_its_receiver(
    side: Side, peer: Peer, layerwise: bool
) -> None:
    peer.know_and_spoil([4])
    hand_off(side, peer, 1, [3, 5], [2, 7], layerwise)
    side.wait(receiver.Settled)
    hand_off(side, peer, 2, [3, 4], [8, 9], layerwise)
    assert side.wait(receiver.Reclaimed).code == "kv_digest_mismatch"
    assert side.handoff.stats.digest_failures == 1


def test_what_came_and_was_right_is_known_and_lent_as_it_came(side: Side, peer: Peer) -> None:
    hand_off(side, peer, 1, [3, 4], [8, 9])
    side.wait(receiver.Settled)
    assert [type(peer.event()) for _ in range(2)] == [sender.Done] * 2
    assert (side.kept.table[[8, 9]] != 0).all()
    side.pool[9, 7] ^= 1
    for id_, page, ends in ((2, 8, sender.Done), (3, 9, sender.Failed)):
        loan = Loan(id_, EPOCH, [page], 0, 60.0)
        side.handoff.command(Lend(loan, peer.endpoint))
        peer.read(side.endpoint, loan)
        peer.push([20], [page])
        peer.complete(Stopped(id_, EPOCH, "read"))
        assert isinstance(peer.event(), ends)
        if ends is sender.Done:
            assert isinstance(peer.event(), sender.Done)
        side.wait(receiver.Reclaimed)


def test_what_came_wrong_and_what_never_came_is_not_known(side: Side, peer: Peer) -> None:
    side.know()
    peer.know_and_spoil([4])
    hand_off(side, peer, 1, [3, 4], [8, 9])
    side.wait(receiver.Reclaimed)
    assert (side.kept.table[8] != 0).all()
    assert not side.kept.table[9].any()
    side.grant(Lease(2, EPOCH, [10], 0, 60.0, peer.endpoint.agent, PEER), peer.endpoint)
    side.revoke(2)
    side.wait(receiver.Fenced)
    side.wait(receiver.Reclaimed)
    assert not side.kept.table[10].any()
    assert (side.kept.table[11] != 0).all()


def test_what_was_read_and_was_right_is_known_and_what_was_wrong_is_not(side: Side, peer: Peer) -> None:
    side.know()
    known = side.kept.table.copy()
    peer.know_and_spoil([4])
    for id_, page, ends in ((1, 3, sender.Done), (2, 4, sender.Failed)):
        loan = Loan(id_, PEER, [page], 0, 60.0)
        peer.lend(loan, side.endpoint)
        side.handoff.command(Read(peer.endpoint, loan))
        side.handoff.push((peer.endpoint.agent, id_), Push((20 + page,), (page,)))
        side.handoff.push((peer.endpoint.agent, id_), Push(complete=Stopped(id_, PEER, "read")))
        side.wait(ends)
        if ends is sender.Done:
            side.wait(sender.Done)
    assert (side.kept.table[23] != known[23]).all()
    assert (side.kept.table[23] == side.digest.measured([23], ALL).measured[23]).all()
    assert not side.kept.table[24].any()

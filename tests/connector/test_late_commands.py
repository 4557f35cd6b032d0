"""Rank 0's commands reach a rank on another node later than pushes do, and than what its peers say."""

import time
from collections.abc import Iterator

import msgspec
import numpy as np
import pytest
from peer import FINGERPRINT, LAYERS, Side

from kvasir_engine.connector import receiver, sender
from kvasir_engine.connector.commands import AnyCommand, Grant, Open
from kvasir_engine.connector.nixl_agent import NixlAgent
from kvasir_engine.connector.notifications import Complete, Stopped, Written, encode
from kvasir_engine.connector.sender import Push
from kvasir_engine.protocol import HEADS_APART, Address, Endpoint, Lease, Region

pytestmark = pytest.mark.dataplane

TWO = msgspec.structs.replace(FINGERPRINT, layout=HEADS_APART, kv_heads=2, tensor_parallel=2)


class RankOne:
    """Rank 1 of a worker: `late` commands are on their way, those in `arrived` are there."""

    def __init__(self, epoch: int) -> None:
        self.arrived: list[AnyCommand] = []
        self.looks = 0
        self.side = Side(epoch, TWO, rank=1, intake=self._intake)
        own = self.side.endpoint
        address = Address(own.agent, own.metadata, own.region)
        self.endpoint: Endpoint = msgspec.structs.replace(own, agent=f"kvasir-{epoch:016x}", others=(address,))

    def _intake(self) -> list[AnyCommand]:
        self.looks += 1
        arrived = []
        while self.arrived:
            arrived.append(self.arrived.pop(0))
        return arrived

    def looked(self, times: int = 3) -> None:
        """Wait until its thread has gone round some more times."""
        before = self.looks
        while self.looks < before + times:
            time.sleep(0.001)


@pytest.fixture
def prefill() -> Iterator[RankOne]:
    rank = RankOne(0x11)
    yield rank
    rank.side.handoff.stop()


@pytest.fixture
def decode() -> Iterator[RankOne]:
    rank = RankOne(0x77)
    yield rank
    rank.side.handoff.stop()


def lease_of(id_: int, page: int) -> Lease:
    return Lease(id_, 0x77, [page], 0, 60.0, f"kvasir-{0x11:016x}", 0x11)


def push_all(prefill: RankOne, decode: RankOne, lease: Lease, after: int) -> None:
    key, handoff = (decode.endpoint.agent, lease.id), prefill.side.handoff
    handoff.hold_until(after)
    handoff.push(key, Push((3,), (7,), final=True))
    handoff.push(key, Push(complete=Complete(lease.id, lease.epoch, 16, 1, 9)))


def test_a_push_waits_for_the_command_that_opens_its_lease(prefill: RankOne, decode: RankOne) -> None:
    lease = lease_of(2, 7)
    prefill.side.pool[3] = 3
    decode.arrived.append(Grant(lease, prefill.endpoint, 0))
    push_all(prefill, decode, lease, after=1)
    prefill.looked()
    prefill.arrived.append(Open(decode.endpoint, lease))
    assert decode.side.wait(receiver.Settled).complete.token == 9
    assert (decode.side.pool[7] == 3).all()
    assert [prefill.side.wait(sender.Done).push.final for _ in range(2)] == [True, False]


def test_nothing_is_written_before_a_grant_that_comes_late(prefill: RankOne, decode: RankOne) -> None:
    lease = lease_of(2, 7)
    prefill.side.pool[3] = 3
    prefill.arrived.append(Open(decode.endpoint, lease))
    push_all(prefill, decode, lease, after=1)
    prefill.looked()
    decode.looked()
    assert prefill.side.events.empty()
    assert not decode.side.pool.any()
    decode.arrived.append(Grant(lease, prefill.endpoint, 0))
    assert decode.side.wait(receiver.Settled).complete.token == 9
    assert (decode.side.pool[7] == 3).all()


def test_what_a_writer_that_asks_nobody_says_before_the_grant_is_kept(decode: RankOne) -> None:
    lease = lease_of(2, 7)
    memory = np.zeros(64 * 4096, np.uint8)
    region = Region(memory.ctypes.data, 64, 4096)
    writer = NixlAgent(0x11, region, TWO, rank=1)
    try:
        writer.meet(decode.endpoint.address(1))
        for said in (Written(2, 0x77, 0, (0, LAYERS), [1]), Stopped(2, 0x77, "had enough")):
            writer.notify(decode.endpoint.agent_of(1), encode(said))
        for _ in range(50):
            writer.notifications()  # which makes its transport progress
            decode.looked(1)
        others = (writer.endpoint.address(0),)
        to = msgspec.structs.replace(writer.endpoint, agent="kvasir-0000000000000011", others=others)
        decode.arrived.append(Grant(lease, to, 0))
        assert decode.side.wait(receiver.Reclaimed).reason == "had enough"
    finally:
        writer.close()


def test_the_word_of_a_lease_that_has_ended_is_rejected(prefill: RankOne, decode: RankOne) -> None:
    late = lease_of(1, 7)
    decode.arrived.append(Grant(lease_of(2, 8), prefill.endpoint, 0))
    decode.looked()
    prefill.arrived.append(Open(decode.endpoint, late))
    push_all(prefill, decode, late, after=1)
    assert decode.side.wait(receiver.Rejected).why == "no such lease"
    assert "released" in prefill.side.wait(sender.Failed).reason
    assert not decode.side.pool.any()

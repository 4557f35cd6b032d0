"""Pages read from another process over real NIXL: bytes, digests, and what ends a loan."""

import os
import signal
from collections.abc import Iterator

import pytest
from peer import SPOILED, Peer, Side

from kvasir_engine.connector import receiver, sender
from kvasir_engine.connector.commands import Lend, Read
from kvasir_engine.connector.notifications import Stopped
from kvasir_engine.connector.sender import Push
from kvasir_engine.protocol import Loan

pytestmark = pytest.mark.dataplane

EPOCH = 0x79


def loan_of(id_: int, pages: list[int], seconds: float = 60.0) -> Loan:
    return Loan(id_, EPOCH, pages, 0, seconds)


@pytest.fixture
def reader() -> Iterator[Peer]:
    reader = Peer(0x21)
    yield reader
    reader.close()


def lender(spoils: bool = False) -> Side:
    side = Side(EPOCH, spoils=spoils)
    for page in range(20, 24):
        side.pool[page] = side.meant[page] = 100 + page
    return side


@pytest.fixture
def side() -> Iterator[Side]:
    side = lender()
    yield side
    side.handoff.stop()


def read(reader: Peer, side: Side, loan: Loan, local: list[int]) -> None:
    reader.read(side.endpoint, loan)
    reader.push(local, loan.pages)
    reader.complete(Stopped(loan.id, loan.epoch, "read"))


def test_pages_are_read_and_the_loan_ends(side: Side, reader: Peer) -> None:
    loan = loan_of(1, [22, 20, 23])
    side.handoff.command(Lend(loan, reader.endpoint))
    read(reader, side, loan, [5, 9, 6])
    assert [type(reader.event()) for _ in range(2)] == [sender.Done] * 2
    assert reader.look([5, 9, 6, 7]) == [{122}, {120}, {123}, {7}]
    assert side.wait(receiver.Reclaimed).proof == "acknowledged"


def test_pages_that_are_not_what_was_lent_are_found_and_the_loan_ends(reader: Peer) -> None:
    side = lender(spoils=True)
    try:
        side.pool[SPOILED] = 3
        loan = loan_of(2, [20, SPOILED])
        side.handoff.command(Lend(loan, reader.endpoint))
        read(reader, side, loan, [5, 6])
        failed = reader.event()
        assert isinstance(failed, sender.Failed)
        assert "read failed" in failed.reason
        assert side.wait(receiver.Reclaimed).proof == "acknowledged"
    finally:
        side.handoff.stop()


def test_a_loan_that_is_taken_back_is_not_read_any_more(side: Side, reader: Peer) -> None:
    loan = loan_of(3, [20])
    side.handoff.command(Lend(loan, reader.endpoint))
    side.revoke(loan.id)
    assert side.wait(receiver.Fenced).code == "lease_aborted"
    assert side.wait(receiver.Reclaimed).proof == "acknowledged"
    read(reader, side, loan, [5])
    assert isinstance(reader.event(), sender.Failed)
    assert reader.look([5]) == [{5}]


def test_the_death_of_a_reader_ends_its_loan(side: Side, reader: Peer) -> None:
    loan = loan_of(4, [20])
    side.handoff.command(Lend(loan, reader.endpoint))
    reader.read(side.endpoint, loan)
    reader.push([5], loan.pages)
    assert isinstance(reader.event(), sender.Done)
    reader.kill()
    assert side.wait(receiver.Reclaimed).proof == "writer_died"


def test_the_death_of_a_lender_that_has_said_nothing_yet_ends_the_read_long_before_the_loan(side: Side) -> None:
    lender, loans = Peer(0x22), [Loan(id_, 0x22, [3], 0, 3600.0) for id_ in (5, 6)]
    lender.lend(loans[0], side.endpoint)
    for loan, page in zip(loans, (21, 20), strict=True):
        side.handoff.command(Read(lender.endpoint, loan))
        side.handoff.push((lender.endpoint.agent, loan.id), Push((page,), (3,)))
        if loan is loans[0]:
            side.wait(sender.Done)
            assert lender.process.pid is not None
            os.kill(lender.process.pid, signal.SIGSTOP)  # so it says nothing of the other
    assert (side.pool[21] == 3).all()
    lender.kill()
    failed = [side.wait(sender.Failed) for _ in loans]
    assert {each.reason for each in failed} == {"the decode worker died"}
    assert (side.pool[20] == 120).all()


def test_a_loan_that_its_lender_does_not_know_ends_the_read_at_once(side: Side) -> None:
    lender, loan = Peer(0x22), Loan(6, 0x22, [3], 0, 3600.0, nonce=5)
    lender.lend(Loan(5, 0x22, [3], 0, 3600.0, nonce=4), side.endpoint)  # so it knows whom to answer
    try:
        side.handoff.command(Read(lender.endpoint, loan))
        assert "released" in side.wait(sender.Failed).reason
    finally:
        lender.close()

"""Nothing is read before its digests are here, and only what was lent is right."""

from kvasir_engine.connector.loan_reads import LOANS, LoanReads
from kvasir_engine.connector.open_leases import OpenLeases
from kvasir_engine.connector.sender import Push

PART = ("d", 3)
PUSH = Push((1, 2), (7, 8))


def test_what_is_pushed_before_the_digests_waits_for_them_in_order() -> None:
    reads, later = LoanReads(), Push((4,), (9,))
    reads.open(PART)
    assert reads.waits(PART, PUSH)
    assert reads.waits(PART, later)
    assert reads.lent(PART, {7: 70, 8: 80}) == [PUSH, later]
    assert not reads.waits(PART, later)
    assert reads.lent(PART, {7: 70, 8: 80}) == [], "the same again brings nothing twice"


def test_digests_that_come_before_the_prompt_are_kept_for_it() -> None:
    reads = LoanReads()
    assert reads.lent(PART, {7: 70, 8: 80}) == []
    assert PART not in reads
    reads.open(PART)
    assert not reads.waits(PART, PUSH)
    assert reads.wrong(PART, PUSH, [70, 80]) == 0


def test_only_so_many_loans_that_nobody_reads_are_kept() -> None:
    reads = LoanReads()
    for loan in range(LOANS + 1):
        reads.lent(("d", loan), {})
    for loan, waits in [(0, True), (1, False), (LOANS, False)]:
        reads.open(("d", loan))
        assert reads.waits(("d", loan), PUSH) == waits


def test_a_block_with_another_digest_or_that_was_not_lent_is_wrong() -> None:
    reads = LoanReads()
    reads.open(PART)
    reads.lent(PART, {7: 70})
    assert reads.wrong(PART, PUSH, [70, 80]) == 1
    assert reads.wrong(PART, PUSH, [71, 80]) == 2


def test_a_write_waits_for_nothing_and_a_part_that_ended_is_forgotten() -> None:
    reads = LoanReads()
    assert not reads.waits(PART, PUSH)
    reads.open(PART)
    reads.close(PART)
    assert PART not in reads
    assert not reads.waits(PART, PUSH)


def test_a_lease_is_known_until_its_last_part_has_ended() -> None:
    opened, parts = OpenLeases(), [("d", 3), ("d-1", 3)]
    opened.open(PART, list(parts))
    opened.computed(PART, 5.0)
    assert opened.computed_at(("d-1", 3)) == 5.0
    assert opened.parts(PART) == parts
    opened.close(parts[0])
    opened.close(parts[0])
    assert opened.parts(PART) == parts[1:]
    opened.close(parts[1])
    assert opened.parts(PART) == []
    opened.computed(PART, 6.0)
    assert opened.parts(PART) == []


def test_what_strangers_say_takes_no_place_of_what_a_workers_partner_said() -> None:
    reads = LoanReads()
    reads.lent(PART, {7: 70, 8: 80})
    reads.lent(("new", 3), {7: 70}, known=False)
    for loan in range(LOANS):
        reads.lent(("forged", loan), {1: 1}, known=False)
    for part, waits in ((PART, False), (("new", 3), True)):
        reads.open(part)
        assert reads.waits(part, PUSH) == waits

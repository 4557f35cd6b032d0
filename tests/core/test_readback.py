"""Prefill reads a conversation's pages back from decode: what is computed falls, and no page or token is wrong."""

import msgspec
import pytest
from simulation import Network, Worker
from toy import reference

from kvasir_engine.connector import notifications, receiver
from kvasir_engine.connector.sender import PING_INTERVAL
from kvasir_engine.core.loans import LOAN_SECONDS
from kvasir_engine.core.scheduler import Limits
from kvasir_engine.kv.pages import Owner
from kvasir_engine.protocol import Delta, Lease, Leased, Reserve, Sampling, Submit

LIMITS = Limits(tokens=64, running=4, page_size=4)
ROUTER = 1
TURN1 = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]
COUNT = 9


class Talk:
    """A first turn that decode has whole and prefill only the prompt of (or, `cold`, nothing); then a second."""

    def __init__(self, pages: int = 24, cold: bool = False) -> None:
        self.network = Network()
        self.prefill = Worker(self.network, "prefill", "p", pages, LIMITS)
        self.decode = Worker(self.network, "decode", "d", 24, LIMITS)
        self.out: dict[str, dict[int, int]] = {}
        self.failures: list[str] = []
        lease = self.reserve("one", TURN1, COUNT)
        self.submit("one", TURN1, lease, COUNT)
        self.run()
        assert self.tokens_of("one") == reference(TURN1, COUNT)
        self.turn2 = [*TURN1, *self.tokens_of("one"), 7, 7, 7, 7, 7]
        if cold:
            self.prefill.engine.cache.tree.evict(pages)
        self.computed = self.prefill.runner.computed

    def reserve(self, request: str, prompt: list[int], count: int = 3, lend_from: int | None = None) -> Lease:
        writer = self.prefill.endpoint
        frame = Reserve(request, prompt, Sampling(max_tokens=count), writer, "", 0, lend_from, nonces=True)
        self.decode.engine.reserve(ROUTER, frame)
        self.decode.engine.step()
        (leased,) = [frame for frame in self.frames(self.decode) if isinstance(frame, Leased)]
        assert leased.lease is not None
        return leased.lease

    def submit(self, request: str, prompt: list[int], lease: Lease, count: int = 3) -> None:
        frame = Submit(request, prompt, Sampling(max_tokens=count), "", lease, self.decode.endpoint)
        self.prefill.engine.submit(ROUTER, frame)

    def begin(self, lend_from: int = 8) -> Lease:
        """The second turn, with its read under way."""
        lease = self.reserve("two", self.turn2, lend_from=lend_from)
        self.submit("two", self.turn2, lease)
        self.decode.run_commands()
        self.prefill.run_commands()
        self.prefill.receive_all()
        assert self.prefill.writes
        self.check()
        return lease

    def check(self) -> None:
        for worker in self.network.workers.values():
            worker.check()

    def frames(self, worker: Worker) -> list[Delta | Leased]:
        frames = worker.engine.drain().get(ROUTER, [])
        for frame in frames:
            if isinstance(frame, Delta):
                self.out.setdefault(frame.id, {}).update(enumerate(frame.tokens, frame.index))
                self.failures += [frame.failure.code] if frame.failure is not None else []
        return frames

    def run(self) -> None:
        """Until nothing is left to do, on a clock that stands still."""
        for _ in range(60):
            for worker in list(self.network.workers.values()):
                worker.engine.step()
                worker.run_commands()
                while worker.writes:
                    worker.end_write()
                worker.receive_all()
                worker.take_events()
                self.check()
                self.frames(worker)

    def tokens_of(self, request: str) -> list[int]:
        return [token for _, token in sorted(self.out[request].items())]

    def is_idle(self) -> bool:
        return all(worker.quiet() for worker in self.network.workers.values())


def abort(talk: Talk) -> None:
    for worker in (talk.decode, talk.prefill):
        worker.engine.abort(ROUTER, "two")


@pytest.mark.parametrize(("cold", "lend_from", "read"), [(False, 8, 2), (True, 0, 4)])
def test_what_decode_has_of_a_conversation_is_read_and_not_computed(cold: bool, lend_from: int, read: int) -> None:
    talk = Talk(cold=cold)
    lease = talk.reserve("two", talk.turn2, lend_from=lend_from)
    assert lease.loan is not None
    assert (lease.loan.first, len(lease.loan.pages)) == (lend_from, read)
    talk.submit("two", talk.turn2, lease)
    talk.run()
    assert talk.tokens_of("two") == reference(talk.turn2, 3)
    assert talk.failures == []
    assert talk.prefill.runner.computed - talk.computed == len(talk.turn2) - lease.first
    assert talk.prefill.engine.readback.stats.pages == read
    assert talk.decode.engine.stats.rejected_messages == 0
    assert talk.is_idle()


def test_nothing_is_lent_that_was_not_asked_for_or_is_not_there() -> None:
    talk = Talk()
    assert talk.reserve("two", talk.turn2).loan is None
    assert talk.reserve("other", [9] * 9, lend_from=0).loan is None
    assert talk.reserve("three", talk.turn2, lend_from=16).loan is None


def test_what_prefill_has_got_by_itself_meanwhile_is_not_read() -> None:
    talk = Talk()
    lease = talk.reserve("two", talk.turn2, lend_from=0)
    assert lease.loan is not None
    assert len(lease.loan.pages) == 4
    talk.submit("two", talk.turn2, lease)
    talk.run()
    assert talk.prefill.engine.readback.stats.pages == 2
    assert talk.tokens_of("two") == reference(talk.turn2, 3)
    assert talk.is_idle()


def test_a_loan_that_does_not_join_what_prefill_has_is_declined_and_the_prompt_computed() -> None:
    talk = Talk()
    lease = talk.reserve("two", talk.turn2, lend_from=8)
    talk.prefill.engine.cache.tree.evict(24)
    talk.submit("two", talk.turn2, lease)
    talk.run()
    assert talk.prefill.engine.readback.stats.outcomes == {"declined": 1}
    assert talk.tokens_of("two") == reference(talk.turn2, 3)
    assert talk.is_idle()


def test_a_loan_for_which_there_is_no_room_is_declined() -> None:
    talk = Talk(pages=8)
    lease = talk.reserve("two", talk.turn2, lend_from=8)
    held = talk.prefill.engine.cache.pool.take(5)
    talk.submit("two", talk.turn2, lease)
    talk.prefill.engine.cache.pool.release(held)
    talk.run()
    assert talk.prefill.engine.readback.stats.outcomes == {"declined": 1}
    assert talk.tokens_of("two") == reference(talk.turn2, 3)
    assert talk.is_idle()


def test_what_is_lent_stays_until_it_is_read() -> None:
    talk = Talk()
    lease = talk.begin()
    assert lease.loan is not None
    talk.decode.engine.abort(ROUTER, "two")
    pool = talk.decode.engine.cache.pool
    talk.decode.engine.cache.tree.evict(pool.size)
    assert {pool.owner(page) for page in lease.loan.pages} == {Owner.HELD}
    talk.check()
    talk.run()
    assert talk.is_idle()


@pytest.mark.parametrize("when", ["before it is submitted", "under the read", "when it is read"])
@pytest.mark.parametrize("who", ["both", "prefill", "decode"])
def test_an_abort_at_any_point_loses_no_page(when: str, who: str) -> None:
    talk = Talk()
    if when == "before it is submitted":
        talk.reserve("two", talk.turn2, lend_from=8)
    else:
        talk.begin()
        if when == "when it is read":
            while talk.prefill.writes:
                talk.prefill.end_write()
    for worker in (talk.decode, talk.prefill) if who == "both" else (getattr(talk, who),):
        worker.engine.abort(ROUTER, "two")
        talk.check()
    talk.run()
    if when == "before it is submitted" and who == "prefill":  # it had not heard of it
        abort(talk)
        talk.run()
    assert talk.is_idle()
    assert not set(talk.failures) - {"handoff_failed"}


@pytest.mark.parametrize("when", ["under the read", "when it is read"])
@pytest.mark.parametrize("victim", ["prefill", "decode"])
def test_a_death_at_either_end_loses_no_page_of_the_other(when: str, victim: str) -> None:
    talk = Talk()
    talk.begin()
    if when == "when it is read":
        while talk.prefill.writes:
            talk.prefill.end_write()
    talk.network.kill(getattr(talk, victim))
    talk.check()
    talk.run()
    assert talk.is_idle()
    assert talk.failures == ["handoff_failed"]


def test_a_lender_that_dies_before_it_says_what_it_lends_is_not_waited_for() -> None:
    talk = Talk()
    lease = talk.reserve("two", talk.turn2, lend_from=8)
    talk.submit("two", talk.turn2, lease)
    talk.prefill.run_commands()
    talk.network.kill(talk.decode, seen=False)  # no router notices either
    talk.prefill.run_commands()
    assert not len(talk.prefill.engine.waiting)
    talk.network.now += PING_INTERVAL
    talk.prefill.tick()
    talk.prefill.take_events()
    assert talk.prefill.engine.readback.stats.outcomes == {"failed": 1}
    talk.run()
    assert talk.failures == ["handoff_failed"], "decode was to have the prompt as well"
    assert talk.is_idle()


def test_a_read_that_ends_after_the_loan_counts_for_nothing() -> None:
    talk = Talk()
    talk.begin()
    talk.network.wait(LOAN_SECONDS)
    while talk.prefill.writes:
        talk.prefill.end_write()
    talk.run()
    assert talk.prefill.engine.readback.stats.outcomes == {"failed": 1}
    assert talk.tokens_of("two") == reference(talk.turn2, 3)
    assert talk.is_idle()


def test_an_expired_loan_is_held_until_the_reader_answers() -> None:
    talk = Talk()
    lease = talk.begin()
    assert lease.loan is not None
    talk.decode.engine.abort(ROUTER, "two")
    pool = talk.decode.engine.cache.pool
    for _ in range(200):
        talk.network.now += 1.0
        talk.decode.tick()
        talk.decode.take_events()
    assert {pool.owner(page) for page in lease.loan.pages} == {Owner.HELD}
    talk.run()
    assert talk.is_idle()


def test_pages_that_are_not_what_was_lent_are_not_used() -> None:
    talk = Talk()
    lease = talk.begin()
    assert lease.loan is not None
    (read,) = talk.prefill.writes
    talk.network.wire.end(read.transfer)
    talk.prefill.runner.pool.tensor[read.local[-1], 1, 2] ^= 1 << 20  # a bit has changed on its way
    talk.prefill.run_commands()
    talk.run()
    assert talk.prefill.engine.readback.stats.outcomes == {"failed": 1}
    assert talk.tokens_of("two") == reference(talk.turn2, 3)
    assert talk.prefill.runner.computed - talk.computed == len(talk.turn2) - 10  # the first turn's own was cached
    assert talk.is_idle()


def test_nothing_is_read_before_the_digests_have_come() -> None:
    talk = Talk()
    talk.submit("two", talk.turn2, talk.reserve("two", talk.turn2, lend_from=8))
    talk.prefill.run_commands()
    assert not talk.prefill.writes
    talk.decode.run_commands()
    talk.prefill.receive_all()
    assert talk.prefill.writes
    talk.run()
    assert talk.tokens_of("two") == reference(talk.turn2, 3)


def test_a_reader_that_says_it_wrote_is_refused() -> None:
    talk = Talk()
    lease = talk.begin()
    assert lease.loan is not None
    talk.decode.receive_all()
    talk.decode.take_events()
    for message in (
        notifications.Complete(lease.loan.id, lease.loan.epoch, 0, 0, 1, nonce=lease.loan.nonce),
        notifications.Written(lease.loan.id, lease.loan.epoch, 0, (0, 2), [5], lease.loan.nonce),
    ):
        talk.network.wire.forge(talk.prefill.agent, talk.decode.agent, notifications.encode(message))
        talk.decode.receive_all()
        event = talk.decode.events.popleft()
        assert isinstance(event, receiver.Rejected)
        assert "to read, not to write" in event.why
    talk.run()
    assert talk.is_idle()


def test_a_second_prompt_under_the_same_loan_reads_nothing() -> None:
    talk = Talk()
    lease = talk.begin()
    other = msgspec.structs.replace(talk.reserve("other", talk.turn2), loan=lease.loan)
    talk.submit("other", talk.turn2, other)
    talk.run()
    assert talk.tokens_of("other") == talk.tokens_of("two") == reference(talk.turn2, 3)
    assert talk.is_idle()


def test_who_waited_to_read_keeps_its_place_in_the_queue() -> None:
    talk = Talk()
    talk.begin()
    later = talk.reserve("later", [4] * 9)
    talk.submit("later", [4] * 9, later)
    while talk.prefill.writes:
        talk.prefill.end_write()
    talk.prefill.take_events()
    assert [sequence.id for sequence in talk.prefill.engine.waiting] == ["two", "later"]
    talk.run()
    assert talk.tokens_of("two") == reference(talk.turn2, 3)
    assert talk.is_idle()

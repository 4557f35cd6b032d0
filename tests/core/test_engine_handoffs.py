"""One handoff at a time between two engines, stopped at the step that matters: who owns which page just then."""

from collections.abc import Callable

import msgspec
import pytest
from pair import OTHER, PROMPT, ROUTER, Pair
from simulation import Worker
from toy import reference

from kvasir_engine.connector import notifications
from kvasir_engine.core import pushes
from kvasir_engine.core.scheduler import Limits
from kvasir_engine.kv.pages import Owner
from kvasir_engine.protocol import Delta, Lease


@pytest.fixture
def pair() -> Pair:
    return Pair()


def test_pages_of_an_aborted_lease_are_nobodys_until_the_writer_has_stopped(pair: Pair) -> None:
    lease = pair.begin("r", PROMPT)
    pair.decode.engine.abort(ROUTER, "r")
    pool = pair.decode.engine.cache.pool
    assert {pool.owner(page) for page in lease.pages} == {Owner.FENCED}
    assert pool.count(Owner.FREE) == pool.size - len(lease.pages)
    pair.decode.run_commands()
    pair.prefill.receive_all()  # the release reaches a writer that still writes: it lives, and has not stopped
    pair.decode.receive_all()
    assert {pool.owner(page) for page in lease.pages} == {Owner.FENCED}
    pair.decode.check()
    pair.deliver()
    pair.frames(pair.prefill)
    assert pair.failures == {"r": ["handoff_failed"]}
    assert pair.is_idle()  # told at once: no clock has run


def test_a_lease_whose_prompt_was_aborted_at_prefill_fails_at_decode_without_waiting(pair: Pair) -> None:
    pair.begin("r", PROMPT)
    pair.prefill.engine.abort(ROUTER, "r")
    pair.deliver()
    pair.frames(pair.decode)
    assert pair.failures == {"r": ["handoff_failed"]}
    assert pair.is_idle()


def test_what_a_push_reads_is_held_after_its_request_is_gone(pair: Pair) -> None:
    pair.begin("r", PROMPT)
    pair.prefill.engine.abort(ROUTER, "r")
    pair.prefill.check()
    pool = pair.prefill.engine.cache.pool
    assert pool.count(Owner.HELD) == 3
    pair.prefill.engine.cache.tree.evict(pool.size)
    assert pool.count(Owner.HELD) == 3
    pair.deliver()
    assert pair.is_idle()


def test_a_prompt_handed_off_keeps_its_pages_while_they_are_written_and_not_longer(pair: Pair) -> None:
    pair.begin("r", PROMPT)
    pair.frames(pair.prefill)
    assert len(pair.tokens["r"]) == 1  # prefill is done with it
    assert pair.prefill.engine.running == []
    pool = pair.prefill.engine.cache.pool
    assert pool.count(Owner.HELD) == 3
    pair.deliver()
    assert pool.count(Owner.HELD) == 0
    assert pool.count(Owner.CACHED) == 3
    pair.run()
    assert pair.tokens_of("r") == reference(PROMPT, 3)
    assert pair.is_idle()


def test_pages_under_a_push_are_not_given_to_the_next_prompt() -> None:
    pair = Pair(prefill_pages=6)
    pair.begin("r", PROMPT)
    pair.prefill.engine.abort(ROUTER, "r")
    other = [7] * 14
    pair.submit("s", other, pair.lease("s", other))
    for _ in range(3):
        pair.prefill.engine.step()
        pair.prefill.check()
    assert len(pair.prefill.engine.waiting) == 1  # 4 pages are wanted, 3 are free until the writes have ended
    pair.run()
    assert pair.tokens_of("s") == reference(other, 3)
    assert pair.is_idle()


def test_a_completion_that_crosses_the_abort_gives_all_pages_back(pair: Pair) -> None:
    pair.begin("r", PROMPT)
    while pair.prefill.writes:
        pair.prefill.end_write()
    pair.decode.receive_all()
    assert pair.decode.events  # settled, and the engine has not heard of it
    pair.decode.engine.abort(ROUTER, "r")
    pair.deliver()
    assert pair.is_idle()


def test_a_completion_of_another_prompts_length_is_an_error_and_no_page_is_lost(pair: Pair) -> None:
    pair.begin("r", PROMPT)
    while pair.prefill.writes:
        pair.prefill.end_write()
    sent = pair.network.wire.sent[pair.prefill.agent, pair.decode.agent]
    complete = notifications.decode(sent.pop())
    assert isinstance(complete, notifications.Complete)
    sent.append(notifications.encode(msgspec.structs.replace(complete, tokens=complete.tokens - 1)))
    pair.run()
    assert pair.failures["r"] == ["handoff_failed"]
    assert pair.is_idle()


def test_only_what_decode_lacks_is_sent_and_to_its_place(pair: Pair) -> None:
    lease = pair.begin("first", PROMPT)
    assert len(lease.pages) == 3
    pair.run()
    again = [*PROMPT[:8], 8, 8, 8, 8, 8]
    lease = pair.begin("second", again)
    assert (lease.first, len(lease.pages)) == (8, 2)
    pair.run()
    assert pair.tokens_of("second") == reference(again, 3)
    assert pair.prefill.engine.stats.sent_pages == 5
    assert pair.is_idle()


@pytest.mark.parametrize("length", [1, 3, 4, 5, 12, 13, 27, 28])
def test_prompts_of_any_length_and_number_of_chunks_arrive_whole(length: int) -> None:
    pair = Pair(limits=Limits(tokens=7, running=4, page_size=4))
    prompt = [place * 7 % 50 for place in range(length)]
    for request in ("r", "again"):  # the second time prefill has it cached
        if request == "again":
            pair.decode.engine.cache.tree.evict(12)
        pair.submit(request, prompt, pair.lease(request, prompt))
        pair.run()
        assert pair.failures == {}
        assert pair.tokens_of(request) == reference(prompt, 3)
    assert pair.is_idle()


def test_no_page_is_pushed_before_it_is_full(pair: Pair) -> None:
    lease = pair.lease("r", [5] * 23)
    pair.submit("r", [5] * 23, lease)
    pushed = []
    for tokens in (12, 23):
        pair.prefill.engine.step()
        pair.confirm()
        while pair.prefill.writes:
            write = pair.prefill.writes[0]
            pushed.append((tokens, write.layers, write.remote))
            pair.prefill.end_write()
    pages = tuple(lease.pages)
    first, rest = pages[:3], pages[3:]
    zero, one = range(1), range(1, 2)
    assert pushed[:4] == [(12, zero, first), (12, one, first), (23, zero, rest), (23, one, rest)]
    assert {page for _, _, pages in pushed[4:] for page in pages} <= set(rest), "the link is measured with these"


def test_what_a_lease_builds_on_stays_while_it_is_open(pair: Pair) -> None:
    pair.begin("first", PROMPT)
    pair.run()
    pair.begin("second", [*PROMPT[:8], 8, 8])
    held = pair.decode.engine.cache.pool.count(Owner.HELD)
    assert held == 2
    pair.decode.engine.cache.tree.evict(12)
    pair.run()
    assert pair.tokens_of("second") == reference([*PROMPT[:8], 8, 8], 3)


def test_the_end_of_one_router_is_not_anothers(pair: Pair) -> None:
    mine, theirs = pair.lease("r", PROMPT), pair.lease("r", PROMPT[::-1], session=OTHER)
    pair.submit("r", PROMPT, mine)
    pair.submit("r", PROMPT[::-1], theirs, session=OTHER)
    for worker in (pair.prefill, pair.decode):
        worker.engine.close_session(OTHER)
    pair.run()
    assert pair.tokens_of("r") == reference(PROMPT, 3)
    assert pair.is_idle()


SPOIL: list[tuple[str, Callable[[Lease], Lease]]] = [
    ("a page too few", lambda lease: msgspec.structs.replace(lease, pages=lease.pages[1:])),
    ("a page too many", lambda lease: msgspec.structs.replace(lease, pages=[*lease.pages, 9])),
    ("another worker's", lambda lease: msgspec.structs.replace(lease, writer="p-9")),
    ("of another life of this worker", lambda lease: msgspec.structs.replace(lease, writer_epoch=0)),
    ("a beginning within a page", lambda lease: msgspec.structs.replace(lease, first=2)),
]


@pytest.mark.parametrize(("what", "spoil"), SPOIL, ids=[case[0] for case in SPOIL])
def test_a_lease_that_does_not_fit_the_prompt_is_refused(
    pair: Pair, what: str, spoil: Callable[[Lease], Lease]
) -> None:
    lease = pair.lease("r", PROMPT)
    pair.submit("r", PROMPT, spoil(lease))
    pair.frames(pair.prefill)
    assert pair.failures == {"r": ["bad_lease"]}
    assert not pair.prefill.engine.jobs


def test_a_lease_of_an_earlier_life_of_prefill_is_refused_by_name_and_its_pages_come_back(pair: Pair) -> None:
    before, lease = pair.prefill, pair.lease("r", PROMPT)
    assert (lease.writer, lease.writer_epoch) == (before.endpoint.agent, before.endpoint.epoch)
    pair.network.kill(before, seen=False)
    pair.prefill = Worker(pair.network, "prefill", "p", 12, pair.prefill.engine.limits)
    pair.submit("r", PROMPT, lease)
    (refused,) = [frame.failure for frame in pair.frames(pair.prefill) if isinstance(frame, Delta)]
    assert refused is not None
    now = pair.prefill.endpoint
    why = f"granted to {lease.writer} in epoch {lease.writer_epoch}, this is {now.agent} in epoch {now.epoch}"
    assert (refused.code, refused.message) == ("bad_lease", f"the lease was {why}")
    assert not pair.prefill.engine.unfinished
    pair.decode.engine.abort(ROUTER, "r")
    pair.run()
    assert pair.is_idle()


def test_what_prefill_has_cached_is_pushed_some_pages_at_a_time(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = [*PROMPT, *PROMPT]
    pair.begin("first", prompt)
    pair.run()
    pair.decode.engine.cache.tree.evict(12)
    monkeypatch.setattr(pushes, "PUSH_BLOCKS", 3)
    lease = pair.begin("second", prompt)
    assert [write.remote for write in pair.prefill.writes[:2]] == [tuple(lease.pages[:3]), (lease.pages[3],)]
    pair.run()
    assert pair.tokens_of("second") == reference(prompt, 3)
    assert pair.is_idle()

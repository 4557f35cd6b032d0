"""What the lease executor does at one moment, over the wire that tests move."""

from collections.abc import Callable

import pytest
from fake_nixl import Transfer
from test_rank_leases import ROUNDS, SECONDS, TOKENS, Leases, nonce_of, world

from kvasir_engine.connector import notifications, receiver, sender
from kvasir_engine.connector.rank_parts import Event
from kvasir_engine.connector.receiver import PING_INTERVAL, SILENCE
from kvasir_engine.protocol import Lease


def opened(state: Leases, loan: bool = False, pushes: int = 3) -> int:
    """A lease or loan whose prompt has come, so much of it pushed, up to its first copies."""
    id_ = len(state.granted) + 1
    if loan:
        state.pages_are_lent(SECONDS)
    else:
        state.a_lease_is_granted(SECONDS)
    state.open(id_)
    for _ in range(pushes):
        state.push(id_)
    talk(state)
    return id_


def talk(state: Leases) -> None:
    """All messages arrive; no copy ends, and no engine learns."""
    for rank in state.ranks * 3:
        state.wire.deliver_all(rank.agent)
        rank.thread.turn()


def end_all(state: Leases) -> Transfer:
    """All copies of prefill end, the last one is returned; no message arrives."""
    while state.wire.transfers:
        last = state.wire.transfers[0]
        state.wire.end(last)
        for rank in state.prefill.ranks:
            rank.thread.turn()
    return last


def new_events(state: Leases, prefill: bool) -> list[Event]:
    """The events that rank 0 of a worker has reported since the last call."""
    worker = state.prefill if prefill else state.decode
    return worker.events(worker.ranks[0])


def pass_time(state: Leases, seconds: float) -> None:
    state.clocks = [clock + seconds for clock in state.clocks]


def test_nothing_is_written_before_the_holder_has_confirmed_the_lease() -> None:
    state = world()
    state.a_lease_is_granted(SECONDS)
    state.open(1)
    state.push(1)
    state.prefill.ranks[0].thread.turn()
    assert not state.wire.transfers
    talk(state)
    assert state.wire.transfers


def test_nothing_is_read_before_the_digests_have_come() -> None:
    state = world()
    state.pages_are_lent(SECONDS)
    state.open(1)
    state.push(1)
    state.prefill.ranks[0].thread.turn()
    assert not state.wire.transfers
    talk(state)
    assert state.wire.transfers


def test_nothing_is_written_on_the_word_of_who_does_not_know_the_nonce() -> None:
    state = world()
    state.a_lease_is_granted(SECONDS)
    state.open(1)
    state.push(1)
    (prefill,), (decode,) = state.prefill.ranks, state.decode.ranks
    prefill.thread.turn()
    forged = notifications.encode(notifications.Pong(1, state.decode.epoch, 7777))
    state.wire.agents[prefill.agent].arrived.append((decode.agent, forged))
    prefill.thread.turn()
    assert not state.wire.transfers
    (rejected,) = prefill.thread.events
    assert isinstance(rejected, receiver.Rejected)
    assert rejected.why == "it answers what nobody asked"


def test_nothing_is_written_under_a_lease_that_nobody_granted() -> None:
    state = world()
    opened(state)  # so that the two know each other
    end_all(state)
    state.open_false(list(range(TOKENS // state.decode.size)))
    state.push(2)
    talk(state)
    assert not state.wire.transfers
    (failed,) = [each for each in new_events(state, prefill=True) if isinstance(each, sender.Failed)]
    assert failed.key[1] == 2
    assert "released" in failed.reason


@pytest.mark.parametrize("known", [False, True])
def test_nothing_is_written_under_a_lease_whose_nonce_was_guessed(known: bool) -> None:
    state = world()
    if known:
        opened(state)
        end_all(state)
    state.a_lease_is_granted(SECONDS)
    id_ = len(state.granted)
    state.guess(state.granted[id_])
    state.open(id_)
    state.push(id_)
    talk(state)
    assert not state.wire.transfers
    (rejected,) = [each for each in new_events(state, prefill=False) if isinstance(each, receiver.Rejected)]
    assert (rejected.lease, "wrong nonce" in rejected.why) == (id_, True)


def test_a_question_that_is_lost_is_asked_again() -> None:
    state = world()
    state.a_lease_is_granted(SECONDS)
    state.open(1)
    state.push(1)
    (prefill,), (decode,) = state.prefill.ranks, state.decode.ranks
    prefill.thread.turn()
    state.wire.lose(decode.agent, prefill.agent)
    talk(state)
    assert not state.wire.transfers
    pass_time(state, PING_INTERVAL)
    talk(state)
    assert state.wire.transfers


@pytest.mark.parametrize("loan", [False, True])
def test_a_copy_that_failed_ends_its_lease_when_the_others_have_ended(loan: bool) -> None:
    state = world()
    id_ = opened(state, loan, pushes=2)
    first, second = state.wire.transfers
    state.wire.end(first, ok=False)
    talk(state)
    assert not new_events(state, prefill=True), "the other copy is under way"
    state.wire.end(second)
    talk(state)
    while state.wire.transfers:  # the link is measured
        end_all(state)
    talk(state)
    (failed,) = new_events(state, prefill=True)
    assert isinstance(failed, sender.Failed)
    assert "failed" in failed.reason
    (back,) = new_events(state, prefill=False)
    assert isinstance(back, receiver.Reclaimed)
    assert (back.lease, back.proof) == (id_, "acknowledged")


@pytest.mark.parametrize("loan", [False, True])
def test_a_byte_that_changed_on_its_way_is_found(loan: bool) -> None:
    state = world()
    opened(state, loan)
    if loan:
        *_, last = state.wire.transfers
        for transfer in list(state.wire.transfers):
            state.wire.end(transfer)
    else:
        last = end_all(state)  # its writer's words are on their way
    state.wire.spoil(last)
    talk(state)
    ends = new_events(state, prefill=loan)
    if loan:
        assert [type(each) for each in ends] == [sender.Done, sender.Failed]
        assert state.prefill.connector.stats.digest_failures
    else:
        (back,) = ends
        assert isinstance(back, receiver.Reclaimed)
        assert back.code == "kv_digest_mismatch"


def test_a_death_that_shows_at_the_first_of_several_messages_is_told_after_what_was_decided() -> None:
    state = world()
    for _ in range(2):
        opened(state)
    state.wire.kill(state.prefill.agents[0])
    pass_time(state, SECONDS)
    talk(state)
    events = list(state.decode.ranks[0].thread.events)
    kinds = [(event.lease, type(event)) for event in events if not isinstance(event, sender.Done | sender.Failed)]
    fenced, back = receiver.Fenced, receiver.Reclaimed
    assert kinds == [(1, fenced), (2, fenced), (1, back), (2, back)]
    state.learn(state.decode.ranks[0])
    assert [each.back for each in state.granted.values()] == ["writer_died", "writer_died"]


def test_a_holder_that_dies_between_the_last_write_and_its_announcement_ends_the_lease_only() -> None:
    state = world()
    opened(state)
    for _ in range(ROUNDS):
        state.go_on()  # the link is measured
    id_ = opened(state)
    for transfer in list(state.wire.transfers):
        state.wire.end(transfer)
    state.wire.kill(state.decode.agents[0])
    (prefill,) = state.prefill.ranks
    prefill.thread.turn()
    state.learn(prefill)
    assert state.granted[id_].over == "the decode worker died"
    assert prefill.thread.quiet


def test_a_death_ends_what_is_on_both_sides_with_the_dead() -> None:
    state = world()
    opened(state)
    opened(state, loan=True)
    state.wire.kill(state.decode.agents[0])
    (prefill,) = state.prefill.ranks
    prefill.thread.turn()
    state.learn(prefill)
    assert [each.over for each in state.granted.values()] == ["the decode worker died"] * 2
    assert prefill.thread.quiet


def test_a_command_that_comes_while_messages_are_fetched_is_obeyed_before_they_are_read() -> None:
    state = world()
    (prefill,), (decode,) = state.prefill.ranks, state.decode.ranks
    nixl, pages = state.wire.agents[decode.agent], state.decode.take(TOKENS)
    lease = Lease(1, state.decode.epoch, pages, 0, SECONDS, prefill.agent, state.prefill.epoch, nonce=nonce_of(1))
    fetch = nixl.get_new_notifs

    def granted_meanwhile() -> dict[str, list[bytes]]:
        nixl.get_new_notifs = fetch  # type: ignore[method-assign]
        state.decode.connector.grant(lease, state.prefill.endpoint, TOKENS)
        question = notifications.Ping(1, lease.epoch, lease.nonce)
        nixl.arrived.append((prefill.agent, notifications.encode(question)))
        return fetch()

    nixl.get_new_notifs = granted_meanwhile  # type: ignore[method-assign]
    decode.thread.turn()
    answers = [notifications.decode(data) for data in state.wire.sent[decode.agent, prefill.agent]]
    assert [type(each) for each in answers] == [notifications.Pong, notifications.Ping], "its question, and ours"


def test_a_rank_that_hears_of_a_grant_later_than_of_its_writer_refuses_nobody() -> None:
    state = world((2, 2))
    late = state.decode.ranks[1]
    late.late = True
    opened(state)
    late.late = False
    for _ in range(ROUNDS):
        state.go_on()
    assert state.granted[1].back == "settled"


def test_pushes_that_come_before_the_command_that_opens_their_lease_wait_for_it() -> None:
    state = world((2, 2))
    late = state.prefill.ranks[1]
    late.late = True
    opened(state)
    late.late = False
    for _ in range(ROUNDS):
        state.go_on()
    assert state.granted[1].back == "settled"


def withdrawn(state: Leases) -> None:
    state.prefill.connector.withdraw((state.decode.endpoint.agent, 1), "aborted")


def revoked(state: Leases) -> None:
    state.decode.connector.revoke(1)


@pytest.mark.parametrize("stop", [withdrawn, revoked])
@pytest.mark.parametrize("loan", [False, True])
@pytest.mark.parametrize("ranks", [(1, 1), (4, 2)])
def test_who_wants_a_lease_to_end_waits_for_the_copies_under_way_on_all_ranks(
    ranks: tuple[int, int], loan: bool, stop: Callable[[Leases], None]
) -> None:
    state = world(ranks)
    opened(state, loan)
    assert state.wire.transfers
    stop(state)
    talk(state)
    while state.wire.transfers:
        for rank in state.ranks:
            state.learn(rank)
        assert not state.granted[1].back
        assert not state.granted[1].over
        state.wire.end(state.wire.transfers[0])
        talk(state)
    for rank in state.ranks:
        state.learn(rank)
    assert state.granted[1].back == "acknowledged"
    assert state.granted[1].over
    assert all(rank.thread.quiet for rank in state.ranks)


def test_a_release_reaches_a_writer_whose_prompt_has_not_come_and_refuses_it_then() -> None:
    state = world()
    state.a_lease_is_granted(SECONDS)
    revoked(state)
    talk(state)
    (decode,) = state.decode.ranks
    state.learn(decode)
    assert state.granted[1].back == "acknowledged"
    state.open(1)
    talk(state)
    (failed,) = new_events(state, prefill=True)
    assert isinstance(failed, sender.Failed)
    assert "released" in failed.reason


def fences(state: Leases) -> list[tuple[int, str]]:
    """The leases that the holder has fenced since, and why."""
    return [
        (each.lease, each.code) for each in new_events(state, prefill=False) if isinstance(each, receiver.Fenced)
    ]


def test_a_write_that_is_stuck_under_an_aborted_lease_makes_no_later_lease_silent() -> None:
    state = world()
    opened(state)
    for _ in range(ROUNDS):
        state.go_on()  # the link is measured
    opened(state)
    assert state.wire.transfers, "a write is under way"
    state.decode.connector.revoke(2)
    for _ in range(2 * round(SILENCE / PING_INTERVAL)):
        pass_time(state, PING_INTERVAL)
        talk(state)
    assert fences(state) == [(2, "lease_aborted")]
    id_ = opened(state)
    for _ in range(2 * round(SILENCE / PING_INTERVAL)):
        pass_time(state, PING_INTERVAL)
        talk(state)
    assert fences(state) == []
    for _ in range(ROUNDS):
        state.go_on()
    assert state.granted[id_].back == "settled"


def test_a_writer_that_is_stopped_is_silent_under_a_later_lease_too_and_its_time_begins_with_it() -> None:
    state = world()
    opened(state)
    (decode,) = state.decode.ranks
    revoked(state)
    for _ in range(2 * round(SILENCE / PING_INTERVAL)):
        pass_time(state, PING_INTERVAL)
        decode.thread.turn()
    state.a_lease_is_granted(SECONDS)
    quarters = 0
    while (2, "lease_writer_silent") not in fences(state):
        assert quarters <= SILENCE / PING_INTERVAL, "it is never found"
        pass_time(state, PING_INTERVAL)
        decode.thread.turn()
        quarters += 1
    assert quarters >= SILENCE / PING_INTERVAL


@pytest.mark.parametrize("ranks", [(1, 1), (2, 1)])
def test_a_death_that_shows_at_every_message_is_counted_once(ranks: tuple[int, int]) -> None:
    state = world(ranks)
    for _ in range(3):
        opened(state)
    for id_ in (1, 2, 3):
        state.decode.connector.revoke(id_)
    talk(state)  # the writes under way go on
    for agent in state.prefill.agents:
        state.wire.kill(agent)
    (decode,) = state.decode.ranks
    pass_time(state, PING_INTERVAL)
    decode.thread.turn()  # each lease's writer is asked again
    assert decode.thread.stats.peers_died == ranks[0]
    state.learn(decode)
    assert [each.back for each in state.granted.values()] == ["writer_died"] * 3


def test_a_lease_for_a_writer_that_is_dead_comes_back_at_once() -> None:
    for loan in (False, True):
        state = world()
        state.wire.kill(state.prefill.agents[0])
        if loan:
            state.pages_are_lent(SECONDS)
        else:
            state.a_lease_is_granted(SECONDS)
        (decode,) = state.decode.ranks
        decode.thread.turn()
        state.learn(decode)
        assert state.granted[1].back == "writer_died"


def test_a_lease_that_ends_before_it_is_confirmed_leaves_nothing() -> None:
    state = world()
    state.a_lease_is_granted(SECONDS)
    state.open(1)
    state.push(1)
    (prefill,) = state.prefill.ranks
    prefill.thread.turn()
    withdrawn(state)
    prefill.thread.turn()
    assert prefill.thread.quiet


def test_a_write_that_ends_before_an_earlier_one_leaves_nothing_when_the_lease_is_given_up() -> None:
    state = world()
    opened(state, pushes=2)
    (prefill,) = state.prefill.ranks
    state.wire.end(state.wire.transfers[1])
    prefill.thread.turn()
    withdrawn(state)
    end_all(state)
    assert prefill.thread.quiet


def test_a_withdrawal_is_of_all_parts_at_once() -> None:
    state = world((1, 2))
    opened(state, pushes=0)
    withdrawn(state)
    (prefill,) = state.prefill.ranks
    prefill.thread.turn()
    assert [type(each) for each in prefill.thread.events] == [sender.Failed, sender.Failed]


def test_a_writer_whose_holder_says_nothing_gives_up_when_the_lease_has_expired() -> None:
    state = world()
    state.a_lease_is_granted(SECONDS)
    state.open(1)
    (prefill,) = state.prefill.ranks
    prefill.thread.turn()
    pass_time(state, SECONDS)
    prefill.thread.turn()
    (failed,) = new_events(state, prefill=True)
    assert isinstance(failed, sender.Failed)
    assert "expired" in failed.reason


@pytest.mark.parametrize("begun", [False, True])
def test_a_death_ends_no_copy_with_another_worker(begun: bool) -> None:
    state = world()
    opened(state, pushes=3 * begun)
    dead, state.decode = state.decode, state.worker(1)
    opened(state, pushes=3 * begun)
    state.wire.kill(dead.agents[0])
    if not begun:
        for _ in range(3):
            state.push(1)
            state.push(2)
    for _ in range(ROUNDS):
        state.go_on()
    assert state.granted[1].over == "the decode worker died"
    assert state.granted[2].back == "settled"

"""Each side of the lease protocol by itself, one input at a time; `test_rank_leases.py` has both, and the wire."""

from collections.abc import Iterable

import pytest

from kvasir_engine.connector import receiver, sender
from kvasir_engine.connector.notifications import Complete, Ping, Pong, Release, Stopped, Written
from kvasir_engine.connector.receiver import PING_INTERVAL, RELEASE_INTERVAL, SILENCE, Receiver
from kvasir_engine.connector.sender import PIECES, WINDOW, Push, Sender

EPOCH = 7
PAGES = 2
LAYERS = 2
P, D = "prefill", "decode"
ALL = range(LAYERS)
SPAN = 0, LAYERS


def test_a_release_that_overtakes_the_prompt_refuses_it() -> None:
    machine = Sender(LAYERS)
    assert [type(e) for e in machine.released(D, Release(1, EPOCH), 0.0)] == [sender.NotifyHolder]
    assert [type(e) for e in machine.open((D, 1), EPOCH, 9.0)] == [sender.Failed]
    assert list(machine.open((D, 1), EPOCH + 1, 9.0)) == []  # another life of the holder


def test_a_timeout_alone_gives_no_page_back() -> None:
    machine = Receiver(EPOCH, LAYERS)
    machine.grant(1, P, range(PAGES), 0.0, 1.0)
    effects = [e for t in range(2, 500) for e in machine.tick(float(t))]
    assert {type(e) for e in effects} == {receiver.Fenced, receiver.NotifyWriter}
    assert len(machine) == machine.fenced == 1


def test_a_silent_writer_is_fenced_within_seconds_and_a_heard_one_is_not() -> None:
    machine = Receiver(EPOCH, LAYERS)
    machine.grant(1, P, range(PAGES), 0.0, 60.0)
    machine.grant(2, "other", range(PAGES), 0.0, 60.0)
    asked = []
    for quarter in range(1, 16):
        machine.heard("other", Pong(2, EPOCH))
        asked += [e for e in machine.tick(quarter / 4) if isinstance(e, receiver.Fenced)]
    assert asked == [receiver.Fenced(1, "lease_writer_silent", P)]


def test_a_completion_of_the_wrong_pages_is_no_completion() -> None:
    machine = Receiver(EPOCH, LAYERS)
    machine.grant(1, P, range(3), 0.0, 9.0)
    (verify,) = machine.received(P, Written(1, EPOCH, 0, SPAN, [7, 8]))
    assert verify == receiver.Verify(1, P, (0, 1), ALL, (7, 8))
    machine.verified(1, P, 2)
    (effect,) = machine.received(P, Complete(1, EPOCH, 40, 3, 5))
    assert isinstance(effect, receiver.Reclaimed)
    assert "2 pages of 3" in effect.reason


def test_a_completion_that_says_fewer_pages_is_none_though_all_are_written() -> None:
    machine = Receiver(EPOCH, LAYERS)
    machine.grant(1, P, range(3), 0.0, 9.0)
    list(machine.received(P, Written(1, EPOCH, 0, SPAN, [7, 8, 9])))
    machine.verified(1, P, 3)
    (effect,) = machine.received(P, Complete(1, EPOCH, 40, 2, 5))
    assert isinstance(effect, receiver.Reclaimed)
    assert "2 pages of 3" in effect.reason


def test_only_the_dead_writers_pages_come_back() -> None:
    machine = Receiver(EPOCH, LAYERS)
    for lease, agent in [(1, P), (2, "other"), (3, P)]:
        machine.grant(lease, agent, range(PAGES), 0.0, 9.0)
    gone = list(machine.died(P))
    assert [type(effect) for effect in gone] == [receiver.Reclaimed] * 2
    assert {effect.lease for effect in gone if isinstance(effect, receiver.Reclaimed)} == {1, 3}
    assert [type(e) for e in machine.received("other", Stopped(2, EPOCH, "done"))] == [receiver.Reclaimed]


def test_a_lease_is_fenced_once_and_its_writer_asked_until_it_answers() -> None:
    machine = Receiver(EPOCH, LAYERS)
    machine.grant(1, P, range(PAGES), 0.0, 9.0)
    ask = receiver.NotifyWriter(P, Release(1, EPOCH))
    assert list(machine.revoke(1, 0.0)) == [receiver.Fenced(1, "lease_aborted", P), ask]
    assert list(machine.revoke(1, 0.1)) == []
    for quarter in range(1, 9):
        assert list(machine.tick(quarter * RELEASE_INTERVAL)) == [ask]
        assert list(machine.tick(quarter * RELEASE_INTERVAL + 0.01)) == []


def test_a_writer_that_owes_something_is_pinged_and_another_is_not() -> None:
    machine = Receiver(EPOCH, LAYERS)
    assert list(machine.tick(1.0)) == []
    machine.grant(1, P, range(PAGES), 1.0, 9.0)
    for quarter in range(5):
        now = 1.0 + quarter * PING_INTERVAL
        assert list(machine.tick(now)) == [receiver.NotifyWriter(P, Ping(1, EPOCH))]
        assert list(machine.tick(now + 0.01)) == []


def fenced_in(machine: Receiver, began: float, seconds: float) -> list[int]:
    """The leases fenced in so many seconds of a holder that looks around often, from `began` on."""
    ticks = [began + at * PING_INTERVAL / 2 for at in range(1, round(seconds / PING_INTERVAL) * 2 + 1)]
    return [e.lease for now in ticks for e in machine.tick(now) if isinstance(e, receiver.Fenced)]


def test_the_silence_between_two_leases_is_nobodys_fault() -> None:
    machine = Receiver(EPOCH, LAYERS)
    machine.grant(1, P, range(PAGES), 0.0, 9.0)
    machine.heard(P, Pong(1, EPOCH))
    list(machine.received(P, Stopped(1, EPOCH, "done")))
    machine.grant(2, P, range(PAGES), 100.0, 9.0)
    assert fenced_in(machine, 100.0, SILENCE / 2) == []
    machine.grant(3, P, range(PAGES), 100.0 + SILENCE / 2, 9.0)  # another lease does not excuse the first's silence
    assert fenced_in(machine, 100.0 + SILENCE / 2, SILENCE) == [2]


def test_a_lease_granted_while_another_is_fenced_begins_its_own_time() -> None:
    machine = Receiver(EPOCH, LAYERS)
    machine.grant(1, P, range(PAGES), 0.0, 99.0)
    list(machine.revoke(1, 0.0))  # a write is stuck: the writer lives, and cannot say that it has stopped
    assert fenced_in(machine, 0.0, 2 * SILENCE) == []
    machine.grant(2, P, range(PAGES), 2 * SILENCE, 99.0)
    assert [e for e in machine.tick(2 * SILENCE) if not isinstance(e.message, Release)] == [  # type: ignore[union-attr]
        receiver.NotifyWriter(P, Ping(2, EPOCH))
    ]
    assert fenced_in(machine, 2 * SILENCE, SILENCE - PING_INTERVAL) == []
    assert fenced_in(machine, 3 * SILENCE - PING_INTERVAL, 2 * PING_INTERVAL) == [2]


def test_a_word_about_one_lease_is_its_writers_word_for_all() -> None:
    machine = Receiver(EPOCH, LAYERS)
    for lease in (1, 2):
        machine.grant(lease, P, range(PAGES), 0.0, 99.0)
    assert fenced_in(machine, 0.0, SILENCE - PING_INTERVAL) == []
    machine.heard(P, Pong(2, EPOCH))
    assert fenced_in(machine, SILENCE - PING_INTERVAL, SILENCE - PING_INTERVAL) == []


def test_a_holder_that_stood_still_does_not_take_it_for_the_writers_silence() -> None:
    machine = Receiver(EPOCH, LAYERS)
    machine.grant(1, P, range(PAGES), 0.0, 999.0)
    machine.tick(0.0)
    assert fenced_in(machine, 100.0, SILENCE - 2 * PING_INTERVAL) == []
    assert fenced_in(machine, 100.0 + SILENCE - 2 * PING_INTERVAL, 3 * PING_INTERVAL) == [1]


KEY = D, 1


def opened(deadline: float = 9.0) -> Sender:
    machine = Sender(LAYERS)
    assert list(machine.open(KEY, EPOCH, deadline)) == []
    return machine


def kinds(effects: Iterable[sender.Effect]) -> list[str]:
    """The effects' types; of what is told, the message's."""
    return [type(e.message if isinstance(e, sender.NotifyHolder) else e).__name__ for e in effects]


def layers(page: int) -> list[Push]:
    return [Push((page,), (page,), layer) for layer in range(LAYERS)]


def test_a_completion_waits_for_every_write_under_way() -> None:
    machine, (first, last) = opened(), layers(0)
    done = Push(complete=Complete(1, EPOCH, 16, 1, 5))
    assert kinds(machine.push(KEY, first, 0.0)) == ["Post"]
    assert kinds(machine.push(KEY, last, 0.0)) == ["Post"]
    assert kinds(machine.push(KEY, done, 0.0)) == []
    assert kinds(machine.ended(KEY, first, True, 0.0)) == ["Announce"]
    assert kinds(machine.tick(0.0)) == []
    assert kinds(machine.ended(KEY, last, True, 0.0)) == ["Announce", "Done", "Complete", "Done"]


def test_a_write_that_ends_before_an_earlier_one_is_not_announced_before_it() -> None:
    machine, (first, last) = opened(), layers(0)
    list(machine.push(KEY, first, 0.0))
    list(machine.push(KEY, last, 0.0))
    list(machine.push(KEY, Push(complete=Complete(1, EPOCH, 16, 1, 5)), 0.0))
    assert kinds(machine.ended(KEY, last, True, 0.0)) == []
    effects = machine.ended(KEY, first, True, 0.0)
    assert kinds(effects) == ["Announce", "Announce", "Done", "Complete", "Done"]
    assert [e.layers for e in effects if isinstance(e, sender.Announce)] == [range(1), range(1, 2)]


def test_layers_that_wait_for_the_transport_go_together() -> None:
    machine = Sender(8)
    list(machine.open(KEY, EPOCH, 9.0))
    busy = [Push((page,), (page,)) for page in range(WINDOW)]
    for push in busy:
        list(machine.push(KEY, push, 0.0))
    pages, others = tuple(range(100, 100 + PIECES // 4)), tuple(range(200, 210))
    waiting = [Push(pages, pages, layer) for layer in range(8)] + [
        Push(others, others, layer) for layer in range(8)
    ]
    assert not any(e for push in waiting for e in machine.push(KEY, push, 0.0))
    posts = [e for push in busy for e in machine.ended(KEY, push, True, 0.0) if isinstance(e, sender.Post)]
    assert [(post.push.local, post.layers) for post in posts] == [
        (pages, range(4)),
        (pages, range(4, 8)),
        (others, range(8)),
    ]
    effects = [e for post in posts for e in machine.ended(KEY, post.push, True, 0.0)]
    assert [e.push for e in effects if isinstance(e, sender.Done)] == [waiting[7], waiting[15]]


def test_a_completion_queued_under_the_last_write_does_not_overtake_it() -> None:
    machine, push = opened(), Push((1, 2), (3, 4))
    assert kinds(machine.push(KEY, push, 0.0)) == ["Post"]
    assert kinds(machine.push(KEY, Push(complete=Complete(1, EPOCH, 32, 2, 5)), 0.0)) == []
    assert kinds(machine.ended(KEY, push, True, 0.0)) == ["Announce", "Done", "Complete", "Done"]


def test_whoever_wants_a_lease_to_end_waits_for_the_writes_under_way() -> None:
    for stop in ("withdraw", "release", "deadline", "a failed write"):
        machine, pushes = opened(5.0), [Push((page,), (page,), 0) for page in range(3)]
        for push in pushes:
            assert kinds(machine.push(KEY, push, 0.0)) == ["Post"]
        match stop:
            case "withdraw":
                effects = machine.withdraw(KEY, "aborted", 1.0)
            case "release":
                effects = machine.released(D, Release(1, EPOCH), 1.0)
            case "deadline":
                effects = machine.tick(5.0)
            case _:
                effects = machine.ended(KEY, pushes.pop(), False, 1.0)
        assert kinds(effects) == [], stop
        assert kinds(machine.push(KEY, Push((7,), (7,)), 1.0)) == [], "a write was posted after the end"
        assert kinds(machine.withdraw(KEY, "again", 1.0)) == []
        while len(pushes) > 1:
            assert kinds(machine.ended(KEY, pushes.pop(), True, 1.0)) == [], stop
        assert kinds(machine.ended(KEY, pushes.pop(), True, 1.0)) == ["Failed", "Stopped"], stop
        assert not len(machine)


def test_a_write_that_failed_is_no_page() -> None:
    machine, push = opened(), Push((1,), (1,))
    list(machine.push(KEY, push, 0.0))
    list(machine.push(KEY, Push(complete=Complete(1, EPOCH, 16, 1, 5)), 0.0))
    assert kinds(machine.ended(KEY, push, False, 0.0)) == ["Failed", "Stopped"]


def test_nothing_is_posted_at_or_after_the_deadline_even_before_the_clock_is_looked_at() -> None:
    machine = opened(5.0)
    assert kinds(machine.push(KEY, Push((1,), (1,)), 5.0)) == ["Failed", "Stopped"]


def test_the_writers_clock_alone_ends_a_lease() -> None:
    machine = opened(5.0)
    assert kinds(machine.tick(4.9)) == []
    assert kinds(machine.tick(5.0)) == ["Failed", "Stopped"]


def test_a_lender_is_pinged_while_it_is_read_from_and_a_holder_that_is_written_to_is_not() -> None:
    machine = opened()
    assert list(machine.open(("lender", 2), EPOCH, 9.0, reading=True)) == []
    assert list(machine.open(("lender", 3), EPOCH, 9.0, reading=True)) == []
    for quarter in range(1, 4):
        now = quarter * sender.PING_INTERVAL
        assert list(machine.tick(now)) == [sender.NotifyHolder("lender", Ping(3, EPOCH))]
        assert list(machine.tick(now + 0.01)) == []
    assert kinds(machine.died("lender")) == ["Failed", "Failed"]
    assert list(machine.tick(5.0)) == []


def test_a_release_for_another_life_of_the_holder_stops_nothing() -> None:
    machine = opened()
    assert kinds(machine.released(D, Release(1, EPOCH - 1), 0.0)) == ["Stopped"]
    assert kinds(machine.push(KEY, Push((1,), (1,)), 0.0)) == ["Post"]


def test_a_holders_death_ends_its_leases_and_no_others() -> None:
    machine = opened()
    list(machine.open(("other", 1), EPOCH, 9.0))
    assert list(machine.died(D)) == [sender.Failed(KEY, "the decode worker died")]
    assert kinds(machine.push(("other", 1), Push((1,), (1,)), 0.0)) == ["Post"]


def test_pages_are_announced_at_their_places_in_the_lease() -> None:
    machine, places = opened(), []
    for pages in [(1, 2, 3), (4,), (5, 6)]:
        push = Push(pages, pages)
        list(machine.push(KEY, push, 0.0))
        places += [e.first for e in machine.ended(KEY, push, True, 0.0) if isinstance(e, sender.Announce)]
    assert places == [0, 3, 4]


def test_writes_under_way_are_bounded_and_the_rest_follows() -> None:
    machine = opened()
    pushes = [Push((page,), (page,), 0) for page in range(WINDOW + 3)]
    posted = [e.push for push in pushes for e in machine.push(KEY, push, 0.0) if isinstance(e, sender.Post)]
    assert posted == pushes[:WINDOW]
    posted += [e.push for e in machine.ended(KEY, pushes[0], True, 0.0) if isinstance(e, sender.Post)]
    assert posted == pushes[: WINDOW + 1]


def test_a_page_with_another_digest_fails_the_request_by_name() -> None:
    machine = Receiver(EPOCH, LAYERS)
    machine.grant(1, P, range(3), 0.0, 9.0)
    list(machine.received(P, Written(1, EPOCH, 0, SPAN, [7, 8, 9])))
    machine.verified(1, P, 2)
    (effect,) = machine.received(P, Complete(1, EPOCH, 40, 3, 5))
    assert isinstance(effect, receiver.Reclaimed)
    assert (effect.code, effect.proof) == ("kv_digest_mismatch", "acknowledged")


def test_pages_announced_out_of_order_are_refused() -> None:
    machine = Receiver(EPOCH, LAYERS)
    machine.grant(1, P, range(3), 0.0, 9.0)
    for first, count in [(1, 1), (0, 4)]:
        (effect,) = machine.received(P, Written(1, EPOCH, first, SPAN, [0] * count))
        assert isinstance(effect, receiver.Rejected)


def test_layers_announced_out_of_order_are_refused() -> None:
    for spans in [[(1, 2)], [(0, 1), (0, 1)], [(0, 3)], [(0, 0)], [(0, 1), (1, 3)]]:
        machine = Receiver(EPOCH, LAYERS)
        machine.grant(1, P, range(3), 0.0, 9.0)
        *before, last = [list(machine.received(P, Written(1, EPOCH, 0, span, [0, 0]))) for span in spans]
        assert all(isinstance(effect, receiver.Verify) for (effect,) in before)
        assert [type(effect) for effect in last] == [receiver.Rejected], spans


def test_layers_of_other_pages_than_those_begun_are_refused() -> None:
    machine = Receiver(EPOCH, LAYERS)
    machine.grant(1, P, range(3), 0.0, 9.0)
    list(machine.received(P, Written(1, EPOCH, 0, (0, 1), [0, 0])))
    (effect,) = machine.received(P, Written(1, EPOCH, 0, (1, 2), [0, 0, 0]))
    assert isinstance(effect, receiver.Rejected)


def test_a_strangers_word_about_a_lease_is_refused_whatever_it_is() -> None:
    for message in (
        Written(1, EPOCH, 0, SPAN, [7, 8]),
        Complete(1, EPOCH, 40, 2, 5),
        Stopped(1, EPOCH, "done"),
    ):
        machine = Receiver(EPOCH, LAYERS)
        machine.grant(1, P, range(2), 0.0, 9.0)
        (effect,) = machine.received("stranger", message)
        assert effect == receiver.Rejected("stranger", 1, f"the lease is {P}'s")
        assert len(machine) == 1


def test_a_completion_after_the_fence_gives_the_pages_back_and_settles_nothing() -> None:
    machine = Receiver(EPOCH, LAYERS)
    machine.grant(1, P, range(2), 0.0, 9.0)
    list(machine.received(P, Written(1, EPOCH, 0, SPAN, [7, 8])))
    machine.verified(1, P, 2)
    list(machine.revoke(1, 1.0))
    (effect,) = machine.received(P, Complete(1, EPOCH, 32, 2, 5))
    assert isinstance(effect, receiver.Reclaimed)
    assert effect.proof == "acknowledged"


def test_no_word_counts_without_the_nonce_of_its_lease() -> None:
    machine = Receiver(EPOCH, LAYERS)
    machine.grant(1, P, range(1), 0.0, 60.0, nonce=77)
    machine.lend(2, P, 0.0, 60.0, nonce=78)
    forged = [
        Written(1, EPOCH, 0, SPAN, [7], nonce=76),
        Complete(1, EPOCH, 16, 1, 5, nonce=78),
        Stopped(1, EPOCH, "forged"),
        Stopped(2, EPOCH, "forged", nonce=77),
    ]
    for message in forged:
        (effect,) = machine.received(P, message)
        assert isinstance(effect, receiver.Rejected)
        assert "nonce" in effect.why
    (effect,) = machine.heard(P, Pong(1, EPOCH))
    assert isinstance(effect, receiver.Rejected)
    assert len(machine) == 2
    for quarter in range(1, round(SILENCE / PING_INTERVAL)):
        list(machine.tick(quarter * PING_INTERVAL))
    (effect,) = machine.heard(P, Pong(2, EPOCH, nonce=77))
    assert isinstance(effect, receiver.Rejected)
    assert set(fenced_in(machine, SILENCE - PING_INTERVAL, 2 * PING_INTERVAL)) == {1, 2}, "the forger was heard"
    (effect,) = machine.received(P, Stopped(1, EPOCH, "done", nonce=77))
    assert isinstance(effect, receiver.Reclaimed)


def test_a_forged_release_refuses_no_prompt_and_stops_none() -> None:
    machine = Sender(LAYERS)
    assert [type(e) for e in machine.released(D, Release(1, EPOCH, nonce=5), 0.0)] == [sender.NotifyHolder]
    assert list(machine.open((D, 1), EPOCH, 9.0, nonce=77)) == []
    assert [type(e) for e in machine.released(D, Release(1, EPOCH, nonce=5), 0.0)] == [receiver.Rejected]
    assert len(machine) == 1
    assert [type(e) for e in machine.released(D, Release(1, EPOCH, nonce=77), 0.0)] == [
        sender.Failed,
        sender.NotifyHolder,
    ]


def test_forged_releases_evict_no_tombstone_and_are_bounded_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sender, "EARLY", 8)
    machine = Sender(LAYERS)
    assert list(machine.open((D, 1), EPOCH, 9.0, nonce=77)) == []
    assert [type(e) for e in machine.withdraw((D, 1), "aborted", 1.0)] == [sender.Failed, sender.NotifyHolder]
    for lease in range(2, 2000):
        assert list(machine.released(f"stranger-{lease % 7}", Release(lease, EPOCH, nonce=lease), 1.0))
    assert list(machine.open((D, 1), EPOCH, 9.0, nonce=77)) == [sender.Failed((D, 1), "aborted")]
    kept = [
        lease
        for lease in range(2, 2000)
        if list(machine.open((f"stranger-{lease % 7}", lease), EPOCH, 9.0, nonce=lease))
    ]
    assert kept == [*range(1992, 2000)]


def test_a_writer_of_a_fenced_lease_is_wanted_no_more() -> None:
    machine = Receiver(EPOCH, LAYERS)
    machine.grant(1, P, range(PAGES), 0.0, 9.0)
    assert machine.wants(1, P)
    assert not machine.wants(1, "other")
    list(machine.revoke(1, 0.0))
    assert machine.has(1, P)
    assert not machine.wants(1, P)


def test_a_word_about_another_life_of_the_holder_is_refused() -> None:
    machine = Receiver(EPOCH, LAYERS)
    machine.grant(1, P, range(2), 0.0, 9.0)
    for message in (Stopped(1, EPOCH - 1, "done"), Complete(1, EPOCH + 1, 32, 2, 5)):
        (effect,) = machine.received(P, message)
        assert isinstance(effect, receiver.Rejected)
        assert "stale epoch" in effect.why
    assert len(machine) == 1


def test_a_lease_is_fenced_when_it_has_expired_though_its_writer_speaks() -> None:
    machine = Receiver(EPOCH, LAYERS)
    machine.grant(1, P, range(2), 0.0, 1.0)
    assert not [e for e in machine.tick(0.9) if isinstance(e, receiver.Fenced)]
    machine.heard(P, Pong(1, EPOCH))
    assert [e for e in machine.tick(1.0) if isinstance(e, receiver.Fenced)] == [
        receiver.Fenced(1, "lease_expired", P)
    ]


def test_a_page_is_written_when_all_its_layers_are() -> None:
    machine = Receiver(EPOCH, LAYERS)
    machine.grant(1, P, range(2), 0.0, 9.0)
    list(machine.received(P, Written(1, EPOCH, 0, (0, 1), [7, 8])))
    machine.verified(1, P, 2)
    (effect,) = machine.received(P, Complete(1, EPOCH, 32, 2, 5))
    assert isinstance(effect, receiver.Reclaimed)
    assert "0 pages of 2" in effect.reason

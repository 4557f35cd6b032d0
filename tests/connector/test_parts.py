"""A lease of several parts: settled by all, failed by one, and back only when the last has ended."""

from hypothesis import given
from hypothesis import strategies as st

from kvasir_engine.connector import receiver, sender
from kvasir_engine.connector.notifications import Complete
from kvasir_engine.connector.rank_parts import GrantedParts, Part, PushedParts, StopParts
from kvasir_engine.connector.sender import Push

LEASE = 3
KEY = ("d", LEASE)
COMPLETE = Complete(LEASE, 7, 32, 2, 5)
PARTS: list[Part] = [(0, "p"), (0, "p-1"), (1, "p-2")]
FATES = ["settled", "stopped", "fenced", "wrong", "died"]


def events(part: Part, fate: str) -> list[receiver.Settled | receiver.Fenced | receiver.Reclaimed]:
    """What a rank reports of a part with this fate."""
    writer_ = part[1]
    match fate:
        case "settled":
            return [receiver.Settled(LEASE, COMPLETE, writer_)]
        case "stopped":
            return [receiver.Reclaimed(LEASE, "acknowledged", "the router left", writer=writer_)]
        case "wrong":
            return [receiver.Reclaimed(LEASE, "acknowledged", "a page", "kv_digest_mismatch", writer_)]
        case "died":
            return [receiver.Reclaimed(LEASE, "writer_died", "dead", writer=writer_)]
        case _:
            silent = receiver.Fenced(LEASE, "lease_writer_silent", writer_)
            return [silent, receiver.Reclaimed(LEASE, "writer_died", writer=writer_)]


@given(fates=st.lists(st.sampled_from(FATES), min_size=1, max_size=3), data=st.data())
def test_a_lease_ends_once_with_its_last_part_and_is_settled_only_by_all(
    fates: list[str], data: st.DataObject
) -> None:
    grants = GrantedParts()
    todo = {part: events(part, fate) for part, fate in zip(PARTS, fates, strict=False)}
    grants.grant(LEASE, todo)
    out: list[object] = []
    told = False  # of a failure, while others were left to stop
    while todo:
        part = data.draw(st.sampled_from(sorted(todo)))
        event = todo[part].pop(0)
        if not todo[part]:
            del todo[part]
        told = told or (bool(todo.keys() - {part}) and not isinstance(event, receiver.Settled))
        before = [each for each in out if isinstance(each, receiver.Settled | receiver.Reclaimed)]
        assert not before, "the pages came back while a part could still be written"
        out += grants.received(part[0], event)
    if set(fates) == {"settled"}:
        assert out == [receiver.Settled(LEASE, COMPLETE)]
        return
    end = out[-1]
    assert isinstance(end, receiver.Reclaimed)
    fenced = [each for each in out if isinstance(each, receiver.Fenced)]
    at_once = len(out) == 1  # nobody but the failed part was left: the request fails and the pages are back
    assert len(fenced) == (not at_once), "the request is failed as soon as a part has, once"
    assert all((each.code, each.reason) == (end.code, end.reason) for each in fenced)
    stops = [each for each in out if isinstance(each, StopParts)]
    assert stops == ([StopParts(LEASE, end.reason)] if told else [])


def test_parts_that_name_different_tokens_settle_nothing() -> None:
    grants = GrantedParts()
    grants.grant(LEASE, PARTS[:2])
    assert grants.received(0, receiver.Settled(LEASE, COMPLETE, "p")) == []
    other = Complete(LEASE, 7, 32, 2, 6)
    (end,) = grants.received(0, receiver.Settled(LEASE, other, "p-1"))
    assert isinstance(end, receiver.Reclaimed)
    assert "do not agree" in end.reason


def given_back(part: Part) -> receiver.Reclaimed:
    return receiver.Reclaimed(LEASE, "acknowledged", "read", writer=part[1])


def test_a_loan_is_back_with_the_last_of_its_parts_and_those_read_on_till_then() -> None:
    for count in (1, 2, 3):
        grants = GrantedParts()
        grants.lend(LEASE, PARTS[:count])
        out = [effect for part in PARTS[:count] for effect in grants.received(part[0], given_back(part))]
        assert out == [receiver.Reclaimed(LEASE, "acknowledged", "read")]


def test_a_loan_of_which_a_reader_is_dead_or_silent_is_taken_back_from_the_others() -> None:
    for fate in ("fenced", "died"):
        grants = GrantedParts()
        grants.lend(LEASE, PARTS)
        (lost, *_) = events(PARTS[1], fate)
        effects = grants.received(PARTS[1][0], lost)
        assert [type(each) for each in effects] == [receiver.Fenced, StopParts]
        ends = [*events(PARTS[1], fate)[1:], *(given_back(part) for part in (PARTS[0], PARTS[2]))]
        ranks = [PARTS[1][0]] * (len(ends) - 2) + [PARTS[0][0], PARTS[2][0]]
        out = [each for rank, end in zip(ranks, ends, strict=True) for each in grants.received(rank, end)]
        assert [type(each) for each in out] == [receiver.Reclaimed]


def test_a_rejected_message_is_reported_as_it_is() -> None:
    stray = receiver.Rejected("x", 9, "no such lease")
    assert GrantedParts().received(1, stray) == [stray]


def parts(count: int) -> list[Part]:
    """Ranks of ours, and the agents they write to."""
    return [(0, "d"), (1, "d"), (1, "d-1")][:count]


def done(part: Part, push: Push) -> sender.Done:
    return sender.Done((part[1], LEASE), push)


def test_pages_are_done_when_they_are_in_every_part_and_the_lease_when_all_are_complete() -> None:
    for count in (1, 2, 3):
        pushes, push, complete = PushedParts(), Push((1,), (2,)), Push(complete=COMPLETE)
        pushes.open(KEY, parts(count))
        pushes.push(KEY, push)
        pushes.push(KEY, complete)
        for each in (push, complete):
            out = [effect for part in parts(count) for effect in pushes.received(part[0], done(part, each))]
            assert out == [sender.Done(KEY, each)], "once, and with the last part"


def test_a_part_that_fails_stops_the_others_and_the_lease_fails_with_the_last_of_them() -> None:
    pushes, push = PushedParts(), Push((1,), (2,))
    pushes.open(KEY, parts(3))
    pushes.push(KEY, push)
    assert pushes.received(0, done(parts(1)[0], push)) == []
    assert pushes.received(1, sender.Failed(("d-1", LEASE), "dead")) == [StopParts(KEY, "dead")]
    assert pushes.received(1, sender.Failed(("d", LEASE), "withdrawn")) == []
    assert pushes.received(0, sender.Failed(("d", LEASE), "withdrawn")) == [sender.Failed(KEY, "dead")]


def test_a_part_that_was_complete_when_another_failed_is_over() -> None:
    pushes, complete = PushedParts(), Push(complete=COMPLETE)
    pushes.open(KEY, parts(2))
    pushes.push(KEY, complete)
    assert pushes.received(0, done(parts(1)[0], complete)) == []
    assert pushes.received(1, sender.Failed(("d", LEASE), "dead")) == [sender.Failed(KEY, "dead")]


def test_the_next_lease_of_the_same_holder_is_another() -> None:
    pushes, complete = PushedParts(), Push(complete=COMPLETE)
    for lease in (LEASE, LEASE + 1):
        key = ("d", lease)
        pushes.open(key, [(0, "d")])
        pushes.push(key, complete)
        assert pushes.received(0, sender.Done(key, complete)) == [sender.Done(key, complete)]

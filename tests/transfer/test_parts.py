"""A lease of several parts: settled by all, failed by one, and back only when the last has ended."""

from hypothesis import given
from hypothesis import strategies as st

from kvasir_engine.transfer import holder, writer
from kvasir_engine.transfer.messages import Complete
from kvasir_engine.transfer.parts import Grants, Part, Pushes, Stop
from kvasir_engine.transfer.writer import Push

LEASE = 3
KEY = ("d", LEASE)
COMPLETE = Complete(LEASE, 7, 32, 2, 5)
PARTS: list[Part] = [(0, "p"), (0, "p-1"), (1, "p-2")]
FATES = ["settled", "stopped", "fenced", "wrong", "died"]


def events(part: Part, fate: str) -> list[holder.Settled | holder.Fenced | holder.Reclaimed]:
    """What a rank reports of a part with this fate."""
    writer_ = part[1]
    match fate:
        case "settled":
            return [holder.Settled(LEASE, COMPLETE, writer_)]
        case "stopped":
            return [holder.Reclaimed(LEASE, "acknowledged", "the router left", writer=writer_)]
        case "wrong":
            return [holder.Reclaimed(LEASE, "acknowledged", "a page", "kv_digest_mismatch", writer_)]
        case "died":
            return [holder.Reclaimed(LEASE, "writer_died", "dead", writer=writer_)]
        case _:
            silent = holder.Fenced(LEASE, "lease_writer_silent", writer_)
            return [silent, holder.Reclaimed(LEASE, "writer_died", writer=writer_)]


@given(fates=st.lists(st.sampled_from(FATES), min_size=1, max_size=3), data=st.data())
def test_a_lease_ends_once_with_its_last_part_and_is_settled_only_by_all(
    fates: list[str], data: st.DataObject
) -> None:
    grants = Grants()
    todo = {part: events(part, fate) for part, fate in zip(PARTS, fates, strict=False)}
    grants.grant(LEASE, todo)
    out: list[object] = []
    told = False  # of a failure, while others were left to stop
    while todo:
        part = data.draw(st.sampled_from(sorted(todo)))
        event = todo[part].pop(0)
        if not todo[part]:
            del todo[part]
        told = told or (bool(todo.keys() - {part}) and not isinstance(event, holder.Settled))
        before = [each for each in out if isinstance(each, holder.Settled | holder.Reclaimed)]
        assert not before, "the pages came back while a part could still be written"
        out += grants.received(part[0], event)
    if set(fates) == {"settled"}:
        assert out == [holder.Settled(LEASE, COMPLETE)]
        return
    end = out[-1]
    assert isinstance(end, holder.Reclaimed)
    fenced = [each for each in out if isinstance(each, holder.Fenced)]
    at_once = len(out) == 1  # nobody but the failed part was left: the request fails and the pages are back
    assert len(fenced) == (not at_once), "the request is failed as soon as a part has, once"
    assert all((each.code, each.reason) == (end.code, end.reason) for each in fenced)
    stops = [each for each in out if isinstance(each, Stop)]
    assert stops == ([Stop(LEASE, end.reason)] if told else [])


def test_parts_that_name_different_tokens_settle_nothing() -> None:
    grants = Grants()
    grants.grant(LEASE, PARTS[:2])
    assert grants.received(0, holder.Settled(LEASE, COMPLETE, "p")) == []
    other = Complete(LEASE, 7, 32, 2, 6)
    (end,) = grants.received(0, holder.Settled(LEASE, other, "p-1"))
    assert isinstance(end, holder.Reclaimed)
    assert "do not agree" in end.reason


def given_back(part: Part) -> holder.Reclaimed:
    return holder.Reclaimed(LEASE, "acknowledged", "read", writer=part[1])


def test_a_loan_is_back_with_the_last_of_its_parts_and_those_read_on_till_then() -> None:
    for count in (1, 2, 3):
        grants = Grants()
        grants.lend(LEASE, PARTS[:count])
        out = [effect for part in PARTS[:count] for effect in grants.received(part[0], given_back(part))]
        assert out == [holder.Reclaimed(LEASE, "acknowledged", "read")]


def test_a_loan_of_which_a_reader_is_dead_or_silent_is_taken_back_from_the_others() -> None:
    for fate in ("fenced", "died"):
        grants = Grants()
        grants.lend(LEASE, PARTS)
        (lost, *_) = events(PARTS[1], fate)
        effects = grants.received(PARTS[1][0], lost)
        assert [type(each) for each in effects] == [holder.Fenced, Stop]
        ends = [*events(PARTS[1], fate)[1:], *(given_back(part) for part in (PARTS[0], PARTS[2]))]
        ranks = [PARTS[1][0]] * (len(ends) - 2) + [PARTS[0][0], PARTS[2][0]]
        out = [each for rank, end in zip(ranks, ends, strict=True) for each in grants.received(rank, end)]
        assert [type(each) for each in out] == [holder.Reclaimed]


def test_a_rejected_message_is_reported_as_it_is() -> None:
    stray = holder.Rejected("x", 9, "no such lease")
    assert Grants().received(1, stray) == [stray]


def parts(count: int) -> list[Part]:
    """Ranks of ours, and the agents they write to."""
    return [(0, "d"), (1, "d"), (1, "d-1")][:count]


def done(part: Part, push: Push) -> writer.Done:
    return writer.Done((part[1], LEASE), push)


def test_pages_are_done_when_they_are_in_every_part_and_the_lease_when_all_are_complete() -> None:
    for count in (1, 2, 3):
        pushes, push, complete = Pushes(), Push((1,), (2,)), Push(complete=COMPLETE)
        pushes.open(KEY, parts(count))
        pushes.push(KEY, push)
        pushes.push(KEY, complete)
        for each in (push, complete):
            out = [effect for part in parts(count) for effect in pushes.received(part[0], done(part, each))]
            assert out == [writer.Done(KEY, each)], "once, and with the last part"


def test_a_part_that_fails_stops_the_others_and_the_lease_fails_with_the_last_of_them() -> None:
    pushes, push = Pushes(), Push((1,), (2,))
    pushes.open(KEY, parts(3))
    pushes.push(KEY, push)
    assert pushes.received(0, done(parts(1)[0], push)) == []
    assert pushes.received(1, writer.Failed(("d-1", LEASE), "dead")) == [Stop(KEY, "dead")]
    assert pushes.received(1, writer.Failed(("d", LEASE), "withdrawn")) == []
    assert pushes.received(0, writer.Failed(("d", LEASE), "withdrawn")) == [writer.Failed(KEY, "dead")]


def test_a_part_that_was_complete_when_another_failed_is_over() -> None:
    pushes, complete = Pushes(), Push(complete=COMPLETE)
    pushes.open(KEY, parts(2))
    pushes.push(KEY, complete)
    assert pushes.received(0, done(parts(1)[0], complete)) == []
    assert pushes.received(1, writer.Failed(("d", LEASE), "dead")) == [writer.Failed(KEY, "dead")]


def test_the_next_lease_of_the_same_holder_is_another() -> None:
    pushes, complete = Pushes(), Push(complete=COMPLETE)
    for lease in (LEASE, LEASE + 1):
        key = ("d", lease)
        pushes.open(key, [(0, "d")])
        pushes.push(key, complete)
        assert pushes.received(0, writer.Done(key, complete)) == [writer.Done(key, complete)]

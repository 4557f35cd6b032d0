"""Both sides of the lease protocol against each other, over a network that delays and over peers that die.

The property is the one that keeps bytes right: once the holder has got its pages back, the writer is not writing
them and never will again under that lease.
"""

from collections import deque
from collections.abc import Iterable

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvasir_engine.transfer import holder, writer
from kvasir_engine.transfer.holder import Holder
from kvasir_engine.transfer.messages import AnyMessage, Complete, Release, Stopped
from kvasir_engine.transfer.writer import Push, Writer

EPOCH = 7
PAGES = 3
P, D = "prefill", "decode"
LEASES = st.integers(1, 4)


class Leases(RuleBasedStateMachine):
    """One writer and one holder. Messages of one direction stay in order; the two clocks drift apart."""

    def __init__(self) -> None:
        super().__init__()
        self.holder, self.writer = Holder(EPOCH), Writer()
        self.to_holder: deque[AnyMessage] = deque()
        self.to_writer: deque[AnyMessage] = deque()
        self.holder_now = self.writer_now = 0.0
        self.posted: dict[int, Push] = {}
        self.granted: set[int] = set()
        self.opened: dict[int, int] = {}  # lease -> pages pushed
        self.back: dict[int, str] = {}  # lease -> how the holder got its pages back
        self.failed: set[int] = set()  # leases the writer's engine was told to forget
        self.done: set[int] = set()

    def at_holder(self, effects: Iterable[holder.Effect]) -> None:
        for effect in effects:
            match effect:
                case holder.Ask(agent, message):
                    assert agent == P
                    self.to_writer.append(message)
                case holder.Settled(lease, complete):
                    self.gets_back(lease, "settled")
                    assert complete.pages == PAGES
                    assert self.opened[lease] == PAGES
                case holder.Reclaimed(lease, proof, _):
                    self.gets_back(lease, proof)

    def gets_back(self, lease: int, how: str) -> None:
        assert lease not in self.back, "pages came back twice"
        assert how == "writer_died" or lease not in self.posted, "pages came back under a write"
        self.back[lease] = how

    def at_writer(self, effects: Iterable[writer.Effect]) -> None:
        for effect in effects:
            match effect:
                case writer.Post((agent, lease), push):
                    assert agent == D
                    assert lease not in self.back, "a write into pages that were taken back"
                    assert lease not in self.posted
                    self.posted[lease] = push
                case writer.Tell(agent, message):
                    assert agent == D
                    self.to_holder.append(message)
                case writer.Failed((_, lease), _):
                    assert lease not in self.done
                    assert lease not in self.posted, "told to forget pages that are still read"
                    self.failed.add(lease)
                case writer.Done((_, lease), push):
                    if push.complete is not None:
                        assert lease not in self.failed
                        self.done.add(lease)

    @rule(lease=LEASES, seconds=st.sampled_from([1.0, 5.0]))
    def grant(self, lease: int, seconds: float) -> None:
        if lease not in self.granted:
            self.granted.add(lease)
            self.holder.grant(lease, P, PAGES, self.holder_now + seconds)

    @rule(lease=LEASES, seconds=st.sampled_from([1.0, 5.0]))
    def the_prompt_reaches_the_writer(self, lease: int, seconds: float) -> None:
        if lease in self.granted and lease not in self.opened:
            self.opened[lease] = 0
            self.at_writer(self.writer.open((D, lease), EPOCH, self.writer_now + seconds))

    @rule(lease=LEASES)
    def push(self, lease: int) -> None:
        if lease in self.opened and self.opened[lease] < PAGES and lease not in self.failed:
            self.opened[lease] += 1
            last = self.opened[lease] == PAGES
            complete = Complete(lease, EPOCH, PAGES * 16, PAGES, 5) if last else None
            self.at_writer(self.writer.push((D, lease), Push((1,), (1,), complete), self.writer_now))

    @precondition(lambda self: self.posted)
    @rule(data=st.data(), ok=st.sampled_from([True, True, True, False]))
    def a_write_ends(self, data: st.DataObject, ok: bool) -> None:
        lease = data.draw(st.sampled_from(sorted(self.posted)))
        push = self.posted.pop(lease)
        if ok and push.complete is not None:  # the notification rides on the write
            self.to_holder.append(push.complete)
        self.at_writer(self.writer.ended((D, lease), ok, self.writer_now))

    @precondition(lambda self: self.to_holder)
    @rule()
    def the_holder_hears(self) -> None:
        message = self.to_holder.popleft()
        assert isinstance(message, Complete | Stopped)
        self.at_holder(self.holder.received(P, message))

    @precondition(lambda self: self.to_writer)
    @rule()
    def the_writer_hears(self) -> None:
        message = self.to_writer.popleft()
        assert isinstance(message, Release)
        self.at_writer(self.writer.released(D, message, self.writer_now))

    @rule(lease=LEASES)
    def the_holder_aborts(self, lease: int) -> None:
        self.at_holder(self.holder.revoke(lease, self.holder_now))

    @rule(lease=LEASES)
    def the_writer_aborts(self, lease: int) -> None:
        self.at_writer(self.writer.withdraw((D, lease), "aborted", self.writer_now))

    @rule(seconds=st.sampled_from([0.3, 2.0]))
    def the_holders_clock_runs(self, seconds: float) -> None:
        self.holder_now += seconds
        self.at_holder(self.holder.tick(self.holder_now))

    @rule(seconds=st.sampled_from([0.3, 2.0]))
    def the_writers_clock_runs(self, seconds: float) -> None:
        self.writer_now += seconds
        self.at_writer(self.writer.tick(self.writer_now))

    @rule()
    def the_writer_dies_and_is_reborn(self) -> None:
        self.posted.clear()
        self.to_holder.clear()
        self.writer = Writer()
        self.at_holder(self.holder.died(P))
        self.to_writer.clear()
        self.failed |= set(self.opened)  # its requests died with it
        self.opened |= dict.fromkeys(self.granted, PAGES)

    @rule(
        epoch=st.sampled_from([EPOCH - 1, EPOCH]), agent=st.sampled_from([P, "stranger"]), lease=st.integers(1, 9)
    )
    def a_stray_message_is_refused_by_name(self, epoch: int, agent: str, lease: int) -> None:
        if epoch == EPOCH and agent == P:
            lease += 100  # never granted
        effects = list(self.holder.received(agent, Stopped(lease, epoch, "stray")))
        assert [type(effect) for effect in effects] == [holder.Rejected]

    @invariant()
    def a_lease_is_either_open_or_back(self) -> None:
        assert len(self.holder) == len(self.granted) - len(self.back)

    def teardown(self) -> None:
        """However it went, once everyone aborts and the network delivers, every lease ends on both sides."""
        for lease in self.granted:
            self.the_holder_aborts(lease)
        for _ in range(8):
            self.the_holders_clock_runs(2.0)
            while self.to_writer:
                self.the_writer_hears()
            for lease in sorted(self.posted):
                self.posted.pop(lease)
                self.at_writer(self.writer.ended((D, lease), False, self.writer_now))
            while self.to_holder:
                self.the_holder_hears()
        assert set(self.back) == self.granted
        assert len(self.holder) == 0
        assert len(self.writer) == 0


TestLeases = Leases.TestCase
TestLeases.settings = settings(max_examples=300, stateful_step_count=40, deadline=None)


def test_a_release_that_overtakes_the_prompt_refuses_it() -> None:
    machine = Writer()
    assert [type(e) for e in machine.released(D, Release(1, EPOCH), 0.0)] == [writer.Tell]
    assert [type(e) for e in machine.open((D, 1), EPOCH, 9.0)] == [writer.Failed]
    assert list(machine.open((D, 1), EPOCH + 1, 9.0)) == []  # another life of the holder


def test_a_timeout_alone_gives_no_page_back() -> None:
    machine = Holder(EPOCH)
    machine.grant(1, P, PAGES, 1.0)
    effects = [e for t in range(2, 500) for e in machine.tick(float(t))]
    assert {type(e) for e in effects} == {holder.Fenced, holder.Ask}
    assert len(machine) == machine.fenced == 1


def test_a_completion_of_the_wrong_pages_is_no_completion() -> None:
    machine = Holder(EPOCH)
    machine.grant(1, P, PAGES, 9.0)
    (effect,) = machine.received(P, Complete(1, EPOCH, 40, PAGES - 1, 5))
    assert isinstance(effect, holder.Reclaimed)
    assert "2 pages of 3" in effect.reason

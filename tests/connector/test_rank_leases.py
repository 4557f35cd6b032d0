"""Leases and loans between workers of one or several ranks: the product's threads over a wire that tests move.

Every rank takes its commands, hears its peers and reports in its own time; copies end in any order, well or not;
messages are late, lost or come twice; clocks drift; workers die, and strangers speak in their names. However it
goes, no byte is wrong in a page that is used, no page is used while somebody may write it, and all ends.
"""

import re
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest
from fake_nixl import Transfer, Wire
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from lease_world import LAYERS, Rank, SimulatedWorker

from kvasir_engine.connector import notifications, receiver, sender
from kvasir_engine.connector.layout import block_numbers, block_tokens
from kvasir_engine.connector.notifications import Complete, Stopped
from kvasir_engine.connector.receiver import PING_INTERVAL, SILENCE
from kvasir_engine.connector.sender import Push
from kvasir_engine.protocol import Lease, Loan

TOKENS, SECONDS = 16, 30.0
ROUNDS = 14
"""In which what is under way ends, and the link to a peer is measured too."""
BROKE = re.compile(r"\w+(Error|Exception): ")
"""What the executor says of an exception that it did not expect."""


def nonce_of(lease: int) -> int:
    return 5000 + lease


@dataclass
class Granted:
    """A lease or loan, and how it has gone at both ends."""

    lease: Lease | Loan
    holder: SimulatedWorker
    pages: list[int]  # the holder's
    writer: SimulatedWorker
    at: float  # when it was granted, by the holder's clock
    local: list[int] = field(default_factory=list)  # the writer's
    pushed: int | None = None  # halves of it; None: the prompt has not come
    back: str = ""  # how the holder got its pages back
    over: str = ""  # how it ended for the writer
    false: bool = False  # nobody granted what the prompt came with

    @property
    def loan(self) -> bool:
        return isinstance(self.lease, Loan)


class Leases(RuleBasedStateMachine):
    """A prefill and a decode worker; a worker's ranks die together, and are seen to die one by one."""

    @initialize(
        ranks=st.tuples(st.sampled_from([1, 1, 2, 4]), st.sampled_from([1, 1, 2])),
        sizes=st.sampled_from([(4, 4), (4, 4), (4, 8), (8, 4)]),
    )
    def start(self, ranks: tuple[int, int], sizes: tuple[int, int] = (4, 4)) -> None:
        self.wire, self.lives, self.clocks = Wire(), 0, [0.0, 0.0]
        self.granted: dict[int, Granted] = {}
        self.fillings = 1000
        self.ranks_, self.sizes, self.unseen = ranks, sizes, list[str]()
        self.prefill, self.decode = self.worker(0), self.worker(1)

    def worker(self, side: int) -> SimulatedWorker:
        self.lives += 1
        worker = SimulatedWorker(
            self.wire, self.lives, self.ranks_[side], self.sizes[side], lambda: self.clocks[side]
        )
        self.reuse(worker, worker.free)
        return worker

    def reuse(self, worker: SimulatedWorker, pages: list[int]) -> None:
        """The pages are its engine's again, which writes something else there at once."""
        self.fillings += 1
        worker.fill(pages, self.fillings, len(pages) * worker.size)

    @property
    def ranks(self) -> list[Rank]:
        return [*self.prefill.ranks, *self.decode.ranks]

    def draw(self, data: st.DataObject, some: list[Any]) -> Any:
        return data.draw(st.sampled_from(some))

    # -- the engines

    @rule(seconds=st.sampled_from([3.0, SECONDS]))
    def a_lease_is_granted(self, seconds: float) -> None:
        pages = self.decode.take(TOKENS)
        if not pages:
            return
        id_, to = len(self.granted) + 1, self.prefill.endpoint
        lease = Lease(id_, self.decode.epoch, pages, 0, seconds, to.agent, to.epoch, nonce=nonce_of(id_))
        self.granted[id_] = Granted(lease, self.decode, pages, self.prefill, self.clocks[1])
        self.decode.expose(pages)
        self.decode.connector.grant(lease, to, TOKENS)

    @rule(seconds=st.sampled_from([3.0, SECONDS]))
    def pages_are_lent(self, seconds: float) -> None:
        pages = self.decode.take(TOKENS)
        if not pages:
            return
        id_ = len(self.granted) + 1
        self.decode.fill(pages, id_, TOKENS)
        loan = Loan(id_, self.decode.epoch, pages, 0, seconds, nonce_of(id_))
        self.granted[id_] = Granted(loan, self.decode, pages, self.prefill, self.clocks[1])
        self.decode.connector.lend(loan, self.prefill.endpoint)

    def ready(self) -> list[int]:
        """Those whose prompt has not come to the writer, which still lives."""
        return [id_ for id_, each in self.granted.items() if each.pushed is None and each.writer is self.prefill]

    @precondition(lambda self: self.ready())
    @rule(data=st.data(), guessed=st.sampled_from([False] * 4 + [True]))
    def a_prompt_reaches_the_writer(self, data: st.DataObject, guessed: bool) -> None:
        """`guessed`: with another nonce than the lease's."""
        id_ = self.draw(data, self.ready())
        granted = self.granted[id_]
        if guessed:
            self.guess(granted)
        self.open(id_)

    def guess(self, granted: Granted) -> None:
        """The prompt comes with another nonce than the lease's."""
        granted.lease, granted.false = msgspec.structs.replace(granted.lease, nonce=9000), True

    def open(self, id_: int) -> None:
        granted = self.granted[id_]
        local = self.prefill.take(TOKENS)
        if not local:
            return
        granted.local, granted.pushed = local, 0
        to = granted.holder.endpoint
        if isinstance(granted.lease, Loan):
            self.prefill.expose(local)
            self.prefill.connector.read(to, granted.lease)
        else:
            self.prefill.fill(local, id_, TOKENS)
            self.prefill.connector.open(to, granted.lease)

    @rule(data=st.data(), stolen=st.booleans())
    def a_prompt_comes_with_a_lease_that_nobody_granted(self, data: st.DataObject, stolen: bool) -> None:
        """`stolen`: with the pages, but not the nonce, of one that was."""
        others = [each.pages for each in self.granted.values() if each.holder is self.decode and each.pages]
        pages = self.draw(data, others) if stolen and others else list(range(TOKENS // self.decode.size))
        self.open_false(pages)

    def open_false(self, pages: list[int]) -> None:
        """A prompt comes with a lease of these pages, which nobody granted."""
        id_, to = len(self.granted) + 1, self.prefill.endpoint
        lease = Lease(id_, self.decode.epoch, pages, 0, 3.0, to.agent, to.epoch, nonce=9000)
        self.granted[id_] = Granted(
            lease, self.decode, [], self.prefill, self.clocks[1], back="never granted", false=True
        )
        self.open(id_)

    def open_ones(self) -> list[int]:
        return [
            id_
            for id_, each in self.granted.items()
            if each.pushed is not None and each.pushed <= 2 and each.writer is self.prefill
        ]

    @precondition(lambda self: self.open_ones())
    @rule(data=st.data(), by_layer=st.booleans())
    def pages_are_pushed(self, data: st.DataObject, by_layer: bool) -> None:
        self.push(self.draw(data, self.open_ones()), by_layer)

    def push(self, id_: int, by_layer: bool = False) -> None:
        """The next half of it; after both, the completion."""
        granted, connector = self.granted[id_], self.prefill.connector
        assert granted.pushed is not None
        half, key = granted.pushed, (granted.holder.endpoint.agent, id_)
        granted.pushed += 1
        lease = granted.lease
        if half == 2:
            complete = Complete(id_, lease.epoch, TOKENS, TOKENS // self.block, 5, nonce=lease.nonce)
            last = Stopped(id_, lease.epoch, "read", lease.nonce) if granted.loan else complete
            connector.push(key, Push(complete=last))
            return
        local, remote = (
            block_numbers(pages, worker.size // self.block, half * self.half, (half + 1) * self.half)
            for pages, worker in [(granted.local, self.prefill), (lease.pages, granted.holder)]
        )
        if by_layer and not granted.loan:
            last_layer = Push(local, remote, LAYERS - 1, final=half == 1)
            on_layer = connector.push_layers([(key, last_layer)])
            for layer in range(LAYERS):
                on_layer(layer)
        else:
            connector.push(key, Push(local, remote, final=half == 1))

    @property
    def block(self) -> int:
        return block_tokens(*self.sizes)

    @property
    def half(self) -> int:
        return TOKENS // self.block // 2

    @precondition(lambda self: self.granted)
    @rule(data=st.data(), at_writer=st.booleans())
    def a_request_is_aborted(self, data: st.DataObject, at_writer: bool) -> None:
        id_ = self.draw(data, list(self.granted))
        granted = self.granted[id_]
        if not at_writer and granted.holder is self.decode and granted.pages:
            self.decode.connector.revoke(id_)
        elif at_writer and granted.writer is self.prefill and granted.pushed is not None:
            self.prefill.connector.withdraw((granted.holder.endpoint.agent, id_), "aborted")

    # -- the ranks

    @rule(data=st.data(), times=st.integers(1, 3))
    def a_rank_turns(self, data: st.DataObject, times: int) -> None:
        rank: Rank = self.draw(data, self.ranks)
        for _ in range(times):
            rank.thread.step(0.0)

    @rule(data=st.data(), late=st.booleans())
    def commands_are_late(self, data: st.DataObject, late: bool) -> None:
        self.draw(data, self.ranks).late = late

    @precondition(lambda self: any(self.wire.waiting(rank.agent) for rank in self.ranks))
    @rule(data=st.data(), many=st.booleans(), how=st.sampled_from(["", "", "", "", "", "twice", "lost"]))
    def messages_arrive(self, data: st.DataObject, many: bool, how: str) -> None:
        rank: Rank = self.draw(data, [rank for rank in self.ranks if self.wire.waiting(rank.agent)])
        by = self.draw(data, self.wire.waiting(rank.agent))
        if how == "lost":
            self.wire.lose(rank.agent, by)
        else:
            self.wire.deliver(rank.agent, by, twice=how == "twice")
            if many:
                self.wire.deliver_all(rank.agent)
        rank.thread.step(0.0)

    @precondition(lambda self: self.wire.transfers)
    @rule(
        data=st.data(), ok=st.sampled_from([True, True, True, False]), spoiled=st.sampled_from([False] * 7 + [True])
    )
    def a_copy_ends(self, data: st.DataObject, ok: bool, spoiled: bool) -> None:
        transfer: Transfer = self.draw(data, self.wire.transfers)
        self.wire.end(transfer, ok)
        if spoiled:
            self.wire.spoil(transfer)
        if data.draw(st.booleans()):
            self.rank_of(transfer.by).thread.step(0.0)

    def rank_of(self, agent: str) -> Rank:
        (rank,) = [rank for rank in self.ranks if rank.agent == agent]
        return rank

    @rule(data=st.data(), calls=st.integers(1, 2))
    def pages_are_digested(self, data: st.DataObject, calls: int) -> None:
        rank: Rank = self.draw(data, self.ranks)
        rank.thread.digesting.run(calls)
        rank.thread.step(0.0)

    @rule(data=st.data())
    def the_engine_learns(self, data: st.DataObject) -> None:
        self.learn(self.draw(data, self.ranks))

    def learn(self, rank: Rank) -> None:
        worker = self.prefill if rank in self.prefill.ranks else self.decode
        for event in worker.events(rank):
            self.note(event)

    # -- what it is told

    def note(self, event: Any) -> None:
        match event:
            case receiver.Settled(id_, complete):
                granted = self.gets_back(id_, "settled")
                assert not granted.loan
                assert (complete.tokens, complete.token) == (TOKENS, 5)
                assert granted.holder.holds(granted.pages, id_, TOKENS), "a wrong byte in a page that is settled"
                granted.holder.know(granted.pages, id_, TOKENS)
            case receiver.Reclaimed(id_, proof, reason):
                assert not BROKE.match(reason), reason
                granted = self.gets_back(id_, proof)
                self.reuse(granted.holder, granted.pages)
            case receiver.Fenced(id_, "lease_writer_silent"):
                granted = self.granted[id_]
                assert granted.holder is not self.decode or self.clocks[1] >= granted.at + SILENCE, (
                    "a writer is silent that nobody gave the time to answer"
                )
            case receiver.Rejected(_, _, why):
                assert not BROKE.match(why), why
            case sender.Failed((_, id_), reason):
                assert not BROKE.match(reason), reason
                self.ends(id_, reason)
            case sender.Done((_, id_), push):
                granted = self.granted[id_]
                assert not granted.false or not push.local, "pages came, or went, under what nobody granted"
                assert not granted.over, "something is done after the end"
                if push.complete is not None:
                    read = granted.loan and granted.pushed == 3
                    assert not read or granted.writer.holds(granted.local, id_, TOKENS), "a wrong byte was read"
                    self.ends(id_, "done")

    def gets_back(self, id_: int, how: str) -> Granted:
        granted = self.granted[id_]
        assert not granted.back, "pages came back twice"
        assert not granted.holder.touched() & set(granted.pages), "pages came back under a copy"
        granted.back = how
        granted.holder.free += granted.pages
        return granted

    def ends(self, id_: int, how: str) -> None:
        granted = self.granted[id_]
        assert not granted.over, "a lease ended twice for its writer"
        assert not granted.writer.touched() & set(granted.local), "pages were let go of under a copy"
        granted.over = how
        self.reuse(granted.writer, granted.local)
        granted.writer.free += granted.local

    @invariant()
    def nobody_writes_what_is_not_his(self) -> None:
        if not hasattr(self, "prefill"):
            return
        self.prefill.check()
        self.decode.check()
        for transfer in self.wire.transfers:
            ours = self.rank_of(transfer.by).pages_of(transfer.ours)
            theirs = self.rank_of(transfer.peer).pages_of(transfer.theirs)
            (granted,) = [
                each for each in self.granted.values() if not each.over and ours <= set(each.local) and each.writer
            ]
            assert granted.loan or not granted.false, "pages are written under a lease that nobody granted"
            assert granted.loan == (transfer.operation == "READ")
            assert theirs <= set(granted.pages), "a copy of pages that are another's"
            assert not granted.back, "a copy of pages that were taken back"

    # -- the world

    @rule(
        seconds=st.sampled_from([0.3, 0.3, 2.5]),
        whose=st.sampled_from([(0,), (1,), (0, 1)]),
        awake=st.booleans(),
        arrive=st.booleans(),
    )
    def time_passes(self, seconds: float, whose: tuple[int, ...], awake: bool, arrive: bool = False) -> None:
        """`awake`: who it passes for looks around meanwhile, and hears of what arrives."""
        for _ in range(round(seconds / PING_INTERVAL) if awake else 0):
            for side in whose:
                self.clocks[side] += PING_INTERVAL
                for rank in (self.prefill, self.decode)[side].ranks:
                    if arrive:
                        self.wire.deliver_all(rank.agent)
                    rank.thread.step(0.0)
        if not awake:
            for side in whose:
                self.clocks[side] += seconds

    @rule(data=st.data(), shown=st.booleans(), heard=st.booleans())
    def the_writer_dies(self, data: st.DataObject, shown: bool, heard: bool) -> None:
        if heard:
            self.hear_all(self.decode)
        self.kill(data, self.prefill, shown)
        for granted in self.granted.values():
            if granted.writer is self.prefill:
                granted.over = granted.over or "died"
        self.prefill = self.worker(0)

    @rule(data=st.data(), shown=st.booleans())
    def the_holder_dies(self, data: st.DataObject, shown: bool) -> None:
        self.kill(data, self.decode, shown)
        for granted in self.granted.values():
            if granted.holder is self.decode:
                granted.back = granted.back or "died"
        self.decode = self.worker(1)

    def kill(self, data: st.DataObject, worker: SimulatedWorker, shown: bool) -> None:
        for agent in data.draw(st.permutations(worker.agents)):
            self.wire.kill(agent, shown)
            self.unseen += [] if shown else [agent]

    @precondition(lambda self: self.unseen)
    @rule()
    def a_death_shows(self) -> None:
        self.wire.show(self.unseen.pop(0))

    @rule(
        data=st.data(),
        epoch=st.sampled_from([0, 1]),
        lease=st.integers(0, 9),
        nonce=st.sampled_from([0, 1, 7777]),
        stranger=st.booleans(),
    )
    def somebody_speaks_in_anothers_name(
        self, data: st.DataObject, epoch: int, lease: int, nonce: int, stranger: bool
    ) -> None:
        """Who knows everything but the nonce."""
        to, by = self.draw(data, [(self.prefill, self.decode), (self.decode, self.prefill)])
        rank = self.draw(data, to.ranks)
        life = self.decode.epoch - epoch
        pages = TOKENS // self.block
        message = self.draw(
            data,
            [
                Stopped(lease, life, "forged", nonce),
                Complete(lease, life, TOKENS, pages, 6, nonce=nonce),
                notifications.Written(lease, life, 0, (0, LAYERS), [7] * pages, nonce),
                notifications.Lent(lease, life, list(range(pages)), [7] * pages, nonce),
                notifications.Ping(lease, life, nonce),
                notifications.Pong(lease, life, nonce),
                notifications.Release(lease, life, nonce=nonce),
            ],
        )
        agent = "stranger" if stranger else self.draw(data, by.agents)
        self.wire.agents[rank.agent].arrived.append((agent, notifications.encode(message)))
        rank.thread.step(0.0)

    def hear_all(self, *workers: SimulatedWorker) -> None:
        for worker in workers:
            for rank in worker.ranks:
                self.wire.deliver_all(rank.agent)
                rank.thread.turn()
                self.learn(rank)

    def go_on(self) -> None:
        """All copies end, all messages arrive, and the engines learn."""
        for rank in self.ranks:
            rank.thread.turn()
        for transfer in list(self.wire.transfers):
            self.wire.end(transfer)
        self.hear_all(self.prefill, self.decode)
        self.nobody_writes_what_is_not_his()

    def teardown(self) -> None:
        """However it went, once all are aborted and all is delivered, every lease has ended on every rank."""
        if not hasattr(self, "decode"):
            return
        for agent in self.unseen:
            self.wire.show(agent)
        for rank in self.ranks:
            rank.late = False
        for id_, granted in self.granted.items():
            if granted.holder is self.decode and granted.pages:
                self.decode.connector.revoke(id_)
        for seconds in [0.3] * ROUNDS + [SECONDS, *[0.3] * 4]:
            self.clocks = [clock + seconds for clock in self.clocks]
            self.go_on()
        assert not [id_ for id_, each in self.granted.items() if not each.back], "a lease has not come back"
        hang = [id_ for id_, each in self.granted.items() if each.pushed is not None and not each.over]
        assert not hang, "a prompt hangs"
        assert {rank.agent: rank.thread.kept for rank in self.ranks if not rank.thread.quiet} == {}


TestLeases = Leases.TestCase
TestLeases.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)


class LongLeases(Leases):
    """The same, with more of it."""


TestLongLeases = pytest.mark.soak(LongLeases.TestCase)
TestLongLeases.settings = settings(max_examples=3000, stateful_step_count=100, deadline=None)


def world(ranks: tuple[int, int] = (1, 1), sizes: tuple[int, int] = (4, 4)) -> Leases:
    state = Leases()
    state.start(ranks, sizes)
    return state


@pytest.mark.parametrize("by_layer", [False, True])
@pytest.mark.parametrize("sizes", [(4, 4), (4, 8), (8, 4)])
@pytest.mark.parametrize("ranks", [(1, 1), (4, 1), (1, 2), (2, 2), (4, 2)])
def test_an_undisturbed_lease_is_settled_and_a_loan_read(
    ranks: tuple[int, int], sizes: tuple[int, int], by_layer: bool
) -> None:
    state = world(ranks, sizes)
    state.a_lease_is_granted(SECONDS)
    state.pages_are_lent(SECONDS)
    for id_ in (1, 2):
        state.open(id_)
        for _ in range(3):
            state.push(id_, by_layer)
    for _ in range(ROUNDS):
        state.go_on()
    assert [each.back for each in state.granted.values()] == ["settled", "acknowledged"]
    assert [each.over for each in state.granted.values()] == ["done", "done"]
    assert all(rank.thread.quiet for rank in state.ranks)


def test_a_loan_is_read_by_every_rank_that_lacks_it_and_a_lease_written_by_those_that_are_asked() -> None:
    state = world((4, 1))  # two heads: of two ranks of the writer that have one, one writes it
    state.pages_are_lent(SECONDS)
    state.a_lease_is_granted(SECONDS)
    writers = []
    for id_ in (1, 2):
        state.open(id_)
        state.push(id_)
        for _ in range(4):
            for rank in state.ranks:
                state.wire.deliver_all(rank.agent)
                rank.thread.turn()
        writers.append(sorted({state.rank_of(each.by).rank for each in state.wire.transfers}))
        state.go_on()
    assert writers == [[0, 1, 2, 3], [0, 2]]

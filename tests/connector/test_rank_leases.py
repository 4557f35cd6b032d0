"""Leases and loans between workers of several ranks: real machines on every rank, and the groups that join them.

Every rank takes its commands, hears its peers and reports in its own time. The property is that of one rank: once
the holder has its pages back, no rank of the writer writes them, or reads them under a loan, and none will.
"""

from collections import deque
from typing import Any

import msgspec
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from kvasir_engine.connector import notifications, receiver, sender
from kvasir_engine.connector.commands import AnyCommand, Grant, Lend, Open, Read, Revoke, Withdraw
from kvasir_engine.connector.kv_connector import KVConnector
from kvasir_engine.connector.layout import pairs
from kvasir_engine.connector.loan_reads import LoanReads
from kvasir_engine.connector.notifications import Complete, Stopped
from kvasir_engine.connector.open_leases import OpenLeases
from kvasir_engine.connector.receiver import Receiver
from kvasir_engine.connector.sender import Push, Sender
from kvasir_engine.connector.stats import TransferStats
from kvasir_engine.protocol import HEADS_APART, Address, Endpoint, Fingerprint, Lease, Loan, Region

PAGES, LAYERS, SECONDS = 2, 1, 30.0
SHAPE = Fingerprint("m", "", "float32", HEADS_APART, 16, LAYERS, 2, 16, "rope")
REGION = Region(0, 8, 64)


def nonce_of(lease: int) -> int:
    return 5000 + lease


class Rank:
    """A transfer thread that does one thing when it is told to."""

    def __init__(self, world: "Leases", endpoint: Endpoint, rank: int) -> None:
        self.world, self.rank, self.agent = world, rank, endpoint.agent_of(rank)
        self.endpoint = endpoint
        self.holder, self.writer = Receiver(endpoint.epoch, LAYERS), Sender(LAYERS)
        self.opened, self.reads = OpenLeases(), LoanReads()
        self.commands: deque[AnyCommand] = deque()
        self.pushes: deque[tuple[Any, Push]] = deque()
        self.inbox: deque[tuple[str, Any]] = deque()
        self.events: deque[Any] = deque()
        self.posted: list[tuple[Any, Push]] = []
        self.stats = TransferStats()

    def command(self, command: AnyCommand) -> None:
        self.commands.append(command)

    def push(self, key: Any, push: Push) -> None:
        self.pushes.append((key, push))

    def partners(self, peer: Endpoint, writes: bool) -> list[str]:
        ours, theirs = self.endpoint.fingerprint, peer.fingerprint
        if writes:
            return [peer.agent_of(a) for a, b in pairs(theirs, ours) if b == self.rank]
        return [peer.agent_of(b) for a, b in pairs(ours, theirs) if a == self.rank]

    def obey(self) -> None:
        while self.commands:
            match self.commands.popleft():
                case Grant(lease, to):
                    for agent in self.partners(to, writes=True):
                        if agent in self.world.living:
                            self.holder.grant(
                                lease.id, agent, lease.pages, self.world.now, lease.seconds, lease.nonce
                            )
                        else:
                            self.apply([receiver.Reclaimed(lease.id, "writer_died", "dead", writer=agent)])
                case Revoke(lease):
                    self.apply(self.holder.revoke(lease, self.world.now))
                case Open(to, lease):
                    self.open(to, lease, self.partners(to, writes=False), reading=False)
                case Lend(loan, to):
                    for agent in self.partners(to, writes=False):
                        if agent in self.world.living:
                            self.holder.lend(loan.id, agent, self.world.now, loan.seconds, loan.nonce)
                            lent = notifications.Lent(loan.id, loan.epoch, loan.pages, [0] * PAGES, loan.nonce)
                            self.send(agent, lent)
                        else:
                            self.apply([receiver.Reclaimed(loan.id, "writer_died", "dead", writer=agent)])
                case Read(to, loan):
                    self.open(to, loan, self.partners(to, writes=True), reading=True)
                case Withdraw(key, reason):
                    for part in self.opened.parts(key):
                        self.apply(self.writer.withdraw(part, reason, self.world.now))
        while self.pushes:
            key, push = self.pushes.popleft()
            for part in self.opened.parts(key):
                if not self.reads.waits(part, push):
                    self.apply(self.writer.push(part, push, self.world.now))

    def open(self, to: Endpoint, lease: Lease | Loan, agents: list[str], reading: bool) -> None:
        parts = [(agent, lease.id) for agent in agents]
        self.opened.open((to.agent, lease.id), parts)
        for part in parts:
            if reading:
                self.reads.open(part, lease.nonce)
            until = self.world.now + lease.seconds
            self.apply(self.writer.open(part, lease.epoch, until, reading, lease.nonce))

    def hear(self) -> None:
        if not self.inbox:
            return
        agent, message = self.inbox.popleft()
        self.obey()
        match message:
            case notifications.Release():
                self.apply(self.writer.released(agent, message, self.world.now))
            case notifications.Ping(lease, epoch, nonce):
                if self.holder.has(lease, agent):
                    self.apply(self.holder.heard(agent, message, self.world.now))
                self.send(agent, notifications.Pong(lease, epoch, nonce))
            case notifications.Pong():
                self.apply(self.holder.heard(agent, message, self.world.now))
            case notifications.Lent(lease, _, pages, digests, nonce):
                waiting = self.reads.lent((agent, lease), dict(zip(pages, digests, strict=True)), nonce)
                assert waiting is not None
                for push in waiting:
                    self.apply(self.writer.push((agent, lease), push, self.world.now))
            case _:
                self.apply(self.holder.received(agent, message, self.world.now))

    def tick(self) -> None:
        self.apply([*self.holder.tick(self.world.now), *self.writer.tick(self.world.now)])

    def end_write(self, place: int, ok: bool) -> None:
        key, push = self.posted.pop(place)
        if ok:
            self.world.moved.add((key[1], self.agent, key[0], push.local[0]))
            assert key not in self.reads or not self.reads.wrong(key, push, [0])
        self.apply(self.writer.ended(key, push, ok, self.world.now))

    def send(self, agent: str, message: Any) -> None:
        if agent in self.world.living:
            self.world.living[agent].inbox.append((self.agent, message))
        else:
            self.apply([*self.holder.died(agent), *self.writer.died(agent)])

    def apply(self, effects: Any) -> None:
        for effect in effects:
            match effect:
                case sender.Post(key, push):
                    assert key[1] not in self.world.back, "a rank writes, or reads, pages that were taken back"
                    self.posted.append((key, push))
                case sender.Announce((agent, lease), epoch, first, push, layers, nonce):
                    span = layers.start, layers.stop
                    written = notifications.Written(lease, epoch, first, span, [0] * len(push.local), nonce)
                    self.send(agent, written)
                case receiver.Verify(lease, agent, pages):
                    self.holder.verified(lease, agent, len(pages))
                case receiver.NotifyWriter(agent, message) | sender.NotifyHolder(agent, message):
                    self.send(agent, message)
                case _:
                    if isinstance(effect, sender.Failed) or (
                        isinstance(effect, sender.Done) and effect.push.complete is not None
                    ):
                        self.opened.close(effect.key)
                        self.reads.close(effect.key)
                    self.events.append(effect)


class Others:
    """What KVConnector knows of ranks 1 and up."""

    def __init__(self, ranks: list[Rank]) -> None:
        self.ranks = ranks
        self.addresses = ranks[0].endpoint.others
        self.stats = TransferStats()

    def command(self, command: AnyCommand) -> None:
        for rank in self.ranks:
            rank.command(command)

    def push(self, key: Any, push: Push) -> None:
        for rank in self.ranks:
            rank.push(key, push)


class Leases(RuleBasedStateMachine):
    """A writer and a holder of some ranks each. The writer's ranks die together, and are seen to die one by one."""

    @initialize(ranks=st.tuples(st.sampled_from([1, 2, 4]), st.sampled_from([1, 2])))
    def start(self, ranks: tuple[int, int]) -> None:
        self.now, self.lives = 0.0, 0
        self.living: dict[str, Rank] = {}
        self.back: dict[int, str] = {}
        self.over: dict[int, str] = {}  # leases by how they ended for the writer
        self.moved: set[tuple[int, str, str, int]] = set()  # lease, who did it, with whom, page
        self.granted: dict[int, Lease | Loan] = {}
        self.opened: dict[int, int] = {}
        self.sizes = ranks
        self.decode, self.holders = self.worker("d", ranks[1])
        self.prefill, self.writers = self.worker("p", ranks[0])

    def worker(self, name: str, size: int) -> tuple[list[Rank], KVConnector]:
        self.lives += 1
        name += str(self.lives)
        others = tuple(Address(f"{name}-{rank}", b"", REGION) for rank in range(1, size))
        shape = msgspec.structs.replace(SHAPE, tensor_parallel=size)
        endpoint = Endpoint(name, self.lives, b"", REGION, shape, others)
        ranks = [Rank(self, endpoint, rank) for rank in range(size)]
        self.living |= {rank.agent: rank for rank in ranks}
        group = KVConnector(ranks[0], Others(ranks[1:]) if others else None)  # type: ignore[arg-type]
        return ranks, group

    def agents(self, ranks: list[Rank]) -> list[str]:
        return [rank.agent for rank in ranks]

    def posted(self, lease: int) -> bool:
        return any(key[1] == lease for rank in self.prefill for key, _ in rank.posted)

    # -- the engines

    @rule(seconds=st.sampled_from([3.0, SECONDS]))
    def a_lease_is_granted(self, seconds: float) -> None:
        to = self.prefill[0].endpoint
        epoch = self.decode[0].endpoint.epoch
        id = len(self.granted)
        lease = Lease(id, epoch, [0, 1], 0, seconds, to.agent, to.epoch, nonce=nonce_of(id))
        self.granted[lease.id] = lease
        self.holders.grant(lease, self.prefill[0].endpoint, 0)

    @rule(seconds=st.sampled_from([3.0, SECONDS]))
    def pages_are_lent(self, seconds: float) -> None:
        id = len(self.granted)
        loan = Loan(id, self.decode[0].endpoint.epoch, [0, 1], 0, seconds, nonce_of(id))
        self.granted[loan.id] = loan
        self.holders.lend(loan, self.prefill[0].endpoint)

    @precondition(lambda self: self.granted.keys() - self.opened.keys())
    @rule(data=st.data())
    def a_prompt_reaches_the_writer(self, data: st.DataObject) -> None:
        lease = data.draw(st.sampled_from(sorted(self.granted.keys() - self.opened.keys())))
        self.opened[lease] = 0
        granted, to = self.granted[lease], self.decode[0].endpoint
        if isinstance(granted, Loan):
            self.writers.read(to, granted)
        else:
            self.writers.open(to, granted)

    @precondition(lambda self: any(pushed <= PAGES for pushed in self.opened.values()))
    @rule(data=st.data())
    def a_page_is_pushed(self, data: st.DataObject) -> None:
        lease = data.draw(st.sampled_from([each for each, pushed in self.opened.items() if pushed <= PAGES]))
        page, key = self.opened[lease], (self.decode[0].agent, lease)
        self.opened[lease] += 1
        if page < PAGES:
            self.writers.push(key, Push((page,), (page,)))
        else:
            epoch, lent = self.granted[lease].epoch, isinstance(self.granted[lease], Loan)
            nonce = nonce_of(lease)
            complete = Complete(lease, epoch, PAGES * 16, PAGES, 5, nonce=nonce)
            last = Stopped(lease, epoch, "read", nonce) if lent else complete
            self.writers.push(key, Push(complete=last))

    @precondition(lambda self: self.granted)
    @rule(data=st.data(), at_writer=st.booleans())
    def a_request_is_aborted(self, data: st.DataObject, at_writer: bool) -> None:
        lease = data.draw(st.sampled_from(sorted(self.granted)))
        if at_writer:
            self.writers.withdraw((self.decode[0].agent, lease), "aborted")
        else:
            self.holders.revoke(lease)

    # -- the ranks

    @rule(data=st.data(), times=st.integers(1, 4))
    def a_rank_turns(self, data: st.DataObject, times: int) -> None:
        rank = data.draw(st.sampled_from([*self.prefill, *self.decode]))
        rank.obey()
        for _ in range(times):
            rank.hear()

    @precondition(lambda self: any(rank.posted for rank in self.prefill))
    @rule(data=st.data(), ok=st.sampled_from([True, True, True, False]))
    def a_write_ends(self, data: st.DataObject, ok: bool) -> None:
        rank = data.draw(st.sampled_from([rank for rank in self.prefill if rank.posted]))
        rank.end_write(data.draw(st.integers(0, len(rank.posted) - 1)), ok)

    @rule(data=st.data())
    def the_engines_learn(self, data: st.DataObject) -> None:
        self.learn(data.draw(st.sampled_from([*self.prefill, *self.decode])))

    def learn(self, rank: Rank) -> None:
        group = self.holders if rank in self.decode else self.writers
        while rank.events:
            for event in group.received(rank.rank, rank.events.popleft()):
                self.note(event)

    def note(self, event: Any) -> None:
        match event:
            case receiver.Settled(lease):
                self.gets_back(lease, "settled")
                assert not isinstance(self.granted[lease], Loan)
                self.check_moved(lease)
            case receiver.Reclaimed(lease, proof):
                self.gets_back(lease, proof)
            case sender.Failed((_, lease)):
                self.ends(lease, "failed")
            case sender.Done((_, lease), push) if push.complete is not None:
                self.ends(lease, "done")
                self.check_moved(lease)

    def check_moved(self, lease: int) -> None:
        """Settled leases were written, and ended loans read, by the prefill worker that lives: in every part."""
        ours, theirs = self.prefill[0].endpoint.fingerprint, self.decode[0].endpoint.fingerprint
        if isinstance(self.granted[lease], Loan):
            parts = {(to, from_) for from_, to in pairs(theirs, ours)}
        else:
            parts = set(pairs(ours, theirs))
        for by, with_ in parts:
            for page in range(PAGES):
                moved = (lease, self.prefill[by].agent, self.decode[with_].agent, page)
                assert moved in self.moved, "it has ended, and a part was not moved"

    def gets_back(self, lease: int, how: str) -> None:
        assert lease not in self.back, "pages came back twice"
        assert not self.posted(lease), "pages came back under a write"
        self.back[lease] = how

    def ends(self, lease: int, how: str) -> None:
        assert lease not in self.over, "a lease ended twice for its writer"
        assert not self.posted(lease), "pages were let go of while a write reads them"
        self.over[lease] = how

    @rule(seconds=st.sampled_from([0.3, 2.5]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        for rank in (*self.prefill, *self.decode):
            rank.tick()

    @rule(data=st.data())
    def the_writer_dies(self, data: st.DataObject) -> None:
        for rank in self.decode:  # what it had sent has come
            while rank.inbox or rank.events:
                rank.hear()
                self.learn(rank)
        dead = self.agents(self.prefill)
        for agent in dead:
            del self.living[agent]
        self.over |= {lease: "died" for lease in self.opened if lease not in self.over}
        self.opened |= dict.fromkeys(self.granted, PAGES + 1)
        self.prefill, self.writers = self.worker("p", self.sizes[0])
        for agent in data.draw(st.permutations(dead)):
            for rank in self.decode:
                rank.apply(rank.holder.died(agent))

    def teardown(self) -> None:
        """However it went, once all are aborted and all is delivered, every lease has ended on every rank."""
        if not hasattr(self, "decode"):
            return
        for lease in self.granted:
            self.holders.revoke(lease)
        for _ in range(12):
            self.time_passes(0.3)
            for rank in (*self.prefill, *self.decode):
                rank.obey()
                while rank.inbox:
                    rank.hear()
                while rank.posted:
                    rank.end_write(0, True)
                self.learn(rank)
        assert self.back.keys() == self.granted.keys()
        assert self.opened.keys() - self.over.keys() <= {each for each in self.opened if self.opened[each] > PAGES}
        assert not any(len(rank.holder) or len(rank.writer) for rank in (*self.prefill, *self.decode))


TestLeases = Leases.TestCase
TestLeases.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)


def test_a_loan_is_read_by_every_rank_that_lacks_it_and_a_lease_written_by_those_that_are_asked() -> None:
    world = Leases()
    world.start((4, 1))  # two heads: of two ranks of the writer that have one, one writes it
    to = world.decode[0].endpoint
    loan, lease = Loan(1, to.epoch, [0], 0, SECONDS), Lease(2, to.epoch, [0], 0, SECONDS, "w", 1)
    for key, ranks in [(world.writers.read(to, loan), [0, 1, 2, 3]), (world.writers.open(to, lease), [0, 2])]:
        failed = sender.Failed(key, "withdrawn")
        ends = [world.writers.received(rank, failed) for rank in ranks]
        assert ends[-1] == [failed]
        assert all(failed not in each for each in ends[:-1])

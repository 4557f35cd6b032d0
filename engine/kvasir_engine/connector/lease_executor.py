"""What a transfer thread does: carries out commands and what the lease machines decide, on one NIXL agent.

Everything here runs on that thread. Of a peer's ranks a rank grants to, writes to, lends to and reads from those
that it has a part of the KV in common with; events name them.
"""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable

import msgspec

from kvasir_engine import faults
from kvasir_engine.connector import notifications, pending_loans, receiver, sender
from kvasir_engine.connector.commands import AnyCommand, Grant, Lend, Open, Read, Revoke, Withdraw
from kvasir_engine.connector.digest_thread import DigestThread
from kvasir_engine.connector.early_messages import EarlyMessages
from kvasir_engine.connector.fabric_rate import ANY_FABRIC, FabricRate
from kvasir_engine.connector.inflight_copies import EndedCopy, InflightCopies, LostPeer
from kvasir_engine.connector.layout import block_numbers, block_tokens
from kvasir_engine.connector.link_probe import LinkProbes
from kvasir_engine.connector.loan_reads import LoanReads
from kvasir_engine.connector.nixl_agent import NixlAgent, PeerDied, PeerRefused
from kvasir_engine.connector.notifications import AnyMessage, Complete, Lent, Ping, Pong, Release, Written
from kvasir_engine.connector.open_leases import OpenLeases
from kvasir_engine.connector.peer_ranks import PeerRanks
from kvasir_engine.connector.pending_loans import PendingLoans
from kvasir_engine.connector.rank_parts import Event
from kvasir_engine.connector.receiver import Receiver
from kvasir_engine.connector.sender import Key, Push, Sender
from kvasir_engine.connector.stats import TransferStats
from kvasir_engine.connector.unconfirmed_leases import UnconfirmedLeases
from kvasir_engine.protocol import BadFrame, Endpoint, Lease, Loan

log = logging.getLogger("transfer")

DIED = "the worker at the other end died"

_Effect = Event | receiver.NotifyWriter | receiver.Verify | sender.Post | sender.Announce | sender.NotifyHolder
_Effects = Iterable[_Effect]


class LeaseExecutor:
    """The leases and loans of one rank, on both sides. `emit` gets the events; `clock` says the time."""

    def __init__(
        self,
        agent: NixlAgent,
        rank: int,
        digests: DigestThread,
        verifies: bool,
        stats: TransferStats,
        emit: Callable[[Event], None],
        fabric: FabricRate = ANY_FABRIC,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._agent = agent
        self._clock = clock
        self._rank = rank
        self._digests = digests
        self._stats = stats
        self._emit = emit
        self._endpoint = agent.endpoint
        self._layers = layers = agent.endpoint.fingerprint.layers
        self._receiver = Receiver(agent.endpoint.epoch, layers, verifies)
        self._sender = Sender(layers)
        self._ranks = PeerRanks(agent, rank, lambda peer: self._receiver.knows(peer) or self._sender.knows(peer))
        self.probes = LinkProbes(agent, fabric, self._sender.together, clock)
        self._copies = InflightCopies(agent, digests, stats, None if faults.ON else self.probes, clock)
        self._open_leases = OpenLeases()
        self._reads = LoanReads()
        self._unconfirmed = UnconfirmedLeases()
        self._pending_loans = PendingLoans(digests, layers)
        self._early = EarlyMessages()
        self._digested: dict[tuple[Key, Push], list[int]] = {}  # of writes that have ended

    @property
    def busy(self) -> bool:
        """Whether a lease or a loan is open on either side."""
        return bool(len(self._receiver) or len(self._sender))

    def execute(self, command: AnyCommand) -> None:
        """Carry out a command."""
        try:
            self._apply(self._effects_of(command, self._clock()))
        except Exception as error:
            log.exception("a command broke")
            failed = _failed(command, f"{type(error).__name__}: {error}")
            if failed is None:
                raise
            self._apply(failed)

    def push(self, key: Key, push: Push, computed: float) -> None:
        """Copy pages, whose last layer was computed at the moment `computed`, in all parts of a lease."""
        if push.final:
            self._open_leases.computed(key, computed)
        for part in self._open_leases.parts(key):
            if not self._reads.waits(part, push) and not self._unconfirmed.waits(part, push):
                self._apply(self._sender.push(part, push, self._clock()))

    def turn(self, arrived: list[tuple[str, bytes]]) -> bool:
        """Take what has `arrived` from peers, begin copies, see what has ended. Whether there was anything."""
        for agent, data in [*self._early.granted(), *arrived]:
            try:
                self._apply(self._receive(agent, data, self._clock()))
            except Exception as error:  # a peer's message is not to end what serves the others
                log.exception("a notification broke agent=%s", agent)
                self._emit(receiver.Rejected(agent[:256], 0, f"{type(error).__name__}: {error}"[:1024]))
        progressed = bool(arrived) or self._copies.waiting
        for news in self._copies.advance():
            if isinstance(news, LostPeer):
                self._apply(self._died(news.agent))
            else:
                progressed = True
                self._apply(self._ended(news))
        for lent in self._pending_loans.done():
            self._apply(self._lent(lent))
        now = self._clock()
        for agent, ping in self._unconfirmed.due(now):
            self._apply(self._send(agent, ping))
        self._apply([*self._receiver.tick(now), *self._sender.tick(now)])
        return progressed

    # -- commands

    def _effects_of(self, command: AnyCommand, now: float) -> _Effects:
        match command:
            case Grant(lease, to, tokens):
                self._early.grant(lease.id)
                return self._grant(lease, to, tokens, now)
            case Revoke(granted):
                return self._receiver.revoke(granted, now)
            case Open(to, lease):
                return self._open(to, lease, now)
            case Withdraw(key, reason):
                parts = self._open_leases.parts(key)
                return [effect for part in parts for effect in self._sender.withdraw(part, reason, now)]
            case Lend(loan, to):
                self._early.grant(loan.id)
                return self._lend(loan, to, now)
            case Read(to, loan):
                return self._open(to, loan, now, reading=True)

    def _grant(self, lease: Lease, to: Endpoint, tokens: int, now: float) -> _Effects:
        size = self._endpoint.fingerprint.page_size
        block = block_tokens(size, to.fingerprint.page_size)
        count = -(-tokens // block) if tokens else len(lease.pages) * size // block
        blocks = block_numbers(lease.pages, size // block, 0, count)
        self._digests.forget(lease.pages, None)
        effects: list[_Effect] = []
        for rank in self._ranks.partners(to, incoming=True):
            refused = self._connect(lease.id, to, rank)
            if refused is None:
                self._receiver.grant(lease.id, to.agent_of(rank), blocks, now, lease.seconds, lease.nonce)
            else:
                effects.append(refused)
        return effects

    def _lend(self, loan: Loan, to: Endpoint, now: float) -> _Effects:
        size = self._endpoint.fingerprint.page_size
        a_page = size // block_tokens(size, to.fingerprint.page_size)
        blocks = block_numbers(loan.pages, a_page, 0, len(loan.pages) * a_page)
        effects: list[_Effect] = []
        for rank in self._ranks.partners(to, incoming=False):
            agent, refused = to.agent_of(rank), self._connect(loan.id, to, rank)
            if refused is None:
                self._receiver.lend(loan.id, agent, now, loan.seconds, loan.nonce)
                self._pending_loans.begin(loan, agent, blocks, self._agent.sent(agent))
            else:
                effects.append(refused)
        return effects

    def _connect(self, lease: int, to: Endpoint, rank: int) -> receiver.Reclaimed | None:
        """Why a part of a lease or loan of ours ends at once."""
        try:
            self._ranks.connect(to, rank)
        except PeerDied:
            return receiver.Reclaimed(lease, "writer_died", DIED, writer=to.agent_of(rank))
        except PeerRefused as refused:
            return receiver.Reclaimed(lease, "never_connected", str(refused), writer=to.agent_of(rank))
        return None

    def _open(self, to: Endpoint, lease: Lease | Loan, now: float, reading: bool = False) -> _Effects:
        """Begin to write, or to read, under a lease or loan of another worker."""
        parts = {rank: (to.agent_of(rank), lease.id) for rank in self._ranks.partners(to, incoming=reading)}
        self._open_leases.open((to.agent, lease.id), list(parts.values()))
        deadline = now + lease.seconds
        effects: list[_Effect] = []
        for rank, part in parts.items():
            if reading:
                self._reads.open(part, lease.nonce)
            try:
                self._ranks.connect(to, rank)
                opened = list(self._sender.open(part, lease.epoch, deadline, reading, lease.nonce))
                effects += opened
                if not opened and not reading:
                    self._unconfirmed.open(part, Ping(lease.id, lease.epoch, lease.nonce))
            except PeerDied:
                effects.append(sender.Failed(part, DIED))
            except PeerRefused as refused:
                effects.append(sender.Failed(part, str(refused)))
        return effects

    # -- what peers say

    def _receive(self, agent: str, data: bytes, now: float) -> _Effects:
        try:
            message = notifications.decode(data)
        except BadFrame as error:
            log.warning("unreadable notification agent=%s error=%s", agent, error)
            return [receiver.Rejected(agent[:256], 0, f"unreadable: {error}"[:1024])]
        match message:
            case _ if self._rank and message.epoch == self._endpoint.epoch and self._early.is_early(message.lease):
                if self._early.keep(message.lease, agent, data):
                    return []
                return [receiver.Rejected(agent[:256], message.lease, "too many of leases that are not granted")]
            case Release(sender=sender):
                if sender is not None and sender.agent == agent:
                    try:
                        self._agent.meet_stranger(sender)
                    except (PeerDied, PeerRefused) as error:
                        log.warning("cannot answer agent=%s reason=%s", agent, error)
                return self._sender.released(agent, message, now)
            case Ping():
                return self._pinged(agent, message, now)
            case Pong():
                return self._ponged(agent, message, now)
            case Lent(lease, _, blocks, digests):
                lent = dict(zip(blocks, digests, strict=True))
                waiting = self._reads.lent((agent, lease), lent, message.nonce, self._agent.named(agent))
                if waiting is None:
                    return [receiver.Rejected(agent, lease, "wrong nonce: it is not from who lends")]
                return [effect for push in waiting for effect in self._sender.push((agent, lease), push, now)]
            case _:
                return self._receiver.received(agent, message)

    def _pinged(self, agent: str, ping: Ping, now: float) -> _Effects:
        """Who writes, or reads, under a lease of ours asks whether it is one; a holder asks whether we live."""
        if ping.lease and ping.epoch == self._endpoint.epoch:
            effects = list(self._receiver.heard(agent, ping))
            if effects or not self._agent.knows(agent):
                return effects or [receiver.Rejected(agent, ping.lease, "no lease was granted to it")]
            if not self._receiver.wants(ping.lease, agent):
                return self._send(agent, Release(ping.lease, ping.epoch, nonce=ping.nonce))
        elif self._sender.nonce_of((agent, ping.lease)) not in (None, ping.nonce):
            return [receiver.Rejected(agent, ping.lease, "wrong nonce: it is not from who granted the lease")]
        # A writer that the prompt has not reached yet does not know who pings it.
        return self._send(agent, Pong(ping.lease, ping.epoch, ping.nonce)) if self._agent.knows(agent) else []

    def _ponged(self, agent: str, pong: Pong, now: float) -> _Effects:
        """A writer of ours lives, or a holder knows the lease that we have."""
        key = agent, pong.lease
        nonce = self._sender.nonce_of(key)
        if not self._agent.knows(agent) or (nonce is not None and nonce != pong.nonce):
            return [receiver.Rejected(agent, pong.lease, "it answers what nobody asked")]
        if nonce is None:
            return self._receiver.heard(agent, pong)
        waiting = self._unconfirmed.confirm(key)
        return [effect for push in waiting for effect in self._sender.push(key, push, now)]

    def _send(self, agent: str, message: AnyMessage) -> _Effects:
        try:
            self._agent.notify(agent, notifications.encode(message))
        except PeerDied:
            return self._died(agent)
        return []

    def _died(self, agent: str) -> _Effects:
        """The transport's word that the peer is gone: a proof for the leases of both sides.

        It shows at each of several messages and copies, and is one death.
        """
        if self._agent.knows(agent):
            log.warning("peer died agent=%s", agent)
            self._stats.peers_died += 1
        self._copies.died(agent)
        self._agent.forget(agent)
        return [*self._receiver.died(agent), *self._sender.died(agent)]

    # -- copies

    def _ended(self, ended: EndedCopy) -> _Effects:
        ok = ended.ok
        if ended.reads:
            ok = ok and self._was_read(ended)
        else:
            self._digests.keep(ended.digests, ended.push.local)
            self._digested[ended.key, ended.push] = ended.digests.values
        return self._sender.ended(ended.key, ended.push, ok, self._clock())

    def _was_read(self, read: EndedCopy) -> bool:
        """Whether a read brought what was lent."""
        wrong = self._reads.wrong(read.key, read.push, read.digests.values)
        if wrong:
            self._stats.digest_failures += wrong
            log.error("digests of a read differ agent=%s lease=%d wrong=%d", *read.key, wrong)
        else:
            self._digests.keep(read.digests, read.push.local)
            cut = self._agent.received(read.key[0])
            self._stats.read_bytes += len(read.push.local) * cut.moved_bytes() if cut is not None else 0
            faults.hit("prefill.read_done")
        return not wrong

    def _lent(self, lent: pending_loans.DigestedLoan) -> _Effects:
        """Tell the reader what it will have read, if it still may."""
        loan, blocks = lent.loan, lent.blocks
        if not self._receiver.has(loan.id, lent.reader):
            return []
        self._digests.keep(lent.digests, blocks)
        faults.hit("decode.loan_digested")
        return self._send(lent.reader, Lent(loan.id, loan.epoch, list(blocks), lent.digests.values, loan.nonce))

    def _verify(self, verify: receiver.Verify) -> None:
        lease, agent, total = verify.lease, verify.writer, len(verify.pages)
        digests = self._digests.here(verify.pages, verify.layers, self._agent.received(agent))
        came = zip(verify.pages, digests.values, verify.digests, strict=True)
        right = [page for page, ours, theirs in came if ours == theirs]
        self._digests.keep(digests, right)
        self._receiver.verified(lease, agent, len(right))
        if len(right) != total:
            self._stats.digest_failures += total - len(right)
            log.error("digests differ lease=%d pages=%d wrong=%d", lease, total, total - len(right))

    # -- what the machines decide

    def _apply(self, effects: _Effects) -> None:
        """Carry out effects in order, and what follows from them after all of them.

        A death may show at the first of several messages. What was decided before it is told of before it.
        """
        waiting = deque(effects)
        while waiting:
            waiting.extend(self._carry_out(waiting.popleft()))

    def _carry_out(self, effect: _Effect) -> _Effects:
        """Do one thing that a machine decided. What follows from it."""
        match effect:
            case sender.Post():
                self._copies.add(effect)
            case sender.Announce((agent, lease) as key, epoch, first, push, layers, nonce):
                digests = self._digested.pop((key, push))
                return self._send(agent, Written(lease, epoch, first, (layers.start, layers.stop), digests, nonce))
            case receiver.Verify():
                faults.hit("decode.pages_written")
                self._verify(effect)
            case sender.NotifyHolder(agent, Complete() as complete):
                faults.hit("prefill.all_written")
                follows = self._send(agent, complete)
                faults.hit("prefill.completed")
                return follows
            case receiver.NotifyWriter(agent, Release() as release):
                return self._send(agent, msgspec.structs.replace(release, sender=self._endpoint.address(0)))
            case receiver.NotifyWriter(agent, message) | sender.NotifyHolder(agent, message):
                return self._send(agent, message)
            case _:
                self._note(effect)
                self._emit(effect)
        return []

    def _note(self, event: Event) -> None:
        match event:
            case sender.Failed(part, _):
                self._close(part)
            case sender.Done(part, push) if push.complete is not None:
                self._close(part)
            case sender.Done(part, push) if push.final:
                self._stats.exposed_seconds += time.perf_counter() - self._open_leases.computed_at(part)
                self._stats.handoffs += 1
            case receiver.Settled(_, complete, agent):
                cut = self._agent.received(agent)
                self._stats.received_bytes += complete.pages * cut.moved_bytes() if cut is not None else 0

    def _close(self, part: Key) -> None:
        """A part of another worker's lease has ended."""
        for each in [each for each in self._digested if each[0] == part]:
            del self._digested[each]
        self._reads.close(part)
        self._unconfirmed.close(part)
        self._open_leases.close(part)


def _failed(command: AnyCommand, why: str) -> list[Event] | None:
    """What ends by a command that broke before anybody was told of it; None where something may go on."""
    match command:
        case Open(to, lease):
            return [sender.Failed((to.agent, lease.id), why)]
        case Read(to, loan):
            return [sender.Failed((to.agent, loan.id), why)]
        case _:
            return None

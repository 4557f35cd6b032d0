"""The engine: requests in, one step at a time, tokens out. Single-threaded, no clock of its own, no socket.

A request is a `Job` around a scheduler's `Sequence`. The colocated path is: waiting, running, gone. With a handoff,
the prefill side's job ends as soon as its last push is queued; the decode side's job waits in `leased` until the
lease settles, then runs as any other.
"""

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from kvasir_engine import faults
from kvasir_engine.connector import receiver, sender
from kvasir_engine.connector.kv_connector import KVConnector
from kvasir_engine.connector.notifications import Complete
from kvasir_engine.connector.rank_parts import Event
from kvasir_engine.core.batching import batch_of
from kvasir_engine.core.cached_page_checks import CachedPageChecks
from kvasir_engine.core.grammar_requests import GrammarRequests
from kvasir_engine.core.grammar_service import GrammarService
from kvasir_engine.core.inflight_steps import InflightStep, InflightSteps
from kvasir_engine.core.kv_cache_manager import KVCacheManager
from kvasir_engine.core.leases import Leases, RefusedCompletion
from kvasir_engine.core.output_processor import OutputProcessor
from kvasir_engine.core.pushes import Pushes
from kvasir_engine.core.readback import Readback
from kvasir_engine.core.request_finisher import RequestFinisher
from kvasir_engine.core.request_validation import fault_of_endpoint, fault_of_lease
from kvasir_engine.core.requests import Job, JobId, Requests, Stats
from kvasir_engine.core.scheduler import Limits, Plan, schedule
from kvasir_engine.core.sequence import Sequence
from kvasir_engine.core.waiting_queue import QueueLimits, WaitingQueue
from kvasir_engine.kv.pages import OutOfPages, Owner
from kvasir_engine.protocol import Delta, Endpoint, Lease, Leased, Load, Reserve, Role, Submit
from kvasir_engine.sampling.sampler import Sampled, SampleRequest
from kvasir_engine.transport_policy import ANY_TRANSPORT, TransportPolicy

if TYPE_CHECKING:
    from kvasir_engine.executor.model_runner import ModelRunner

log = logging.getLogger("engine")

NO_LIMITS = QueueLimits()


class Engine:
    """One worker's requests. `connector` is None where KV never moves.

    `overlap`: a step is prepared and launched while the one before it runs, so results come one step late.
    """

    def __init__(
        self,
        runner: "ModelRunner",
        role: Role,
        limits: Limits,
        max_length: int,
        epoch: int,
        connector: KVConnector | None,
        queue: QueueLimits = NO_LIMITS,
        clock: Callable[[], float] = time.monotonic,
        overlap: bool = False,
        policy: TransportPolicy = ANY_TRANSPORT,
        grammars: GrammarService | None = None,
        checks: CachedPageChecks | None = None,
    ) -> None:
        self.runner = runner
        self.role = role
        self.limits = limits
        self.max_length = max_length
        self.epoch = epoch
        self.connector = connector
        self.overlap = overlap
        self.policy = policy
        self.checks = checks
        self.cache = KVCacheManager(runner.pool.pages, limits.page_size, runner.copy_page)
        if checks is not None:
            self.cache.tree.note_entries()
        self.stats = Stats()
        self.readback = Readback(self.cache)
        self.requests = Requests(runner.vocab, max_length, queue, self.stats, clock, grammars is not None)
        self.leases = Leases(self.cache, connector, self.readback, epoch, self.stats)
        self.pushes = Pushes(self.cache, connector, runner.config.layers, self.stats)
        self.inflight = InflightSteps(self.cache)
        self.finisher = RequestFinisher(
            self.requests, self.cache, self.inflight, self.pushes, self.leases, self.readback, connector
        )
        self.tokens = OutputProcessor(self.requests, self.pushes, self.finisher, self.stats, max_length)
        self.grammars = GrammarRequests(grammars, self.requests, self.finisher, self.stats, self._enqueue)
        self._ended: float | None = None  # when the device had no step any more, though sequences run
        self.prefill_rate = 0.0  # tokens a second of the steps that prefill, as measured by whoever takes the steps

    @property
    def jobs(self) -> dict[JobId, Job]:
        """The requests that have not ended."""
        return self.requests.jobs

    @property
    def waiting(self) -> WaitingQueue:
        """Those that are not admitted yet."""
        return self.requests.waiting

    @property
    def running(self) -> list[Sequence]:
        """Those that steps compute, in order of arrival."""
        return self.requests.running

    # -- requests

    def submit(self, session: int, frame: Submit) -> None:
        """A new request; bad ones are answered with a failure."""
        self._guarded(session, frame.id, lambda: self._submit(session, frame))

    def reserve(self, session: int, frame: Reserve) -> None:
        """A new request whose prompt another worker computes, unless little of it is missing here."""
        self._guarded(session, frame.id, lambda: self._reserve(session, frame))

    def refuse(self, session: int, request: str, message: str, code: str = "bad_request") -> None:
        """Fail the request of a frame that cannot be read, or that is wrong in another way."""
        job = self.jobs.get((session, request))
        if job is None:
            self.requests.refuse(session, request, code, message)
        else:
            self.finisher.fail(job, code, message)

    def _in_use(self, lease: Lease, to: Endpoint) -> bool:
        """Whether the id of the lease or of its loan is in use. A loan that is being read does not count."""
        assert self.connector is not None
        if self.connector.busy(to, lease.id):
            return True
        loan = lease.loan
        return (
            loan is not None and (to.agent, loan.id) not in self.readback.reads and self.connector.busy(to, loan.id)
        )

    def _unsafe(self, place: str, nonces: bool) -> str | None:
        """Why no KV may move between this worker and one at `place`, before any does; None if it may."""
        if self.policy.encryption == "required" and not nonces:
            return "encryption is required, and the other worker, or the router, knows no nonces of leases"
        return self.policy.refusal(TransportPolicy("auto", place))

    def _guarded(self, session: int, request: str, work: Callable[[], None]) -> None:
        """Run `work`; an error fails the request of the frame and no other."""
        try:
            work()
        except Exception as error:
            log.exception("a request broke request=%r", request)
            why = f"the request cannot be taken: {type(error).__name__}: {error}"
            self.refuse(session, request, why, "internal_error")

    def _submit(self, session: int, frame: Submit) -> None:
        refuse = self.requests.refuse
        if (frame.lease is None) != (frame.to is None):
            return refuse(session, frame.id, "bad_request", "a lease needs its holder's endpoint")
        if frame.lease is None and self.role == "prefill":
            return refuse(session, frame.id, "wrong_role", "a prefill worker computes only under a lease")
        if frame.lease is not None and (self.role == "decode" or self.connector is None):
            return refuse(session, frame.id, "wrong_role", f"a {self.role} worker pushes no KV")
        if frame.lease is not None and (unsafe := self._unsafe(frame.place, frame.lease.nonce > 0)) is not None:
            return refuse(session, frame.id, "not_encrypted", unsafe)
        if frame.lease is not None and frame.to is not None and self.connector is not None:
            wrong = fault_of_endpoint("to", frame.to, self.connector.endpoint) or fault_of_lease(
                frame.lease, frame.to
            )
            if wrong is None and self._in_use(frame.lease, frame.to):
                wrong = "the lease is in use"
            if wrong is not None:
                return refuse(session, frame.id, "bad_lease", wrong)
        job = self.requests.new(session, frame, self.grammars.compiling)
        if job is None:
            return None
        if frame.lease is not None and frame.to is not None and self.connector is not None:
            problem = self.pushes.begin(job, frame.to, frame.lease)
            if problem is not None:
                self.finisher.forget(job)
                return refuse(session, frame.id, "bad_lease", problem)
            if frame.lease.loan is not None:
                job.reading = self.readback.read(self.connector, frame.to, frame.lease.loan, job.sequence)
        self.grammars.begin(job)
        return None

    def _enqueue(self, job: Job) -> None:
        """Let a job wait to be admitted, unless it has to wait for something else first."""
        if job.reading is None and not job.compiling:
            self.waiting.add(job.sequence)

    def _reserve(self, session: int, frame: Reserve) -> None:
        if self.role == "prefill" or self.connector is None:
            why = f"a {self.role} worker grants no leases"
            return self.requests.refuse(session, frame.id, "wrong_role", why)
        problem = fault_of_endpoint("writer", frame.writer, self.connector.endpoint)
        if problem is not None:
            return self.requests.refuse(session, frame.id, "bad_request", problem)
        unsafe = self._unsafe(frame.place, frame.nonces)
        if unsafe is not None:
            return self.requests.refuse(session, frame.id, "not_encrypted", unsafe)
        job = self.requests.new(session, frame, self.grammars.compiling)
        if job is not None:
            job.sequence.remote = True
            job.writer, job.threshold, job.lend_from = frame.writer, frame.threshold, frame.lend_from
            job.nonces = frame.nonces
            self.grammars.begin(job)
            faults.hit("decode.reserved")
        return None

    def abort(self, session: int, request: str) -> None:
        """Stop a request and account for its pages. Idempotent."""
        job = self.jobs.get((session, request))
        if job is not None:
            self.finisher.end(job, "aborted by the router")

    def close_session(self, session: int) -> None:
        """The router is gone: so are its requests."""
        for job in [job for job in self.jobs.values() if job.session == session]:
            self.finisher.end(job, "the router is gone")
        self.requests.silence(session)

    # -- the handoff's events

    def reported(self, rank: int, event: Event) -> None:
        """Handle an event of one rank's transfer thread."""
        assert self.connector is not None
        for each in self.connector.received(rank, event):
            self.transferred(each)
        self._note_cached()

    def transferred(self, event: Event) -> None:
        """Handle an event of a lease or loan that concerns all ranks."""
        match event:
            case sender.Done(key, push) if key in self.readback.reads:
                if push.complete is not None:
                    self._read(self.readback.ended(key))
            case sender.Failed(key, reason) if key in self.readback.reads:
                self._read(self.readback.failed(key, reason))
            case sender.Done(key, push):
                job = self.pushes.ended(key, push)
                if job is not None:
                    self.requests.tell(job, Delta(job.sequence.id, index=1, finish="handoff"))
                    self.finisher.forget(job)
            case sender.Failed(key, reason):
                job = self.pushes.failed(key)
                if job is not None:
                    self.finisher.fail(job, "handoff_failed", reason)
            case receiver.Settled(lease, complete):
                self._settle(lease, complete)
            case receiver.Fenced():
                job = self.leases.open.get(event.lease)
                if job is not None:
                    self.finisher.fail(job, event.code, event.reason or "the prompt's KV did not come in time")
            case receiver.Reclaimed() if event.lease in self.readback.lent:
                self.readback.returned(event.lease)
            case receiver.Reclaimed():
                job = self.leases.reclaim(event)
                if job is not None:
                    self.finisher.fail(job, event.code, event.reason)
            case receiver.Rejected(agent, lease, why):
                self.stats.rejected_messages += 1
                log.warning("rejected message agent=%s lease=%d why=%s", agent, lease, why)

    def _read(self, sequence: Sequence | None) -> None:
        """The read of a sequence has ended, well or not: the sequence waits to be admitted, in its old place."""
        if sequence is not None:
            job = self.requests.of(sequence)
            job.reading = None
            self._enqueue(job)

    def _settle(self, lease: int, complete: Complete) -> None:
        vocab = self.runner.vocab
        match self.leases.settle(lease, complete):
            case RefusedCompletion(job, why):
                self.finisher.fail(job, "handoff_failed", why)
            case Job() as job if complete.token >= vocab:
                why = f"prefill sampled token {complete.token}, which is none of {vocab}"
                self.finisher.fail(job, "handoff_failed", why)
            case Job() as job:
                self.requests.run(job.sequence)
                self.inflight.share(job.sequence)
                self.tokens.append(job, [complete.token], [complete.logprobs], sampled=False)
                faults.hit("decode.settled")

    # -- a step

    @property
    def busy(self) -> bool:
        """Whether a step would do something now, as far as can be said without planning it."""
        return bool(self.running or self.waiting or len(self.inflight) or self.grammars.ready)

    def step(self) -> bool:
        """Plan and launch a step, and account for one. `False` if there was nothing that could be done.

        With `overlap` the step that is accounted for is the one before, which ran while this one was prepared.
        """
        for job in self.requests.expired():
            self.finisher.fail(job, "overloaded", f"not served within {self.requests.queue.seconds:g} s")
        ended = int(self.grammars.take())
        plan = self._plan()
        if plan.preempt and len(self.inflight):
            ended += self._collect(leave=0)  # no sequence is preempted while a step samples its token
            plan = self._plan()
        for sequence in reversed(plan.preempt):
            self.running.remove(sequence)
            self.finisher.part(self.requests.of(sequence))
            self.waiting.add(sequence)
            self.stats.preemptions += 1
        for sequence in plan.admit:
            self.waiting.remove(sequence)
            sequence.leader = None
            self._admit(self.requests.of(sequence))
        for sequence, leader, shared in plan.follow:
            sequence.leader, sequence.shared = leader, shared
        chunks = self._allocate(plan)
        if chunks:
            self._launch(chunks)
        ended += self._collect(leave=1 if chunks and self.overlap else 0)
        self._note_cached()
        return bool(chunks or plan.admit or plan.preempt or ended)

    def _plan(self) -> Plan:
        """What the next step does. Cached pages that it would build on are what was stored in them."""
        while True:
            plan = schedule(self.running, self.waiting, self.cache, self.limits, len(self.leases.open))
            if self.checks is None or not any(self._spoiled(sequence, self.checks) for sequence in plan.admit):
                return plan

    def _note_cached(self) -> None:
        """What has entered the tree is known as it is, before anything else happens."""
        if self.checks is not None:
            self.checks.note(self.cache)

    def _spoiled(self, sequence: Sequence, checks: CachedPageChecks) -> bool:
        """Whether cached pages that the sequence would use were spoiled; they are not cached any more then."""
        pages = set(checks.spoiled(sequence, self.cache))
        if not pages:
            return False
        checks.drop(sorted(pages), self.cache)
        for job in [job for job in self.jobs.values() if pages & set(job.sequence.pages)]:
            if job.sequence in self.running:
                self.running.remove(job.sequence)
                self.finisher.part(job, keep=False)
            self.finisher.fail(job, "kv_digest_mismatch", "cached KV that it uses was overwritten")
        return True

    def _admit(self, job: Job) -> None:
        sequence = job.sequence
        if sequence.remote:
            found = 0 if sequence.unscored else self.cache.cost(sequence)[1]
            missing = len(sequence.tokens) - found
            if missing >= job.threshold:
                lease = self.leases.grant(job)
                job.admitted = True
                self.requests.tell(job, Leased(sequence.id, lease))
                faults.hit("decode.leased")
                return
            # Computed here after all. It was planned as a handoff, with other pages and no chunk: so plan again.
            sequence.remote = False
            self.requests.tell(job, Leased(sequence.id))
            self.waiting.add(sequence)
            return
        self.cache.admit(sequence)
        if not job.admitted:  # and not again after a preemption
            job.admitted = True
            sequence.cached = sequence.computed
        self.stats.admitted(job)
        self.requests.run(sequence)

    def _allocate(self, plan: Plan) -> list[tuple[Sequence, int]]:
        """The plan's chunks with pages. A sequence admitted as remote but short of the threshold has none yet."""
        chunks = []
        for sequence, tokens in plan.chunks:
            try:
                self.cache.extend(sequence, tokens)
            except OutOfPages:
                log.warning("no page for request=%s in this step", sequence.id)
                continue
            chunks.append((sequence, tokens))
        return chunks

    def _launch(self, chunks: list[tuple[Sequence, int]]) -> None:
        """Let the device compute the chunks, and sample where a sequence has caught up with its tokens then."""
        places: list[int] = []
        rows: dict[Sequence, range] = {}
        for place, (sequence, count) in enumerate(chunks):
            if sequence.computed + count == len(sequence.tokens) + sequence.awaited:
                row = len(places)
                rows[sequence] = range(row, row + 1)
                places.append(place)
        masks = self.grammars.masks(rows)
        asked = []
        for sequence in rows:
            awaited, work = sequence.awaited, None
            if sequence.history is not None:
                work = sequence.logits_work(self.inflight.rows(sequence)[-1] if awaited else None)
            mask = masks.get(sequence) if masks else None
            length = len(sequence.tokens) + awaited
            asked.append(SampleRequest(sequence.sampling, length, length - sequence.prompt, work, mask))
        on_layer = self.pushes.of_chunks([(self.requests.of(sequence), count) for sequence, count in chunks])
        batch = batch_of(chunks, self.limits.page_size, self.inflight.rows)
        idle = 0.0 if len(self.inflight) else None
        if self._ended is not None:
            idle = self.requests.clock() - self._ended
        scored = {sequence: asks for sequence, count in chunks if (asks := sequence.to_score(count))}
        step = self.runner.launch(batch, places, asked, on_layer)
        for sequence, count in chunks:
            sequence.computed += count
        for sequence, sampled in rows.items():
            sequence.awaited += len(sampled)
        self.inflight.add(InflightStep(chunks, rows, step, idle, scored))
        self._ended = None

    def _collect(self, leave: int) -> int:
        """Wait for the steps in flight but the newest `leave`, and account for them. How many."""
        count = 0
        while len(self.inflight) > leave:
            flight = self.inflight.oldest
            sampled = flight.step.wait()
            self.inflight.ended()
            if flight.step.replayed:
                self.stats.replayed_steps += 1
            else:
                self.stats.eager_steps += 1
            if flight.idle is not None:
                self.stats.idle_seconds += flight.idle if flight.step.gap is None else flight.step.gap
            self._account(flight, sampled)
            self._ended = self.requests.clock() if self.running and not len(self.inflight) else None
            count += 1
        return count

    def _account(self, flight: InflightStep, sampled: Sampled) -> None:
        """Account for what an ended step computed and sampled, but of sequences that have ended since."""
        self.stats.computed_tokens += sum(count for _, count in flight.chunks)
        lasting = [(sequence, count) for sequence, count in flight.chunks if self.requests.find(sequence)]
        for sequence, count in lasting:
            sequence.done += count
            self.stats.computed(self.requests.of(sequence))
            if sequence not in flight.rows:
                self.inflight.share(sequence)  # others may wait for these pages
        self._score(flight, sampled)
        for sequence, rows in flight.rows.items():
            job = self.requests.find(sequence)
            if job is not None:
                sequence.awaited -= len(rows)
                if sequence.told == 0:
                    self.inflight.share(sequence)
                start, stop = rows.start, rows.stop
                self.tokens.take(job, sampled.tokens[start:stop], sampled.logprobs[start:stop])

    def _score(self, flight: InflightStep, sampled: Sampled) -> None:
        """Tell of the prompts' tokens that the step scored, and keep what forced ones did."""
        start = 0
        for sequence, places in flight.scored.items():
            job = self.requests.find(sequence)
            if job is not None:
                self.tokens.take_scores(job, places.start, sampled.prompts[start : start + len(places)])
            start += len(places)

    def fail_all(self, code: str, message: str) -> None:
        """Fail all requests that a step which raised may have touched. The tree gets none of their pages."""
        self._ended = None
        self.finisher.fail_all(code, message)

    # -- what goes out

    def drain(self) -> dict[int, list[Delta | Leased]]:
        """Take the frames for each session, in order."""
        return self.requests.drain()

    @property
    def owing(self) -> int:
        """Requests, and leases on either side, that have not ended."""
        return len(self.jobs) + len(self.leases.fenced) + len(self.pushes.open) + self._loans

    @property
    def _loans(self) -> int:
        return len(self.readback.lent) + len(self.readback.reads)

    def load(self) -> Load:
        """The load now."""
        leases = len(self.leases.open) + len(self.leases.fenced) + len(self.pushes.open) + self._loans
        return Load(
            running=len(self.running),
            waiting=len(self.waiting) + self.grammars.compiling,
            queued_tokens=sum(s.remaining for s in self.waiting) + sum(s.remaining for s in self.running),
            free_pages=self.cache.pool.count(Owner.FREE),
            cached_pages=self.cache.pool.count(Owner.CACHED),
            leases=leases,
            prefill_rate=round(self.prefill_rate),
            read_rate=0 if self.connector is None else round(self.connector.stats.read_rate),
        )

    def check(self) -> None:
        """Raise unless every page is accounted for."""
        held = [s.pages for s in self.running]
        held += [job.sequence.pages for job in self.leases.open.values()]
        held += self.readback.held() + self.pushes.held() + self.inflight.holds()
        self.cache.pool.check(held, self.cache.tree.pages())
        self.cache.tree.check()

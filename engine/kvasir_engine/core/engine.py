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
from kvasir_engine.core.handoff_checks import HandoffChecks, Refusal
from kvasir_engine.core.inflight_steps import InflightStep, InflightSteps
from kvasir_engine.core.jobs import DecodeJob, Job, JobId, PrefillJob
from kvasir_engine.core.kv_cache_manager import KVCacheManager
from kvasir_engine.core.leases import Leases, RefusedCompletion
from kvasir_engine.core.loans import Loans
from kvasir_engine.core.output_processor import OutputProcessor
from kvasir_engine.core.page_releaser import PageReleaser
from kvasir_engine.core.pushes import Pushes
from kvasir_engine.core.readback import Readback
from kvasir_engine.core.request_finisher import RequestFinisher
from kvasir_engine.core.requests import Requests
from kvasir_engine.core.scheduler import Limits, Plan, schedule
from kvasir_engine.core.sequence import Sequence
from kvasir_engine.core.stats import Stats
from kvasir_engine.core.waiting_queue import QueueLimits, WaitingQueue
from kvasir_engine.kv.pages import OutOfPages, Owner
from kvasir_engine.protocol import Delta, Leased, Load, Reserve, Role, Submit
from kvasir_engine.sampling.sampler import Sampled, SampleRequest
from kvasir_engine.transport_policy import ANY_TRANSPORT, TransportPolicy

if TYPE_CHECKING:
    from kvasir_engine.executor.model_runner import ModelRunner

log = logging.getLogger("engine")

NO_LIMITS = QueueLimits()


class Engine:
    """The requests of one worker. `connector` is `None` if KV never moves.

    `overlap`: each step is prepared and launched while the previous one runs, so results come one step late.
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
        self.requests = Requests(runner.vocab, max_length, queue, self.stats, clock, grammars is not None)
        self.loans = Loans(self.cache, connector)
        self.leases = Leases(self.cache, connector, self.loans, epoch, self.stats)
        self.pushes = Pushes(self.cache, connector, runner.config.layers, self.stats)
        self.readback = Readback(self.cache, connector)
        self.inflight = InflightSteps(self.cache)
        self.pages = PageReleaser(self.cache, self.inflight, self.pushes)
        self.finisher = RequestFinisher(self.requests, self.pages, self.pushes, self.leases, self.readback)
        self._handoff_checks = HandoffChecks(role, connector, self.readback)
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
        """The sequences that are not admitted yet."""
        return self.requests.waiting

    @property
    def running(self) -> list[Sequence]:
        """The sequences that steps compute, in order of arrival."""
        return self.requests.running

    # -- requests

    def submit(self, session: int, frame: Submit) -> None:
        """Take a new request. An invalid one is answered with a failure."""
        self._guarded(session, frame.id, lambda: self._submit(session, frame))

    def reserve(self, session: int, frame: Reserve) -> None:
        """Take a new request whose prompt another worker computes, unless few of its tokens are missing here."""
        self._guarded(session, frame.id, lambda: self._reserve(session, frame))

    def refuse(self, session: int, request: str, message: str, code: str = "bad_request") -> None:
        """Fail the request of a frame that cannot be decoded or is invalid."""
        job = self.jobs.get((session, request))
        if job is None:
            self.requests.refuse(session, request, code, message)
        else:
            self.finisher.fail(job, code, message)

    def _guarded(self, session: int, request: str, work: Callable[[], None]) -> None:
        """Run `work`. An error fails only the request of the frame."""
        try:
            work()
        except Exception as error:
            log.exception("a request broke request=%r", request)
            why = f"the request cannot be taken: {type(error).__name__}: {error}"
            self.refuse(session, request, why, "internal_error")

    def _submit(self, session: int, frame: Submit) -> None:
        job = self._new(session, frame, self._handoff_checks.of_submit(frame, self.policy))
        if isinstance(job, PrefillJob):
            problem = self.pushes.begin(job)
            if problem is not None:
                self.finisher.forget(job)
                return self.requests.refuse(session, frame.id, "bad_lease", problem)
            if job.lease.loan is not None:
                job.reading = self.readback.read(job.to, job.lease.loan, job.sequence)
        if job is not None:
            self.grammars.begin(job)
        return None

    def _reserve(self, session: int, frame: Reserve) -> None:
        job = self._new(session, frame, self._handoff_checks.of_reserve(frame, self.policy))
        if job is not None:
            self.grammars.begin(job)
            faults.hit("decode.reserved")

    def _new(self, session: int, frame: Submit | Reserve, refusal: Refusal | None) -> Job | None:
        if refusal is not None:
            self.requests.refuse(session, frame.id, *refusal)
            return None
        return self.requests.new(session, frame, self.grammars.compiling)

    def _enqueue(self, job: Job) -> None:
        """Queue a job, unless it has to wait for something else first."""
        if job.admissible:
            self.waiting.add(job.sequence)

    def abort(self, session: int, request: str) -> None:
        """Stop a request and account for its pages. Idempotent."""
        job = self.jobs.get((session, request))
        if job is not None:
            self.finisher.end(job, "aborted by the router")

    def close_session(self, session: int) -> None:
        """End all requests of a router that is gone."""
        for job in [job for job in self.jobs.values() if job.session == session]:
            self.finisher.end(job, "the router is gone")
        self.requests.drop_session(session)

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
                if (pushed := self.pushes.ended(key, push)) is not None:
                    self.requests.send(pushed, Delta(pushed.sequence.id, index=1, finish="handoff"))
                    self.finisher.forget(pushed)
            case sender.Failed(key, reason):
                if (pushing := self.pushes.failed(key)) is not None:
                    self.finisher.fail(pushing, "handoff_failed", reason)
            case receiver.Settled(lease, complete):
                self._settle(lease, complete)
            case receiver.Fenced():
                job = self.leases.open.get(event.lease)
                if job is not None:
                    self.finisher.fail(job, event.code, event.reason or "the prompt's KV did not come in time")
            case receiver.Reclaimed() if event.lease in self.loans.lent:
                self.loans.returned(event.lease)
            case receiver.Reclaimed():
                job = self.leases.reclaim(event)
                if job is not None:
                    self.finisher.fail(job, event.code, event.reason)
            case receiver.Rejected(agent, lease, why):
                self.stats.rejected_messages += 1
                log.warning("rejected message agent=%s lease=%d why=%s", agent, lease, why)

    def _read(self, sequence: Sequence | None) -> None:
        """Put a sequence, whose read has ended or failed, back into its place in the queue."""
        if sequence is not None:
            job = self.requests.of(sequence)
            assert isinstance(job, PrefillJob)
            job.reading = None
            self._enqueue(job)

    def _settle(self, lease: int, complete: Complete) -> None:
        vocab = self.runner.vocab
        match self.leases.settle(lease, complete):
            case RefusedCompletion(job, why):
                self.finisher.fail(job, "handoff_failed", why)
            case DecodeJob() as job if complete.token >= vocab:
                why = f"prefill sampled token {complete.token}, which is none of {vocab}"
                self.finisher.fail(job, "handoff_failed", why)
            case DecodeJob() as job:
                self.requests.run(job.sequence)
                self.inflight.share(job.sequence)
                self.tokens.append(job, [complete.token], [complete.logprobs], sampled=False)
                faults.hit("decode.kv_complete")

    # -- a step

    @property
    def busy(self) -> bool:
        """Whether a step may have something to do now. Does not plan one to find out."""
        return bool(self.running or self.waiting or len(self.inflight) or self.grammars.ready)

    def step(self) -> bool:
        """Plan and launch a step, and account for one. `False` if there was nothing to do.

        With `overlap` it accounts for the previous step, which ran while this one was prepared.
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
            self.pages.release(self.requests.of(sequence))
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
        """Plan the next step. The cached pages that it uses have been verified."""
        while True:
            plan = schedule(self.running, self.waiting, self.cache, self.limits, len(self.leases.open))
            if self.checks is None or not any(self._spoiled(sequence, self.checks) for sequence in plan.admit):
                return plan

    def _note_cached(self) -> None:
        """Make the digests of pages that entered the tree, before anything else can change them."""
        if self.checks is not None:
            self.checks.note(self.cache)

    def _spoiled(self, sequence: Sequence, checks: CachedPageChecks) -> bool:
        """Whether cached pages that the sequence would use are spoiled. If so they are removed from the cache."""
        pages = set(checks.spoiled(sequence, self.cache))
        if not pages:
            return False
        checks.drop(sorted(pages), self.cache)
        for job in [job for job in self.jobs.values() if pages & set(job.sequence.pages)]:
            if job.sequence in self.running:
                self.running.remove(job.sequence)
                self.pages.release(job, keep=False)
            self.finisher.fail(job, "kv_digest_mismatch", "cached KV that it uses was overwritten")
        return True

    def _admit(self, job: Job) -> None:
        sequence = job.sequence
        if sequence.remote and isinstance(job, DecodeJob):
            found = min(self.cache.cost(sequence)[1], sequence.reusable)
            missing = len(sequence.tokens) - found
            if missing >= job.threshold:
                lease = self.leases.grant(job)
                job.admitted = True
                self.requests.send(job, Leased(sequence.id, lease))
                faults.hit("decode.leased")
                return
            # Computed here after all. It was planned as a handoff, with other pages and no chunk: so plan again.
            sequence.remote = False
            self.requests.send(job, Leased(sequence.id))
            self.waiting.add(sequence)
            return
        self.cache.admit(sequence)
        if not job.admitted:  # and not again after a preemption
            job.admitted = True
            sequence.cached = sequence.computed
        self.stats.admitted(job)
        self.requests.run(sequence)

    def _allocate(self, plan: Plan) -> list[tuple[Sequence, int]]:
        """The plan's chunks, for which pages are allocated now. A remote sequence whose missing tokens are below
        the threshold has no pages before."""
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
        """Launch the computation of the chunks, and sampling for sequences that will have computed all their
        tokens."""
        places: list[int] = []
        rows: dict[Sequence, range] = {}
        for place, (sequence, count) in enumerate(chunks):
            if sequence.computed + count == len(sequence.tokens) + sequence.awaited:
                row = len(places)
                rows[sequence] = range(row, row + 1)
                places.append(place)
        masks = self.grammars.masks(rows)
        requests = []
        for sequence in rows:
            awaited, work = sequence.awaited, None
            if sequence.history is not None:
                work = sequence.logits_work(self.inflight.rows(sequence)[-1] if awaited else None)
            mask = masks.get(sequence) if masks else None
            length = len(sequence.tokens) + awaited
            requests.append(SampleRequest(sequence.sampling, length, length - sequence.prompt, work, mask))
        on_layer = self.pushes.of_chunks([(self.requests.of(sequence), count) for sequence, count in chunks])
        batch = batch_of(chunks, self.limits.page_size, self.inflight.rows)
        idle = 0.0 if len(self.inflight) else None
        if self._ended is not None:
            idle = self.requests.clock() - self._ended
        scored = {sequence: asks for sequence, count in chunks if (asks := sequence.to_score(count))}
        step = self.runner.launch(batch, places, requests, on_layer)
        for sequence, count in chunks:
            sequence.computed += count
        for sequence, sampled in rows.items():
            sequence.awaited += len(sampled)
        self.inflight.add(InflightStep(chunks, rows, step, idle, scored))
        self._ended = None

    def _collect(self, leave: int) -> int:
        """Wait for the steps in flight except the newest `leave`, and account for them; returns how many."""
        count = 0
        while len(self.inflight) > leave:
            launched = self.inflight.oldest
            sampled = launched.step.wait()
            self.inflight.ended()
            if launched.step.replayed:
                self.stats.replayed_steps += 1
            else:
                self.stats.eager_steps += 1
            if launched.idle is not None:
                self.stats.idle_seconds += launched.idle if launched.step.gap is None else launched.step.gap
            self._account(launched, sampled)
            self._ended = self.requests.clock() if self.running and not len(self.inflight) else None
            count += 1
        return count

    def _account(self, launched: InflightStep, sampled: Sampled) -> None:
        """Account for what an ended step computed and sampled, except for sequences that have ended meanwhile."""
        self.stats.computed_tokens += sum(count for _, count in launched.chunks)
        lasting = [(sequence, count) for sequence, count in launched.chunks if self.requests.find(sequence)]
        for sequence, count in lasting:
            sequence.done += count
            self.stats.computed(self.requests.of(sequence))
            if sequence not in launched.rows:
                self.inflight.share(sequence)  # others may wait for these pages
        self._score(launched, sampled)
        for sequence, rows in launched.rows.items():
            job = self.requests.find(sequence)
            if job is not None:
                sequence.awaited -= len(rows)
                if sequence.reported == 0:
                    self.inflight.share(sequence)
                start, stop = rows.start, rows.stop
                self.tokens.take(job, sampled.tokens[start:stop], sampled.logprobs[start:stop])

    def _score(self, launched: InflightStep, sampled: Sampled) -> None:
        """Report the scores of prompts' tokens, and keep those of forced tokens."""
        start = 0
        for sequence, places in launched.scored.items():
            job = self.requests.find(sequence)
            if job is not None:
                self.tokens.take_scores(job, places.start, sampled.prompts[start : start + len(places)])
            start += len(places)

    def fail_all(self, code: str, message: str) -> None:
        """Fail all requests that the failed step may have touched. None of their pages enters the tree."""
        self._ended = None
        self.inflight.drop()
        self.finisher.fail_computing(code, message)

    # -- what goes out

    def drain(self) -> dict[int, list[Delta | Leased]]:
        """Take the frames for each session, in order."""
        return self.requests.drain()

    @property
    def unfinished(self) -> int:
        """The number of requests, and of leases on either side, that have not ended."""
        return len(self.jobs) + len(self.leases.fenced) + len(self.pushes.open) + self._loans

    @property
    def _loans(self) -> int:
        return len(self.loans.lent) + len(self.readback.reads)

    def load(self) -> Load:
        """The present load."""
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
        held += [*self.loans.lent.values(), *self.readback.held(), *self.pushes.held(), *self.inflight.holds()]
        self.cache.pool.check(held, self.cache.tree.pages())
        self.cache.tree.check()

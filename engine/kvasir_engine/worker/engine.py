"""The engine: requests in, one step at a time, tokens out. Single-threaded, no clock of its own, no socket.

A request is a `Job` around a scheduler's `Sequence`. The colocated path is: waiting, running, gone. With a handoff,
the prefill side's job ends as soon as its last push is queued; the decode side's job waits in `leased` until the
lease settles, then runs as any other.
"""

import logging
import math
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch

from kvasir_engine import faults
from kvasir_engine.kv.pages import OutOfPages, Owner
from kvasir_engine.model.batch import ForwardBatch
from kvasir_engine.protocol import (
    Delta,
    Endpoint,
    Failure,
    Lease,
    Leased,
    Load,
    Reserve,
    Role,
    Submit,
    TokenLogprobs,
)
from kvasir_engine.sampling.sampler import SampleRequest, sample
from kvasir_engine.scheduler.queue import QueueLimits, WaitingQueue, place_in_queue
from kvasir_engine.scheduler.schedule import Limits, Plan, schedule
from kvasir_engine.scheduler.sequence import Sequence
from kvasir_engine.transfer import holder, writer
from kvasir_engine.transfer.group import HandoffGroup, LayerPush
from kvasir_engine.transfer.handoff import Event
from kvasir_engine.transfer.layout import block_numbers, block_tokens, pages_of
from kvasir_engine.transfer.messages import Complete
from kvasir_engine.worker.cache import Cache
from kvasir_engine.worker.readback import Readback

if TYPE_CHECKING:
    from kvasir_engine.model.runner import ModelRunner

log = logging.getLogger("engine")

LEASE_SECONDS = 600.0
"""A lease covers the prompt's wait at prefill. A dead or silent writer is found by pings, long before."""

NO_LIMITS = QueueLimits()

JobId = tuple[int, str]  # session, the request's id in it


@dataclass(eq=False, slots=True)
class Job:
    """A request and what it owes to whom."""

    session: int
    sequence: Sequence
    to: Endpoint | None = None  # prefill side: where the KV goes, under `lease`
    lease: Lease | None = None
    key: writer.Key | None = None
    reading: writer.Key | None = None  # the loan that is read under before the prompt is admitted
    block: int = 0  # tokens of what is pushed as one: a page, or where page sizes differ the smaller
    blocks: int = 0  # how many of these the lease wants
    pushed: int = 0  # how many of these the transfer thread has been given
    handed_off: bool = False  # the prompt is computed, and the pages are the lease's to read
    writer: Endpoint | None = None  # decode side: who writes, into `leased`
    leased: list[int] = field(default_factory=list)
    threshold: int = 0
    lend_from: int | None = None  # tokens that the writer has; what we have beyond it may read
    loan: int | None = None
    counted: bool = False  # in the statistics of prompts
    came: float = 0.0  # by the engine's clock

    @property
    def id(self) -> JobId:
        return self.session, self.sequence.id


@dataclass(eq=False, frozen=True)
class _Reading:
    """A push that has not ended and the pages that it reads; or (no push) what its sequence left meanwhile."""

    push: writer.Push | None
    pages: Seq[int]


@dataclass
class Stats:
    """Counters since the start; read by the metrics collector from another thread."""

    prompt_tokens: int = 0
    generated_tokens: int = 0
    hit_tokens: int = 0
    miss_tokens: int = 0
    steps: int = 0
    step_seconds: float = 0.0
    preemptions: int = 0
    received_pages: int = 0
    received_tokens: int = 0
    sent_pages: int = 0
    failures: dict[str, int] = field(default_factory=dict)
    rejected_messages: int = 0
    computed_tokens: int = 0
    proofs: dict[str, int] = field(default_factory=dict)  # leases that ended without their tokens, by proof


class Engine:
    """One worker's requests. `handoff` is None where KV never moves."""

    def __init__(
        self,
        runner: "ModelRunner",
        role: Role,
        limits: Limits,
        max_length: int,
        epoch: int,
        handoff: HandoffGroup | None,
        queue: QueueLimits = NO_LIMITS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.runner = runner
        self.role = role
        self.limits = limits
        self.max_length = max_length
        self.epoch = epoch
        self.handoff = handoff
        self.queue = queue
        self._clock = clock
        self._expiry = -math.inf
        self.cache = Cache(runner.pool.pages, limits.page_size, runner.copy_page)
        self.readback = Readback(self.cache)
        self.stats = Stats()
        self.prefill_rate = 0.0  # tokens a second of the steps that prefill, as measured by whoever takes the steps
        self.jobs: dict[JobId, Job] = {}
        self.waiting = WaitingQueue()
        self.running: list[Sequence] = []  # in order of arrival
        self.leased: dict[int, Job] = {}  # open leases of ours
        self.fenced: dict[int, list[int]] = {}  # leases of ours that wait for a proof, with their pages
        self.pushes: dict[writer.Key, list[_Reading]] = {}  # leases of others that we write under
        self._job_of: dict[Sequence, Job] = {}
        self._job_of_key: dict[writer.Key, Job] = {}
        self._arrivals = 0
        self._leases = 0
        self._out: dict[int, list[Delta | Leased]] = {}

    # -- requests

    def submit(self, session: int, frame: Submit) -> None:
        """A new request; bad ones are answered with a failure."""
        if (frame.lease is None) != (frame.to is None):
            return self._refuse(session, frame.id, "bad_request", "a lease needs its holder's endpoint")
        if frame.lease is None and self.role == "prefill":
            return self._refuse(session, frame.id, "wrong_role", "a prefill worker computes only under a lease")
        if frame.lease is not None and (self.role == "decode" or self.handoff is None):
            return self._refuse(session, frame.id, "wrong_role", f"a {self.role} worker pushes no KV")
        job = self._new_job(session, frame)
        if job is None:
            return None
        if frame.lease is not None and frame.to is not None and self.handoff is not None:
            theirs = frame.to.fingerprint.page_size
            pages = -(-len(frame.tokens) // theirs) - frame.lease.first // theirs
            fits = frame.lease.first % theirs == 0 and pages == len(frame.lease.pages)
            if not fits or (frame.to.agent, frame.lease.id) in self.pushes:
                self._forget(job)
                why = "is in use" if fits else "does not fit the prompt"
                return self._refuse(session, frame.id, "bad_lease", f"the lease {why}")
            job.lease, job.to = frame.lease, frame.to
            job.block = block_tokens(self.limits.page_size, theirs)
            job.blocks = -(-len(frame.tokens) // job.block) - frame.lease.first // job.block
            job.key = self.handoff.open(frame.to, frame.lease)
            self.pushes[job.key] = []
            self._job_of_key[job.key] = job
            faults.hit("prefill.submitted")
            if frame.lease.loan is not None:
                job.reading = self.readback.read(self.handoff, frame.to, frame.lease.loan, job.sequence)
        if job.reading is None:
            self.waiting.add(job.sequence)
        return None

    def reserve(self, session: int, frame: Reserve) -> None:
        """A new request whose prompt another worker computes, unless little of it is missing here."""
        if self.role == "prefill" or self.handoff is None:
            return self._refuse(session, frame.id, "wrong_role", f"a {self.role} worker grants no leases")
        job = self._new_job(session, frame)
        if job is not None:
            job.sequence.remote = True
            job.writer, job.threshold, job.lend_from = frame.writer, frame.threshold, frame.lend_from
            self.waiting.add(job.sequence)
            faults.hit("decode.reserved")
        return None

    def abort(self, session: int, request: str) -> None:
        """Stop a request and account for its pages. Idempotent."""
        job = self.jobs.get((session, request))
        if job is not None:
            self._end(job, "aborted by the router")

    def close_session(self, session: int) -> None:
        """The router is gone: so are its requests."""
        for job in [job for job in self.jobs.values() if job.session == session]:
            self._end(job, "the router is gone")
        self._out.pop(session, None)

    # -- the handoff's events

    def reported(self, rank: int, event: Event) -> None:
        """What the transfer thread of one rank reports."""
        assert self.handoff is not None
        for each in self.handoff.received(rank, event):
            self.transferred(each)

    def transferred(self, event: Event) -> None:
        """What became of a lease, on all ranks."""
        match event:
            case writer.Done(key, push) if key in self.readback.reads:
                if push.complete is not None:
                    self._read(self.readback.ended(key))
            case writer.Failed(key, reason) if key in self.readback.reads:
                self._read(self.readback.failed(key, reason))
            case writer.Done(key, push):
                self._pushed(key, push)
            case writer.Failed(key, reason):
                self._push_failed(key, reason)
            case holder.Settled(lease, complete):
                self._settle(lease, complete)
            case holder.Fenced():
                self._fence(event)
            case holder.Reclaimed():
                self._reclaim(event)
            case holder.Rejected(agent, lease, why):
                self.stats.rejected_messages += 1
                log.warning("rejected message agent=%s lease=%d why=%s", agent, lease, why)

    def _read(self, sequence: Sequence | None) -> None:
        """What a sequence wanted to read is here, or will not come: it waits to be admitted, in its place."""
        if sequence is not None:
            self._job_of[sequence].reading = None
            self.waiting.add(sequence)

    def _pushed(self, key: writer.Key, push: writer.Push) -> None:
        if push.complete is None:
            reading = next(reading for reading in self.pushes[key] if reading.push is push)
            self.pushes[key].remove(reading)
            self.cache.tree.release(reading.pages)
            self.stats.sent_pages += len(reading.pages)
        else:
            for reading in self.pushes.pop(key):
                self.cache.tree.release(reading.pages)
            job = self._job_of_key.get(key)
            if job is not None:
                self._emit(job, Delta(job.sequence.id, index=1, finish="handoff"))
                self._forget(job)

    def _push_failed(self, key: writer.Key, reason: str) -> None:
        for reading in self.pushes.pop(key, []):
            self.cache.tree.release(reading.pages)
        job = self._job_of_key.pop(key, None)
        if job is not None:
            job.key = None
            self._fail(job, "handoff_failed", reason)

    def _settle(self, lease: int, complete: Complete) -> None:
        pages = self.fenced.pop(lease, None)
        if pages is not None:
            return self.cache.pool.reclaim(pages, lease)
        job = self.leased.pop(lease)
        sequence = job.sequence
        if complete.tokens != len(sequence.tokens):
            self.cache.pool.reclaim(job.leased, lease)
            job.leased = []
            why = f"prefill completed {complete.tokens} tokens of {len(sequence.tokens)}"
            return self._fail(job, "handoff_failed", why)
        self.cache.pool.settle(job.leased, lease)
        self.stats.received_pages += len(job.leased)
        self.stats.received_tokens += len(sequence.tokens) - sequence.computed
        sequence.pages += job.leased
        sequence.computed = len(sequence.tokens)
        job.leased = []
        sequence.remote = False
        place = next((i for i, s in enumerate(self.running) if s.arrival > sequence.arrival), len(self.running))
        self.running.insert(place, sequence)
        self.cache.share(sequence)
        self._append(job, complete.token, complete.logprobs)
        faults.hit("decode.settled")
        return None

    def _fence(self, event: holder.Fenced) -> None:
        job = self.leased.get(event.lease)
        if job is not None:
            self._fail(job, event.code, event.reason or "the prompt's KV did not come in time")

    def _reclaim(self, event: holder.Reclaimed) -> None:
        if event.lease in self.readback.lent:
            return self.readback.returned(event.lease)
        pages = self.fenced.pop(event.lease, None)
        if pages is None:
            job = self.leased.pop(event.lease)
            pages, job.leased = job.leased, []
            self._fail(job, event.code, event.reason)
        self.cache.pool.reclaim(pages, event.lease)
        self.stats.proofs[event.proof] = self.stats.proofs.get(event.proof, 0) + 1
        log.info("lease reclaimed lease=%d proof=%s pages=%d", event.lease, event.proof, len(pages))
        return None

    # -- a step

    @property
    def busy(self) -> bool:
        """Whether a step would do something now, as far as can be said without planning it."""
        return bool(self.running or self.waiting)

    def step(self) -> bool:
        """Plan, compute and account for one step. `False` if there was nothing that could be done."""
        self._expire()
        plan = schedule(self.running, self.waiting, self.cache, self.limits, len(self.leased))
        for sequence in reversed(plan.preempt):
            self.running.remove(sequence)
            self._part(self._job_of[sequence])
            self.waiting.add(sequence)
            self.stats.preemptions += 1
        for sequence in plan.admit:
            self.waiting.remove(sequence)
            sequence.leader = None
            self._admit(self._job_of[sequence])
        for sequence, leader, shared in plan.follow:
            sequence.leader, sequence.shared = leader, shared
        chunks = self._allocate(plan)
        if chunks:
            logits = self.runner.forward(self._batch(chunks), self._layer_pushes(chunks))
            self._advance(chunks, logits)
        return bool(chunks or plan.admit or plan.preempt)

    def _expire(self) -> None:
        """Fail those that waited too long for their first step. Looked at ten times within the limit."""
        now, seconds = self._clock(), self.queue.seconds
        if seconds == 0 or now < self._expiry:
            return
        self._expiry = now + seconds / 10
        for sequence in list(self.waiting):
            job = self._job_of[sequence]
            if not job.counted and now - job.came >= seconds:
                self._fail(job, "overloaded", f"not served within {seconds:g} s")

    def _admit(self, job: Job) -> None:
        sequence = job.sequence
        if sequence.remote:
            missing = len(sequence.tokens) - self.cache.cost(sequence)[1]
            if missing >= job.threshold:
                return self._lease(job)
            sequence.remote = False
            self._send(job, Leased(sequence.id))
        self.cache.admit(sequence)
        self._count_prompt(job)
        self.running.append(sequence)
        self.running.sort(key=lambda s: s.arrival)
        return None

    def _lease(self, job: Job) -> None:
        assert self.handoff is not None
        assert job.writer is not None
        self._leases += 1
        job.leased = self.cache.reserve(job.sequence, self._leases)
        self._count_prompt(job)
        loan = None
        lease_id = self._leases
        if job.lend_from is not None:
            self._leases += 1
            cached = job.sequence.pages
            loan = self.readback.lend(self.handoff, job.writer, cached, job.lend_from, self._leases, self.epoch)
            job.loan = None if loan is None else loan.id
        lease = Lease(lease_id, self.epoch, job.leased, job.sequence.computed, LEASE_SECONDS, loan)
        job.lease = lease
        self.leased[lease.id] = job
        self.handoff.grant(lease, job.writer, len(job.sequence.tokens) - lease.first)
        self._send(job, Leased(job.sequence.id, lease))
        faults.hit("decode.leased")

    def _count_prompt(self, job: Job) -> None:
        sequence = job.sequence
        if not job.counted:  # and not again after a preemption
            job.counted = True
            sequence.cached = sequence.computed
            self.stats.prompt_tokens += len(sequence.tokens)
            self.stats.hit_tokens += sequence.computed
            self.stats.miss_tokens += len(sequence.tokens) - sequence.computed

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

    def _batch(self, chunks: list[tuple[Sequence, int]]) -> ForwardBatch:
        tokens: list[int] = []
        positions: list[int] = []
        for sequence, count in chunks:
            end = sequence.computed + count
            tokens += sequence.tokens[sequence.computed : end]
            positions += range(sequence.computed, end)
        context = [sequence.computed + count for sequence, count in chunks]
        used = [self.cache.pages_for(length) for length in context]
        width = max(used)
        table = torch.tensor(
            [sequence.pages[:n] + [0] * (width - n) for (sequence, _), n in zip(chunks, used, strict=True)],
            dtype=torch.int64,
        )
        return ForwardBatch(
            torch.tensor(tokens), torch.tensor(positions), [count for _, count in chunks], context, table
        )

    def _advance(self, chunks: list[tuple[Sequence, int]], logits: torch.Tensor) -> None:
        """Account for the computed tokens; sample where a sequence has caught up with its tokens."""
        self.stats.computed_tokens += sum(count for _, count in chunks)
        rows, places = [], []
        for place, (sequence, count) in enumerate(chunks):
            sequence.computed += count
            if sequence.remaining == 0:
                rows.append(SampleRequest(sequence.sampling, len(sequence.tokens), sequence.generated))
                places.append(place)
            else:
                self.cache.share(sequence)  # others may wait for these pages
        if not rows:
            return
        sampled = sample(logits if len(rows) == len(chunks) else logits[places], rows)
        for place, token, logprobs in zip(places, sampled.tokens, sampled.logprobs, strict=True):
            sequence = chunks[place][0]
            job = self._job_of[sequence]
            if sequence.generated == 0:
                self.cache.share(sequence)
            if job.lease is not None and job.to is not None:
                self._handoff(job, token, logprobs)
            else:
                self._append(job, token, logprobs)

    def _append(self, job: Job, token: int, logprobs: TokenLogprobs | None) -> None:
        """One more token of a sequence that is decoded here."""
        sequence = job.sequence
        index = sequence.generated
        sequence.tokens.append(token)
        self.stats.generated_tokens += 1
        if index == 1 and job.lease is not None:
            faults.hit("decode.stepped")
        finish = self._finish(sequence, token)
        self._emit(
            job,
            Delta(
                sequence.id,
                index,
                [token],
                None if logprobs is None else [logprobs],
                finish,
                cached=sequence.cached,
            ),
        )
        if finish is not None:
            self.running.remove(sequence)
            self._part(job)
            self._forget(job)

    def _finish(self, sequence: Sequence, token: int) -> Literal["stop", "length"] | None:
        sampling = sequence.sampling
        if token in sampling.stop_token_ids and sequence.generated >= sampling.min_tokens:
            return "stop"
        if sequence.generated >= sampling.max_tokens or len(sequence.tokens) >= self.max_length:
            return "length"
        return None

    # -- the prefill side

    def _handoff(self, job: Job, token: int, logprobs: TokenLogprobs | None) -> None:
        """The prompt is computed: report the first token, push what is left of it, let go of the pages."""
        assert job.key is not None
        assert self.handoff is not None
        sequence = job.sequence
        prompt = len(sequence.tokens)
        sequence.tokens.append(token)
        self.stats.generated_tokens += 1
        finish = self._finish(sequence, token)
        self._emit(
            job,
            Delta(
                sequence.id, 0, [token], None if logprobs is None else [logprobs], finish, cached=sequence.cached
            ),
        )
        if finish is None:
            assert job.lease is not None
            complete = Complete(job.lease.id, job.lease.epoch, prompt, job.blocks, token, logprobs)
            self.handoff.push(job.key, writer.Push(complete=complete))
            job.handed_off = True
        self.running.remove(sequence)
        self._part(job)
        if finish is not None:
            self.handoff.withdraw(job.key, "the first token was the last")
            self._forget(job)

    def _layer_pushes(self, chunks: list[tuple[Sequence, int]]) -> Callable[[int], None] | None:
        """What gives the transfer thread each computed layer of the leases' pages that this step completes."""
        growing: list[LayerPush] = []
        for sequence, count in chunks:
            job = self._job_of[sequence]
            if job.key is not None and job.lease is not None and sequence.generated == 0:
                first = job.lease.first // job.block
                self._push_whole(job, sequence.computed // job.block - first)  # what the tree had, if anything
                end = sequence.computed + count
                ready = job.blocks if end == len(sequence.tokens) else end // job.block - first
                if ready > job.pushed:
                    growing.append((job.key, self._next_push(job, ready, self.runner.config.layers - 1)))
        if not growing or self.handoff is None:
            return None
        return self.handoff.push_layers(growing)

    def _push_whole(self, job: Job, ready: int) -> None:
        """Push the lease's blocks up to place `ready`, which are computed in full, all layers at once."""
        if ready > job.pushed and job.key is not None and self.handoff is not None:
            self.handoff.push(job.key, self._next_push(job, ready, None))

    def _next_push(self, job: Job, ready: int, layer: int | None) -> writer.Push:
        """The push of `layer` that finishes the lease's blocks up to place `ready`; held until it ended."""
        assert job.lease is not None
        assert job.to is not None
        assert job.key is not None
        ours, theirs = self.limits.page_size // job.block, job.to.fingerprint.page_size // job.block
        first = job.lease.first // job.block
        local = block_numbers(job.sequence.pages, ours, first + job.pushed, first + ready)
        remote = block_numbers(job.lease.pages, theirs, job.pushed, ready)
        push = writer.Push(local, remote, layer, final=ready == job.blocks)
        job.pushed = ready
        pages = pages_of(local, ours)
        self.cache.pool.hold(pages)
        self.pushes[job.key].append(_Reading(push, pages))
        return push

    # -- endings

    def _end(self, job: Job, reason: str) -> None:
        """Take a job out, wherever it is, with every page accounted for."""
        sequence = job.sequence
        if sequence in self.running:
            self.running.remove(sequence)
            self._part(job)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        if job.key is not None and self.handoff is not None:
            self.handoff.withdraw(job.key, reason)
        if job.leased and job.lease is not None and self.handoff is not None:
            del self.leased[job.lease.id]
            self.cache.pool.fence(job.leased, job.lease.id)
            log.info("lease fenced lease=%d pages=%d reason=%r", job.lease.id, len(job.leased), reason)
            self.fenced[job.lease.id] = job.leased
            job.leased = []
            self.handoff.revoke(job.lease.id)
        if job.loan in self.readback.lent and self.handoff is not None:
            self.handoff.revoke(job.loan)
        if job.reading is not None and self.handoff is not None:
            self.readback.give_up(self.handoff, job.reading, reason)
        self._part(job, keep=False)  # what it still has is not known to be right
        self._forget(job)

    def _part(self, job: Job, keep: bool = True) -> None:
        """Take a sequence's pages from it. While a lease still reads some of them, the lease holds them all."""
        pages = self.cache.part(job.sequence, keep)
        readings = None if job.key is None else self.pushes.get(job.key)
        if readings and pages:
            readings.append(_Reading(None, pages))
        else:
            self.cache.tree.release(pages)

    def _fail(self, job: Job, code: str, message: str) -> None:
        self._refuse(job.session, job.sequence.id, code, message)
        self._end(job, message)

    def fail_all(self, code: str, message: str) -> None:
        """Fail whatever a step may have touched, after one that raised. What is in its pages is not shared."""
        elsewhere = set(self.waiting)
        elsewhere |= {job.sequence for job in self.leased.values()}
        elsewhere |= {job.sequence for job in self.jobs.values() if job.handed_off or job.reading is not None}
        self.running.clear()
        for job in [job for job in self.jobs.values() if job.sequence not in elsewhere]:
            self._fail(job, code, message)

    def _refuse(self, session: int, request: str, code: str, message: str) -> None:
        self.stats.failures[code] = self.stats.failures.get(code, 0) + 1
        self._out.setdefault(session, []).append(Delta(request, failure=Failure(code, message)))

    def _new_job(self, session: int, frame: Submit | Reserve) -> Job | None:
        request, tokens, sampling = frame.id, frame.tokens, frame.sampling
        vocab = self.runner.vocab
        problem = None
        if (session, request) in self.jobs:
            problem = "bad_request", f"the id {request!r} is in use"
        elif not tokens or min(tokens) < 0 or max(tokens) >= vocab:
            problem = "bad_request", f"a prompt is one or more tokens from 0 to {vocab - 1}"
        elif sampling.max_tokens < 1:
            problem = "bad_request", f"max_tokens must be at least 1, not {sampling.max_tokens}"
        elif len(tokens) >= self.max_length:
            problem = "context_length_exceeded", f"the prompt has {len(tokens)} tokens, {self.max_length - 1} fit"
        elif 0 < self.queue.length <= len(self.waiting):
            problem = "overloaded", f"{len(self.waiting)} requests wait already"
        if problem is not None:
            self._refuse(session, request, *problem)
            return None
        self._arrivals += 1
        arrival = place_in_queue(self._arrivals, frame.priority)
        job = Job(session, Sequence(request, list(tokens), sampling, arrival, frame.salt), came=self._clock())
        self.jobs[job.id] = job
        self._job_of[job.sequence] = job
        return job

    def _forget(self, job: Job) -> None:
        self.jobs.pop(job.id, None)
        self._job_of.pop(job.sequence, None)
        if job.key is not None:
            self._job_of_key.pop(job.key, None)

    # -- what goes out

    def _emit(self, job: Job, delta: Delta) -> None:
        self._out.setdefault(job.session, []).append(delta)

    def _send(self, job: Job, frame: Leased) -> None:
        self._out.setdefault(job.session, []).append(frame)

    def drain(self) -> dict[int, list[Delta | Leased]]:
        """What each session is to be told, in order."""
        out, self._out = self._out, {}
        return out

    @property
    def owing(self) -> int:
        """Requests, and leases on either side, that have not ended."""
        return len(self.jobs) + len(self.fenced) + len(self.pushes) + self._loans

    @property
    def _loans(self) -> int:
        return len(self.readback.lent) + len(self.readback.reads)

    def load(self) -> Load:
        """The load now."""
        return Load(
            running=len(self.running),
            waiting=len(self.waiting),
            queued_tokens=sum(s.remaining for s in self.waiting) + sum(s.remaining for s in self.running),
            free_pages=self.cache.pool.count(Owner.FREE),
            cached_pages=self.cache.pool.count(Owner.CACHED),
            leases=len(self.leased) + len(self.fenced) + len(self.pushes) + self._loans,
            prefill_rate=round(self.prefill_rate),
            read_rate=0 if self.handoff is None else round(self.handoff.stats.read_rate),
        )

    def check(self) -> None:
        """Raise unless every page is accounted for."""
        held = [s.pages for s in self.running]
        held += [job.sequence.pages for job in self.leased.values()]
        held += self.readback.held()
        held += [list(reading.pages) for readings in self.pushes.values() for reading in readings]
        self.cache.pool.check(held, self.cache.tree.pages())
        self.cache.tree.check()

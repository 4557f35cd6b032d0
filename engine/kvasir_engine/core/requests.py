"""The requests of a worker: their state, where they wait or run, and the frames for their routers."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from kvasir_engine.connector.sender import Key
from kvasir_engine.core.request_validation import fault_of_prompt
from kvasir_engine.core.sequence import Sequence
from kvasir_engine.core.waiting_queue import QueueLimits, WaitingQueue, place_in_queue
from kvasir_engine.protocol import Delta, Endpoint, Failure, Lease, Leased, Reserve, Submit

JobId = tuple[int, str]  # session, the request's id in it


@dataclass(eq=False, slots=True)
class Job:
    """A request, and the leases and loans that belong to it."""

    session: int
    sequence: Sequence
    to: Endpoint | None = None  # prefill side: where the KV goes, under `lease`
    lease: Lease | None = None
    key: Key | None = None
    reading: Key | None = None  # the loan that is read under before the prompt is admitted
    compiling: bool = False  # its grammar is, before the prompt is admitted
    block: int = 0  # tokens of what is pushed as one: a page, or where page sizes differ the smaller
    blocks: int = 0  # how many of these the lease wants
    pushed: int = 0  # how many of these the transfer thread has been given
    handed_off: bool = False  # the prompt is computed, and the pages are the lease's to read
    writer: Endpoint | None = None  # decode side: who writes, into `leased`
    leased: list[int] = field(default_factory=list)
    threshold: int = 0
    lend_from: int | None = None  # tokens that the writer has; what we have beyond it may read
    loan: int | None = None
    nonces: bool = False  # the writer and the router know the nonces of leases
    canary: bool = False
    admitted: bool = False  # once: it has waited for its first step, or lease, no longer
    counted: int = 0  # tokens of the prompt whose KV's origin is counted
    came: float = 0.0  # by the engine's clock

    @property
    def id(self) -> JobId:
        return self.session, self.sequence.id


@dataclass
class TokenCounts:
    """Tokens of requests, each counted once, where it happened and when it had.

    Of a prompt that is prepared here, for this worker or another: `computed`, `cached` (in the tree) or `read` from
    another worker. Of one that another worker prepared: `received`, or `skipped` as it was here already. Behind it:
    `generated` are sampled, `forced` by a grammar without a step each.
    """

    computed: int = 0
    cached: int = 0
    read: int = 0
    received: int = 0
    skipped: int = 0
    generated: int = 0
    forced: int = 0


@dataclass
class Stats:
    """Counters since the start; read by the metrics collector from another thread."""

    requests: TokenCounts = field(default_factory=TokenCounts)
    canaries: TokenCounts = field(default_factory=TokenCounts)
    steps: int = 0
    replayed_steps: int = 0  # of those that computed: CUDA graphs, and what was launched kernel by kernel
    eager_steps: int = 0
    step_seconds: float = 0.0
    idle_seconds: float = 0.0  # the device waited for its next step, while there was work
    preemptions: int = 0
    received_pages: int = 0
    sent_pages: int = 0
    failures: dict[str, int] = field(default_factory=dict)
    rejected_messages: int = 0
    computed_tokens: int = 0
    proofs: dict[str, int] = field(default_factory=dict)  # leases that ended without their tokens, by proof

    def tokens(self, job: Job) -> TokenCounts:
        """Where the tokens of a job are counted."""
        return self.canaries if job.canary else self.requests

    def admitted(self, job: Job) -> None:
        """Its sequence has pages, with KV up to `computed`: again, if it gave way before."""
        found = min(job.sequence.computed, job.sequence.prompt) - job.counted
        if found > 0:
            read = min(found, job.sequence.read)
            self.tokens(job).read += read
            self.tokens(job).cached += found - read
            job.counted += found

    def computed(self, job: Job) -> None:
        """A step has computed its sequence up to `done`."""
        new = min(job.sequence.done, job.sequence.prompt) - job.counted
        if new > 0:
            self.tokens(job).computed += new
            job.counted += new

    def received(self, job: Job) -> None:
        """Another worker has written its prompt's KV behind what was here."""
        self.tokens(job).skipped += job.sequence.computed
        self.tokens(job).received += job.sequence.prompt - job.sequence.computed
        job.counted = job.sequence.prompt


class Requests:
    """All requests that have not ended. `vocab` and `max_length` bound a prompt, `queue` those that wait.

    `grammars`: whether there is who compiles them.
    """

    def __init__(
        self,
        vocab: int,
        max_length: int,
        queue: QueueLimits,
        stats: Stats,
        clock: Callable[[], float],
        grammars: bool = False,
    ) -> None:
        self.queue = queue
        self.jobs: dict[JobId, Job] = {}
        self.waiting = WaitingQueue()
        self.running: list[Sequence] = []  # in order of arrival
        self._of: dict[Sequence, Job] = {}
        self._vocab = vocab
        self._grammars = grammars
        self._max_length = max_length
        self._stats = stats
        self.clock = clock
        self._expiry = -math.inf
        self._arrivals = 0
        self._out: dict[int, list[Delta | Leased]] = {}

    def new(self, session: int, frame: Submit | Reserve, compiling: int = 0) -> Job | None:
        """A job for `frame`, in no queue yet; None if its router has been told why there is none.

        `compiling`: requests that wait though they are not in the queue.
        """
        request, tokens, sampling = frame.id, frame.tokens, frame.sampling
        vocab = self._vocab
        problem = None
        if (session, request) in self.jobs:
            problem = "bad_request", f"the id {request!r} is in use"
        elif fault := fault_of_prompt(tokens, sampling, vocab, self._grammars):
            problem = "bad_request", fault
        elif len(tokens) >= self._max_length:
            problem = "context_length_exceeded", f"the prompt has {len(tokens)} tokens, {self._max_length - 1} fit"
        elif 0 < self.queue.length <= (wait := len(self.waiting) + compiling):
            problem = "overloaded", f"{wait} requests wait already"
        if problem is not None:
            self.refuse(session, request, *problem)
            return None
        self._arrivals += 1
        arrival = place_in_queue(self._arrivals, frame.priority)
        sequence = Sequence(request, list(tokens), sampling, arrival, frame.salt)
        sequence.limit = min(len(tokens) + sampling.max_tokens, self._max_length)
        job = Job(session, sequence, canary=frame.canary, came=self.clock())
        self.jobs[job.id] = job
        self._of[job.sequence] = job
        return job

    def of(self, sequence: Sequence) -> Job:
        """The job of a sequence that has not ended."""
        return self._of[sequence]

    def find(self, sequence: Sequence) -> Job | None:
        """The job of a sequence, if it has not ended."""
        return self._of.get(sequence)

    def run(self, sequence: Sequence) -> None:
        """Start to run a sequence, in order of arrival."""
        place = next((i for i, s in enumerate(self.running) if s.arrival > sequence.arrival), len(self.running))
        self.running.insert(place, sequence)

    def expired(self) -> list[Job]:
        """Those that waited too long for their first step. Looked at ten times within the limit."""
        now, seconds = self.clock(), self.queue.seconds
        if seconds == 0 or now < self._expiry:
            return []
        self._expiry = now + seconds / 10
        waiting = [self._of[sequence] for sequence in self.waiting]
        return [job for job in waiting if not job.admitted and now - job.came >= seconds]

    def forget(self, job: Job) -> None:
        """Forget a job that has ended. Idempotent."""
        self.jobs.pop(job.id, None)
        self._of.pop(job.sequence, None)

    # -- what goes out

    def tell(self, job: Job, frame: Delta | Leased) -> None:
        """Queue a frame for the job's router."""
        self._out.setdefault(job.session, []).append(frame)

    def refuse(self, session: int, request: str, code: str, message: str) -> None:
        """Tell a router that a request fails."""
        self._stats.failures[code] = self._stats.failures.get(code, 0) + 1
        self._out.setdefault(session, []).append(Delta(request, failure=Failure(code, message)))

    def silence(self, session: int) -> None:
        """Drop the frames of a session that is gone."""
        self._out.pop(session, None)

    def drain(self) -> dict[int, list[Delta | Leased]]:
        """Take the frames for each session, in order."""
        out, self._out = self._out, {}
        return out

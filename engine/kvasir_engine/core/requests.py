"""The requests of a worker, waiting and running, and the frames for their routers."""

import math
from collections.abc import Callable

from kvasir_engine.core.jobs import Job, JobId, job_of
from kvasir_engine.core.request_validation import fault_of_prompt
from kvasir_engine.core.sequence import Sequence
from kvasir_engine.core.stats import Stats
from kvasir_engine.core.waiting_queue import QueueLimits, WaitingQueue, place_in_queue
from kvasir_engine.protocol import Delta, Failure, Leased, Reserve, Submit


class Requests:
    """All requests that have not ended. `vocab` and `max_length` bound a prompt, `queue` those that wait.

    `grammars`: whether this worker compiles grammars.
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
        """Create a job for `frame`, not queued yet; `None` if it is refused, and its router has the reason.

        `compiling`: the number of waiting requests that are not in the queue.
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
        sequence.remote = isinstance(frame, Reserve)
        job = job_of(frame, session, sequence, self.clock())
        self.jobs[job.id] = job
        self._of[job.sequence] = job
        return job

    def of(self, sequence: Sequence) -> Job:
        """The job of a sequence that has not ended."""
        return self._of[sequence]

    def find(self, sequence: Sequence) -> Job | None:
        """The job of a sequence, or `None` if it has ended."""
        return self._of.get(sequence)

    def run(self, sequence: Sequence) -> None:
        """Start to run a sequence, in order of arrival."""
        place = next((i for i, s in enumerate(self.running) if s.arrival > sequence.arrival), len(self.running))
        self.running.insert(place, sequence)

    def expired(self) -> list[Job]:
        """The jobs that have waited too long for their first step. Checks ten times within the limit."""
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

    def send(self, job: Job, frame: Delta | Leased) -> None:
        """Queue a frame for the job's router."""
        self._out.setdefault(job.session, []).append(frame)

    def refuse(self, session: int, request: str, code: str, message: str) -> None:
        """Send a router the failure of a request."""
        self._stats.failures[code] = self._stats.failures.get(code, 0) + 1
        self._out.setdefault(session, []).append(Delta(request, failure=Failure(code, message)))

    def drop_session(self, session: int) -> None:
        """Drop the frames of a closed session."""
        self._out.pop(session, None)

    def drain(self) -> dict[int, list[Delta | Leased]]:
        """Take the frames for each session, in order."""
        out, self._out = self._out, {}
        return out

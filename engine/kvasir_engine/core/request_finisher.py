"""Ends requests, whatever their state, and accounts for all their pages."""

from kvasir_engine.core.jobs import DecodeJob, Job, PrefillJob
from kvasir_engine.core.leases import Leases
from kvasir_engine.core.page_releaser import PageReleaser
from kvasir_engine.core.pushes import Pushes
from kvasir_engine.core.readback import Readback
from kvasir_engine.core.requests import Requests


class RequestFinisher:
    """Removes requests from the queue and the running ones, and ends their handoffs with other workers."""

    def __init__(
        self, requests: Requests, pages: PageReleaser, pushes: Pushes, leases: Leases, readback: Readback
    ) -> None:
        self._requests = requests
        self._pages = pages
        self._pushes = pushes
        self._leases = leases
        self._readback = readback

    def end(self, job: Job, reason: str) -> None:
        """Remove a job, whatever its state, and account for all its pages."""
        sequence = job.sequence
        if sequence in self._requests.running:
            self._requests.running.remove(sequence)
            self._pages.release(job)
        elif sequence in self._requests.waiting:
            self._requests.waiting.remove(sequence)
        match job:
            case PrefillJob():
                self._pushes.withdraw(job, reason)
                if job.reading is not None:
                    self._readback.give_up(job.reading, reason)
            case DecodeJob():
                self._leases.give_up(job, reason)
        self._pages.release(job, keep=False)  # its last pages may be incomplete
        self.forget(job)

    def fail(self, job: Job, code: str, message: str) -> None:
        """End a job, and send its router the reason."""
        self._requests.refuse(job.session, job.sequence.id, code, message)
        self.end(job, message)

    def fail_computing(self, code: str, message: str) -> None:
        """Fail all jobs that a step may have touched. None of their pages enters the tree."""
        self._requests.running.clear()
        jobs, waiting = list(self._requests.jobs.values()), self._requests.waiting
        for job in [job for job in jobs if not job.untouched and job.sequence not in waiting]:
            self.fail(job, code, message)

    def finish(self, job: Job) -> None:
        """End a running job. Its computed pages enter the tree; all its pages are released."""
        self._requests.running.remove(job.sequence)
        self._pages.release(job)

    def forget(self, job: Job) -> None:
        """Forget a job that has ended. Idempotent."""
        self._requests.forget(job)
        if isinstance(job, PrefillJob):
            self._pushes.forget(job)

"""How requests end, wherever they are, with every page accounted for."""

from kvasir_engine.core.jobs import DecodeJob, Job, PrefillJob
from kvasir_engine.core.leases import Leases
from kvasir_engine.core.page_releaser import PageReleaser
from kvasir_engine.core.pushes import Pushes
from kvasir_engine.core.readback import Readback
from kvasir_engine.core.requests import Requests


class RequestFinisher:
    """Takes requests out of the queue and the running ones, and ends what was begun for them with other workers."""

    def __init__(
        self, requests: Requests, pages: PageReleaser, pushes: Pushes, leases: Leases, readback: Readback
    ) -> None:
        self._requests = requests
        self._pages = pages
        self._pushes = pushes
        self._leases = leases
        self._readback = readback

    def end(self, job: Job, reason: str) -> None:
        """Take a job out, wherever it is, with every page accounted for."""
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
        """End a job and tell its router why."""
        self._requests.refuse(job.session, job.sequence.id, code, message)
        self.end(job, message)

    def fail_computing(self, code: str, message: str) -> None:
        """Fail all jobs that a step may have touched. The tree gets none of their pages."""
        self._requests.running.clear()
        jobs, waiting = list(self._requests.jobs.values()), self._requests.waiting
        for job in [job for job in jobs if not job.untouched and job.sequence not in waiting]:
            self.fail(job, code, message)

    def finish(self, job: Job) -> None:
        """Stop running a job. The tree keeps what it computed; the job's pages are released."""
        self._requests.running.remove(job.sequence)
        self._pages.release(job)

    def forget(self, job: Job) -> None:
        """Forget a job that has ended. Idempotent."""
        self._requests.forget(job)
        if isinstance(job, PrefillJob):
            self._pushes.forget(job)

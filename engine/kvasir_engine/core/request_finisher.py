"""How requests end, wherever they are, with every page accounted for."""

from kvasir_engine.connector.kv_connector import KVConnector
from kvasir_engine.core.inflight_steps import InflightSteps
from kvasir_engine.core.kv_cache_manager import KVCacheManager
from kvasir_engine.core.leases import Leases
from kvasir_engine.core.pushes import Pushes
from kvasir_engine.core.readback import Readback
from kvasir_engine.core.requests import Job, Requests


class RequestFinisher:
    """Takes requests and their pages out of all that an engine consists of."""

    def __init__(
        self,
        requests: Requests,
        cache: KVCacheManager,
        inflight: InflightSteps,
        pushes: Pushes,
        leases: Leases,
        readback: Readback,
        connector: KVConnector | None,
    ) -> None:
        self._requests = requests
        self._cache = cache
        self._steps = inflight
        self._pushes = pushes
        self._leases = leases
        self._readback = readback
        self._connector = connector

    def end(self, job: Job, reason: str) -> None:
        """Take a job out, wherever it is, with every page accounted for."""
        sequence = job.sequence
        if sequence in self._requests.running:
            self._requests.running.remove(sequence)
            self.part(job)
        elif sequence in self._requests.waiting:
            self._requests.waiting.remove(sequence)
        self._pushes.withdraw(job, reason)
        self._leases.give_up(job, reason)
        if job.reading is not None and self._connector is not None:
            self._readback.give_up(self._connector, job.reading, reason)
        self.part(job, keep=False)  # its last pages may be incomplete
        self.forget(job)

    def fail(self, job: Job, code: str, message: str) -> None:
        """End a job and tell its router why."""
        self._requests.refuse(job.session, job.sequence.id, code, message)
        self.end(job, message)

    def fail_all(self, code: str, message: str) -> None:
        """Fail all requests that a step which raised may have touched. The tree gets none of their pages."""
        self._steps.drop()
        elsewhere = set(self._requests.waiting)
        elsewhere |= {job.sequence for job in self._leases.open.values()}
        jobs = self._requests.jobs.values()
        elsewhere |= {job.sequence for job in jobs if job.handed_off or job.reading is not None or job.compiling}
        self._requests.running.clear()
        for job in [job for job in jobs if job.sequence not in elsewhere]:
            self.fail(job, code, message)

    def finish(self, job: Job) -> None:
        """Stop running a job. The tree keeps what it computed; the job's pages are released."""
        self._requests.running.remove(job.sequence)
        self.part(job)

    def part(self, job: Job, keep: bool = True) -> None:
        """Take a sequence's pages from it. A step or a lease that reads some of them keeps them held."""
        pages = self._steps.part(job.sequence, keep)
        if not self._pushes.keep(job, pages):
            self._cache.tree.release(pages)

    def forget(self, job: Job) -> None:
        """Forget a job that has ended. Idempotent."""
        self._requests.forget(job)
        self._pushes.forget(job)

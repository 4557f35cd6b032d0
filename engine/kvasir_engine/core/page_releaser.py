"""Releases the pages of sequences while steps and pushes may still read them."""

from kvasir_engine.core.inflight_steps import InflightSteps
from kvasir_engine.core.jobs import Job, PrefillJob
from kvasir_engine.core.kv_cache_manager import KVCacheManager
from kvasir_engine.core.pushes import Pushes


class PageReleaser:
    """Takes the pages of sequences that end or are preempted."""

    def __init__(self, cache: KVCacheManager, inflight: InflightSteps, pushes: Pushes) -> None:
        self._cache = cache
        self._inflight = inflight
        self._pushes = pushes

    def release(self, job: Job, keep: bool = True) -> None:
        """Take the pages of a job's sequence. With `keep` the computed ones enter the tree.

        Steps in flight, and the job's lease, go on holding the pages that they read.
        """
        pages = self._inflight.detach(job.sequence, keep)
        if not (isinstance(job, PrefillJob) and self._pushes.keep(job, pages)):
            self._cache.tree.release(pages)

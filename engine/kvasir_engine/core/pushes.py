"""The prefill side of handoffs: KV that is pushed into other workers' leases, and the pages held meanwhile."""

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from kvasir_engine import faults
from kvasir_engine.connector import sender
from kvasir_engine.connector.kv_connector import KVConnector, LayerPush
from kvasir_engine.connector.layout import block_numbers, block_tokens, pages_of
from kvasir_engine.connector.notifications import Complete
from kvasir_engine.core.kv_cache_manager import KVCacheManager
from kvasir_engine.core.requests import Job, Stats
from kvasir_engine.protocol import Endpoint, Lease, TokenLogprobs

PUSH_BLOCKS = 32
"""Blocks of one write of what was cached: the holder compares the digests of some while the next come."""


@dataclass(eq=False, frozen=True)
class _Reading:
    """A push that has not ended and the pages that it reads; without a push, pages that the sequence has left."""

    push: sender.Push | None
    pages: Seq[int]


class Pushes:
    """Leases of others that we write under. Pages are in the cache's pool; a model has `layers`."""

    def __init__(self, cache: KVCacheManager, connector: KVConnector | None, layers: int, stats: Stats) -> None:
        self.open: dict[sender.Key, list[_Reading]] = {}
        self._jobs: dict[sender.Key, Job] = {}
        self._cache = cache
        self._connector = connector
        self._layers = layers
        self._stats = stats

    def begin(self, job: Job, to: Endpoint, lease: Lease) -> str | None:
        """Write the KV of a job's prompt under `lease`. What is wrong with the lease, or None."""
        assert self._connector is not None
        stranger = lease.not_for(self._connector.endpoint)
        if stranger is not None:
            return stranger
        tokens = len(job.sequence.tokens)
        page_size, theirs = self._cache.page_size, to.fingerprint.page_size
        pages = -(-tokens // theirs) - lease.first // theirs
        fits = lease.first % theirs == 0 and pages == len(lease.pages)
        if not fits or (to.agent, lease.id) in self.open:
            why = "is in use" if fits else "does not fit the prompt"
            return f"the lease {why}"
        job.lease, job.to = lease, to
        job.sequence.limit = tokens + 1
        job.block = block_tokens(page_size, theirs)
        job.blocks = -(-tokens // job.block) - lease.first // job.block
        job.key = self._connector.open(to, lease)
        self.open[job.key] = []
        self._jobs[job.key] = job
        faults.hit("prefill.submitted")
        return None

    # -- as the prompt is computed

    def of_chunks(self, chunks: Iterable[tuple[Job, int]]) -> Callable[[int], None] | None:
        """The callback that pushes each computed layer of the lease pages that this step completes."""
        growing: list[LayerPush] = []
        for job, count in chunks:
            sequence = job.sequence
            if job.key is not None and job.lease is not None and sequence.generated == 0:
                first = job.lease.first // job.block
                # What the tree had, if anything; a page that is copied from it goes with those that are computed.
                whole = sequence.computed // self._cache.page_size
                self._push_whole(job, whole * self._cache.page_size // job.block - first)
                end = sequence.computed + count
                ready = job.blocks if end == len(sequence.tokens) else end // job.block - first
                if ready > job.pushed:
                    growing.append((job.key, self._next(job, ready, self._layers - 1)))
        if not growing or self._connector is None:
            return None
        return self._connector.push_layers(growing)

    def complete(self, job: Job, prompt: int, token: int, logprobs: TokenLogprobs | None) -> None:
        """All of the prompt is computed and pushed, and its first token sampled."""
        assert self._connector is not None
        assert job.key is not None
        assert job.lease is not None
        lease = job.lease
        complete = Complete(lease.id, lease.epoch, prompt, job.blocks, token, logprobs, lease.nonce)
        self._connector.push(job.key, sender.Push(complete=complete))
        job.handed_off = True

    def _push_whole(self, job: Job, ready: int) -> None:
        """Push the lease's blocks up to place `ready`, which are computed in full, all layers of some at once."""
        while ready > job.pushed and job.key is not None and self._connector is not None:
            self._connector.push(job.key, self._next(job, min(ready, job.pushed + PUSH_BLOCKS), None))

    def _next(self, job: Job, ready: int, layer: int | None) -> sender.Push:
        """The push of `layer` that finishes the lease's blocks up to place `ready`; held until it ended."""
        assert job.lease is not None
        assert job.to is not None
        assert job.key is not None
        ours, theirs = self._cache.page_size // job.block, job.to.fingerprint.page_size // job.block
        first = job.lease.first // job.block
        local = block_numbers(job.sequence.pages, ours, first + job.pushed, first + ready)
        remote = block_numbers(job.lease.pages, theirs, job.pushed, ready)
        push = sender.Push(local, remote, layer, final=ready == job.blocks)
        job.pushed = ready
        pages = pages_of(local, ours)
        self._cache.pool.hold(pages)
        self.open[job.key].append(_Reading(push, pages))
        return push

    # -- events

    def ended(self, key: sender.Key, push: sender.Push) -> Job | None:
        """A push is done. Returns its job if that was the last push and the job has not ended."""
        if push.complete is None:
            reading = next(reading for reading in self.open[key] if reading.push is push)
            self.open[key].remove(reading)
            self._cache.tree.release(reading.pages)
            self._stats.sent_pages += len(reading.pages)
            return None
        for reading in self.open.pop(key):
            self._cache.tree.release(reading.pages)
        return self._jobs.get(key)

    def failed(self, key: sender.Key) -> Job | None:
        """The lease has failed. Returns its job if that has not ended."""
        for reading in self.open.pop(key, []):
            self._cache.tree.release(reading.pages)
        job = self._jobs.pop(key, None)
        if job is not None:
            job.key = None
        return job

    def withdraw(self, job: Job, reason: str) -> None:
        """Push no more for this job. Idempotent."""
        if job.key is not None and self._connector is not None:
            self._connector.withdraw(job.key, reason)

    def keep(self, job: Job, pages: list[int]) -> bool:
        """Hold pages that the job's sequence leaves while its lease reads some of them. False: it reads none."""
        readings = None if job.key is None else self.open.get(job.key)
        if readings and pages:
            readings.append(_Reading(None, pages))
            return True
        return False

    def forget(self, job: Job) -> None:
        """The job has ended; its pushes may not have. Idempotent."""
        if job.key is not None:
            self._jobs.pop(job.key, None)

    def held(self) -> list[list[int]]:
        """The pages that pushes hold."""
        return [list(reading.pages) for readings in self.open.values() for reading in readings]

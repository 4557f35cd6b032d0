"""The prefill side of handoffs: KV that is pushed into other workers' leases, and the pages that pushes hold."""

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from kvasir_engine import faults
from kvasir_engine.connector import sender
from kvasir_engine.connector.kv_connector import KVConnector
from kvasir_engine.connector.layout import block_numbers, block_tokens, pages_of
from kvasir_engine.connector.notifications import Complete
from kvasir_engine.core.jobs import Job, PrefillJob
from kvasir_engine.core.kv_cache_manager import KVCacheManager
from kvasir_engine.core.stats import Stats
from kvasir_engine.protocol import TokenLogprobs

PUSH_BLOCKS = 32
"""Blocks of one write of what was cached: the holder compares the digests of some while the next come."""


@dataclass(eq=False, frozen=True)
class _Reading:
    """A push that has not ended and the pages that it reads; without a push, pages that the sequence has
    released."""

    push: sender.Push | None
    pages: Seq[int]


@dataclass(eq=False)
class _PushedLease:
    """The pushes of one lease. It may outlive its job, which is `None` then.

    `block`: tokens of a block, the unit of pushes: the smaller of both page sizes. The lease covers `blocks` blocks
    of the prompt from place `first` on; `pushed` of them have been given to the transfer thread.
    """

    job: PrefillJob | None
    block: int
    first: int
    blocks: int
    pushed: int = 0
    readings: list[_Reading] = field(default_factory=list)


class Pushes:
    """The leases of other workers into which this one writes. Pages are of the cache's pool; the model has
    `layers`."""

    def __init__(self, cache: KVCacheManager, connector: KVConnector | None, layers: int, stats: Stats) -> None:
        self.open: dict[sender.Key, _PushedLease] = {}
        self._cache = cache
        self._connector = connector
        self._layers = layers
        self._stats = stats

    def begin(self, job: PrefillJob) -> str | None:
        """Start to push the KV of a job's prompt under its lease. Returns what is wrong with the lease, or
        `None`."""
        assert self._connector is not None
        lease, theirs = job.lease, job.to.fingerprint.page_size
        stranger = lease.not_for(self._connector.endpoint)
        if stranger is not None:
            return stranger
        tokens = len(job.sequence.tokens)
        pages = -(-tokens // theirs) - lease.first // theirs
        fits = lease.first % theirs == 0 and pages == len(lease.pages)
        if not fits or job.key in self.open:
            why = "is in use" if fits else "does not fit the prompt"
            return f"the lease {why}"
        job.sequence.limit = tokens + 1
        block = block_tokens(self._cache.page_size, theirs)
        first = lease.first // block
        self._connector.open(job.to, lease)
        self.open[job.key] = _PushedLease(job, block, first, blocks=-(-tokens // block) - first)
        faults.hit("prefill.submitted")
        return None

    def _of(self, job: PrefillJob) -> _PushedLease | None:
        """The lease of a job; `None` once its pushes have ended."""
        pushed = self.open.get(job.key)
        return pushed if pushed is not None and pushed.job is job else None

    # -- as the prompt is computed

    def of_chunks(self, chunks: Iterable[tuple[Job, int]]) -> Callable[[int], None] | None:
        """The callback that pushes each computed layer of the lease pages that this step completes."""
        growing: list[sender.LayerPush] = []
        for job, count in chunks:
            sequence = job.sequence
            if not isinstance(job, PrefillJob) or sequence.generated or (lease := self._of(job)) is None:
                continue
            # What the tree had, if anything; a page that is copied from it goes with those that are computed.
            whole = sequence.computed // self._cache.page_size
            self._push_whole(job, lease, whole * self._cache.page_size // lease.block - lease.first)
            end = sequence.computed + count
            ready = lease.blocks if end == len(sequence.tokens) else end // lease.block - lease.first
            if ready > lease.pushed:
                growing.append((job.key, self._next(job, lease, ready, self._layers - 1)))
        if not growing or self._connector is None:
            return None
        return self._connector.push_layers(growing)

    def complete(self, job: PrefillJob, prompt: int, token: int, logprobs: TokenLogprobs | None) -> None:
        """Complete the lease of a job: its prompt is computed and pushed, its first token sampled."""
        assert self._connector is not None
        lease, blocks = job.lease, self.open[job.key].blocks
        complete = Complete(lease.id, lease.epoch, prompt, blocks, token, logprobs, lease.nonce)
        self._connector.push(job.key, sender.Push(complete=complete))
        job.handed_off = True

    def _push_whole(self, job: PrefillJob, lease: _PushedLease, ready: int) -> None:
        """Push all layers of the lease's computed blocks up to place `ready`."""
        while ready > lease.pushed and self._connector is not None:
            push = self._next(job, lease, min(ready, lease.pushed + PUSH_BLOCKS), None)
            self._connector.push(job.key, push)

    def _next(self, job: PrefillJob, lease: _PushedLease, ready: int, layer: int | None) -> sender.Push:
        """The next push of the lease, for its blocks up to place `ready`. Its pages are held until it ends."""
        ours = self._cache.page_size // lease.block
        theirs = job.to.fingerprint.page_size // lease.block
        local = block_numbers(job.sequence.pages, ours, lease.first + lease.pushed, lease.first + ready)
        remote = block_numbers(job.lease.pages, theirs, lease.pushed, ready)
        push = sender.Push(local, remote, layer, final=ready == lease.blocks)
        lease.pushed = ready
        pages = pages_of(local, ours)
        self._cache.pool.hold(pages)
        lease.readings.append(_Reading(push, pages))
        return push

    # -- events

    def ended(self, key: sender.Key, push: sender.Push) -> PrefillJob | None:
        """Release the pages of a push that has ended. Returns its job if it was the last push and the job has not
        ended."""
        lease = self.open[key]
        if push.complete is None:
            reading = next(reading for reading in lease.readings if reading.push is push)
            lease.readings.remove(reading)
            self._cache.tree.release(reading.pages)
            self._stats.sent_pages += len(reading.pages)
            return None
        return self._close(key)

    def failed(self, key: sender.Key) -> PrefillJob | None:
        """Release the pages of a failed lease. Returns its job if that has not ended."""
        return self._close(key) if key in self.open else None

    def _close(self, key: sender.Key) -> PrefillJob | None:
        lease = self.open.pop(key)
        for reading in lease.readings:
            self._cache.tree.release(reading.pages)
        return lease.job

    def withdraw(self, job: PrefillJob, reason: str) -> None:
        """Stop the pushes of a job. Idempotent."""
        if self._of(job) is not None and self._connector is not None:
            self._connector.withdraw(job.key, reason)

    def keep(self, job: PrefillJob, pages: list[int]) -> bool:
        """Hold pages that the job's sequence releases while its pushes read some of them. False if they read
        none."""
        lease = self._of(job)
        if lease is not None and lease.readings and pages:
            lease.readings.append(_Reading(None, pages))
            return True
        return False

    def forget(self, job: PrefillJob) -> None:
        """Note that the job has ended. Its pushes may go on. Idempotent."""
        lease = self._of(job)
        if lease is not None:
            lease.job = None

    def held(self) -> list[list[int]]:
        """The pages that pushes hold."""
        return [list(reading.pages) for lease in self.open.values() for reading in lease.readings]

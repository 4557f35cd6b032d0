"""The decode side of handoffs: pages that other workers write, until there is proof that they have stopped."""

import logging
import secrets
from dataclasses import dataclass

from kvasir_engine.connector import receiver
from kvasir_engine.connector.kv_connector import KVConnector
from kvasir_engine.connector.notifications import Complete
from kvasir_engine.core.jobs import DecodeJob
from kvasir_engine.core.kv_cache_manager import KVCacheManager
from kvasir_engine.core.loans import Loans
from kvasir_engine.core.stats import Stats
from kvasir_engine.protocol import Lease

log = logging.getLogger("engine")

LEASE_SECONDS = 600.0
"""A lease covers the prompt's wait at prefill. A dead or silent writer is found by pings, long before."""


@dataclass(frozen=True)
class RefusedCompletion:
    """The writer has completed a prompt that is not the job's."""

    job: DecodeJob
    why: str


class Leases:
    """The leases that this worker has granted, and their loans."""

    def __init__(
        self, cache: KVCacheManager, connector: KVConnector | None, loans: Loans, epoch: int, stats: Stats
    ) -> None:
        self.open: dict[int, DecodeJob] = {}
        self.fenced: dict[int, list[int]] = {}  # leases that wait for a proof, with their pages
        self._cache = cache
        self._connector = connector
        self._loans = loans
        self._epoch = epoch
        self._stats = stats
        self._ids = 0

    def grant(self, job: DecodeJob) -> Lease:
        """Lease the job's writer pages for the missing part of the prompt, and lend it cached pages that it
        lacks."""
        assert self._connector is not None
        # In the order in which the ranks hear of them, by which they tell what is new to them from what has ended.
        loan_id, lease_id = self._ids + 1, self._ids + 2
        self._ids += 2
        job.leased = self._cache.reserve(job.sequence, lease_id)
        loan = None
        if job.lend_from is not None:
            cached = job.sequence.pages
            loan = self._loans.lend(job.writer, cached, job.lend_from, loan_id, self._epoch, _nonce(job))
            job.loan = None if loan is None else loan.id
        lease = Lease(
            id=lease_id,
            epoch=self._epoch,
            pages=job.leased,
            first=job.sequence.computed,
            seconds=LEASE_SECONDS,
            writer=job.writer.agent,
            writer_epoch=job.writer.epoch,
            loan=loan,
            nonce=_nonce(job),
        )
        job.lease = lease
        self.open[lease.id] = job
        self._connector.grant(lease, job.writer, len(job.sequence.tokens) - lease.first)
        return lease

    def settle(self, lease: int, complete: Complete) -> DecodeJob | RefusedCompletion | None:
        """Settle a lease whose KV is complete. Returns its job, or `None` if the job has ended."""
        pages = self.fenced.pop(lease, None)
        if pages is not None:
            self._cache.pool.reclaim(pages, lease)
            return None
        job = self.open.pop(lease)
        sequence = job.sequence
        if complete.tokens != len(sequence.tokens):
            self._cache.pool.reclaim(job.leased, lease)
            job.leased = []
            return RefusedCompletion(job, f"prefill completed {complete.tokens} tokens of {len(sequence.tokens)}")
        self._cache.pool.settle(job.leased, lease)
        self._stats.received_pages += len(job.leased)
        self._stats.received(job)
        sequence.pages += job.leased
        sequence.computed = sequence.done = len(sequence.tokens)
        job.leased = []
        sequence.remote = False
        sequence.scored = sequence.prompt  # where that was asked for: the writer tells the router
        return job

    def reclaim(self, event: receiver.Reclaimed) -> DecodeJob | None:
        """Reclaim a lease's pages on proof that the writer has stopped. Returns the job that fails by it, if it
        waits."""
        job = None
        pages = self.fenced.pop(event.lease, None)
        if pages is None:
            job = self.open.pop(event.lease)
            pages, job.leased = job.leased, []
        self._cache.pool.reclaim(pages, event.lease)
        self._stats.proofs[event.proof] = self._stats.proofs.get(event.proof, 0) + 1
        log.info("lease reclaimed lease=%d proof=%s pages=%d", event.lease, event.proof, len(pages))
        return job

    def give_up(self, job: DecodeJob, reason: str) -> None:
        """Fence the pages that are leased for a job that ends, and take back its loan. Idempotent."""
        if job.leased and job.lease is not None and self._connector is not None:
            del self.open[job.lease.id]
            self._cache.pool.fence(job.leased, job.lease.id)
            log.info("lease fenced lease=%d pages=%d reason=%r", job.lease.id, len(job.leased), reason)
            self.fenced[job.lease.id] = job.leased
            job.leased = []
            self._connector.revoke(job.lease.id)
        if job.loan is not None:
            self._loans.take_back(job.loan)


def _nonce(job: DecodeJob) -> int:
    """A new random nonce; 0 if the router or the writer does not support nonces."""
    return secrets.randbelow((1 << 64) - 1) + 1 if job.nonces else 0

"""The pool of workers as one EngineClient: placement, retries, and streams that survive the failure of a worker."""

import asyncio
import dataclasses
import itertools
import logging
import random
from collections.abc import AsyncGenerator
from contextlib import aclosing

import msgspec
from prometheus_client import CollectorRegistry, Counter, Gauge

from kvasir_engine.engine_client import EngineError, GenerateRequest, Output
from kvasir_engine.kv.hashing import page_hashes
from kvasir_engine.protocol import GRAMMAR, LOGPROB_START, PROCESSORS, PROMPT_LOGPROBS, LogitsProcessors, Sampling
from kvasir_engine.router.attempt import Attempt, Target, WorkerFailed
from kvasir_engine.router.connection import Peer, WorkerConnection
from kvasir_engine.router.load_meter import LoadMeter, Stopwatch
from kvasir_engine.router.model_server_metrics import ModelServerCollector
from kvasir_engine.router.placement import Candidate, place
from kvasir_engine.router.pool import PoolCollector, WorkerPool
from kvasir_engine.router.quarantine import CANARY_SECONDS, MISMATCH, Quarantine

log = logging.getLogger("router")

# A request that this many workers failed at is not given to another: it may be what ends them.
MOST_FAILURES = 6
# Failures that every worker would answer with.
REQUEST_FAULTS = frozenset({"bad_request", "context_length_exceeded", "no_token_allowed"})
CANARY_TOKENS = 48
CANARY_VOCABULARY = 64  # token ids below this exist in every model
# Hashing more tokens than this would hold up the event loop for more than a fraction of a millisecond.
HASH_OFF_LOOP = 2048


class PooledClient:
    """Implements EngineClient over a WorkerPool.

    `remote_threshold`: a prompt is prefilled on the decode worker when that lacks fewer tokens of it. `max_length`
    is an upper bound on the workers' own (0: none). A request that lost its worker, or finds no ready worker while
    one is expected, waits up to `resume_seconds`. Where workers are started on demand, up to `hold_requests`
    requests wait `hold_seconds` (0: none wait) though no worker is known, and the router counts as ready.
    """

    def __init__(
        self,
        pool: WorkerPool,
        *,
        registry: CollectorRegistry,
        remote_threshold: int,
        max_length: int = 0,
        resume_seconds: float = 5.0,
        canary_seconds: float = CANARY_SECONDS,
        hold_seconds: float = 0.0,
        hold_requests: int = 0,
    ) -> None:
        self._pool = pool
        self._threshold = remote_threshold
        self._max_length = max_length
        self._resume_seconds = resume_seconds
        self._hold_seconds = hold_seconds
        self._hold_requests = hold_requests
        self.load = LoadMeter()
        self._ids = (f"{n:x}" for n in itertools.count())
        self._retries = Counter(
            "kvasir_router_retries",
            "Attempts that failed and were retried.",
            ["reason"],
            registry=registry,
        )
        PoolCollector(pool, registry)
        ModelServerCollector(pool, lambda: self.load.held, registry)
        self.quarantine = Quarantine(self._released, canary_seconds)
        Gauge(
            "kvasir_router_quarantined_pairs",
            "Pairs of workers that move no KV until a canary passes.",
            registry=registry,
        ).set_function(lambda: len(self.quarantine))
        Gauge(
            "kvasir_router_held", "Requests that wait for the first worker to start.", registry=registry
        ).set_function(lambda: self.load.held)

    async def close(self) -> None:
        """Stop the background tasks."""
        await self.quarantine.close()

    @property
    def max_length(self) -> int:
        return min((length for length in (self._max_length, self._pool.max_length) if length), default=0)

    def unready_reason(self) -> str | None:
        """See EngineClient. A router that holds requests takes them at any time."""
        return None if self._hold_seconds else self._pool.unready_reason()

    def unready_workers(self) -> str:
        """The same for the operator, with the workers' names; empty if there is no reason."""
        return "" if self._hold_seconds else self._pool.unready_workers()

    async def wait_ready(self) -> str | None:
        """See EngineClient. Waits up to `resume_seconds`, or `hold_seconds`, for an expected worker."""
        if self._pool.unready_reason() is None:
            return None
        if not self._may_hold():
            return await self._wait_for_worker(0.0)
        with self.load.hold() as held:
            reason = await self._wait_for_worker(self._hold_seconds)
            held.released = reason is None
        return reason

    def _may_hold(self) -> bool:
        return self._hold_seconds > 0 and self.load.held < self._hold_requests

    async def _wait_for_worker(self, seconds: float) -> str | None:
        """Wait until a worker can decode: for `seconds`, or while one is expected. Returns the
        reason if none can.
        """
        begun = asyncio.get_running_loop().time()
        while (reason := self._pool.unready_reason()) is not None:
            patience = self._resume_seconds if self._pool.expecting() else 0.0
            try:
                async with asyncio.timeout_at(begun + max(patience, seconds)):
                    await self._pool.change()
            except TimeoutError:
                break
        return reason

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Output, None]:
        """See EngineClient. A worker's failure is not visible here while another worker can go on."""
        with self.load.sequence() as watch:
            async with aclosing(self._attempts(request, watch)) as outputs:
                async for output in outputs:
                    yield output

    async def _attempts(self, request: GenerateRequest, watch: Stopwatch) -> AsyncGenerator[Output, None]:
        sent: list[int] = []
        cached = 0
        failed: list[WorkerFailed] = []
        while True:
            decode, prefill, lend_from = await self._place(request, sent, failed)
            begun = len(sent)
            attempt = Attempt(
                next(self._ids),
                [*request.tokens, *sent],
                _continued(request.sampling, begun),
                request.salt,
                self._threshold,
                decode,
                prefill,
                lend_from,
                request.priority,
            )
            try:
                async with aclosing(attempt.run()) as parts:
                    async for part in parts:
                        sent += part.tokens
                        if begun == 0:
                            cached = max(cached, part.cached)
                        watch.tokens(len(part.tokens))
                        reused = min(cached, len(request.tokens))
                        yield Output(part.tokens, part.logprobs, part.finish, reused, part.prompt_logprobs)
                return
            except WorkerFailed as failure:
                if failure.code == MISMATCH and prefill is not None:
                    self.quarantine.suspect(prefill, decode)
                self._note(request.id, failure, failed)
            if len(sent) >= request.sampling.max_tokens:
                yield Output([], None, "length", min(cached, len(request.tokens)))
                return

    def _note(self, request: str, failure: WorkerFailed, failed: list[WorkerFailed]) -> None:
        """Record a failure that allows a retry. Raises EngineError for one that does not."""
        if failure.code in REQUEST_FAULTS:
            raise EngineError(failure.code, failure.message, 400)
        failed.append(failure)
        log.warning(
            "attempt failed request=%s worker=%s code=%s reason=%r",
            request,
            failure.worker.name,
            failure.code,
            failure.message,
        )
        if len(failed) >= MOST_FAILURES:
            raise _exhausted(failed)
        self._retries.labels(failure.code).inc()

    async def _place(
        self, request: GenerateRequest, sent: list[int], failed: list[WorkerFailed]
    ) -> tuple[Target, Target | None, int | None]:
        """The workers for the next attempt. Raises EngineError when there is none."""
        deadline = asyncio.get_running_loop().time() + self._resume_seconds
        while (placed := await self._try_place(request, sent, failed)) is None:
            unready = self._pool.unready_reason()
            reason = unready or self._unable_reason(_continued(request.sampling, len(sent)))
            if failed and reason is None:  # those that are ready have failed
                raise _exhausted(failed)
            if unready is not None and not failed and self._may_hold() and await self.wait_ready() is None:
                continue  # the last worker had gone since the request was let in
            try:
                if not failed and not self._pool.expecting():
                    raise TimeoutError
                async with asyncio.timeout_at(deadline):
                    await self._pool.change()
            except TimeoutError:
                if failed:
                    raise _exhausted(failed) from None
                raise EngineError("no_worker", f"no worker can take the request: {reason}", 503) from None
        return placed

    def _able(self, sampling: Sampling) -> list[WorkerConnection]:
        """The ready workers that support all of `sampling`."""
        needed = _needed(sampling)
        ready = self._pool.ready()
        if not needed:
            return ready
        return [each for each in ready if each.peer and needed.keys() <= set(each.peer.capabilities)]

    def _unable_reason(self, sampling: Sampling) -> str | None:
        """Why no ready worker supports `sampling`: all are of an older version."""
        needed = _needed(sampling)
        if not needed or any(each.peer and each.peer.role != "prefill" for each in self._able(sampling)):
            return None
        fields = [field for fields in needed.values() for field in fields]
        return f"no decode worker that is ready knows {', '.join(fields)}"

    async def _try_place(
        self, request: GenerateRequest, sent: list[int], failed: list[WorkerFailed]
    ) -> tuple[Target, Target | None, int | None] | None:
        tokens = [*request.tokens, *sent]
        able = self._able(_continued(request.sampling, len(sent)))
        workers = [each for each in able if not any(each.peer is one.avoid for one in failed)]
        random.shuffle(workers)  # so that routers with the same view do not all take the first of equals
        sizes = {each.peer.endpoint.fingerprint.page_size for each in workers if each.peer}
        # What is scored of a prompt is computed, whatever is cached of it.
        scored = request.sampling.prompt_logprobs is not None and not sent
        usable = tokens[: request.sampling.unscored(len(tokens)) - 1] if scored else tokens
        pages = {size: await _hashes(usable, size, request.salt) for size in sizes}
        targets: dict[str, Target] = {}
        candidates: list[Candidate] = []
        for worker in workers:
            peer = worker.peer
            if peer is not None and worker.state == "ready":  # still, after the hashing
                candidate = _candidate(worker, peer, pages[peer.endpoint.fingerprint.page_size], len(tokens))
                candidates.append(candidate)
                targets[worker.url] = Target(worker, peer, len(tokens) - candidate.cached_tokens)
        candidates = [dataclasses.replace(each, refuses=self._refused(each, targets)) for each in candidates]
        placement = place(len(tokens), candidates, self._threshold)
        if placement is None:
            return None
        decode = targets[placement.decode.name]
        prefill = targets[placement.prefill.name] if placement.prefill else None
        if prefill is not None and placement.lend_from is not None:  # it computes what neither has
            prefill = dataclasses.replace(prefill, expected_tokens=decode.expected_tokens)
        return decode, prefill, placement.lend_from

    def _refused(self, decode: Candidate, targets: dict[str, Target]) -> frozenset[str]:
        """Names of the workers that may not write to `decode`."""
        holder = targets[decode.name].peer
        return frozenset(
            name
            for name, target in targets.items()
            if target.peer.transport.refusal(holder.transport) is not None
            or self.quarantine.refuses(target.peer.endpoint.agent, holder.endpoint.agent)
        )

    async def canary(self, prefill: Target, decode: Target) -> str | None:
        """Prefill a prompt that is in no radix tree on one worker, and decode a token from its KV on the other.

        Returns the reason of a failure, or None.
        """
        prompt = [random.randrange(CANARY_VOCABULARY) for _ in range(CANARY_TOKENS)]
        salt = f"canary-{random.getrandbits(64):x}"
        attempt = Attempt(next(self._ids), prompt, Sampling(max_tokens=2), salt, 0, decode, prefill, canary=True)
        try:
            async with aclosing(attempt.run()) as parts:
                tokens = sum([len(part.tokens) async for part in parts])
            return None if tokens == 2 else f"{tokens} tokens instead of 2"
        except (WorkerFailed, EngineError) as failure:
            log.warning(
                "canary failed prefill=%s decode=%s reason=%s", prefill.worker.name, decode.worker.name, failure
            )
            return str(failure)

    async def _released(self, prefill: Target, decode: Target) -> bool:
        return await self.canary(prefill, decode) is None


def _candidate(worker: WorkerConnection, peer: Peer, pages: list[int], tokens: int) -> Candidate:
    fingerprint = peer.endpoint.fingerprint
    return Candidate(
        name=worker.url,
        role=peer.role,
        fingerprint=fingerprint,
        queued_tokens=worker.queued_tokens,
        requests=worker.requests,
        # the last token is always computed: its logits are what is asked for
        cached_tokens=min(worker.prefixes.longest(pages) * fingerprint.page_size, tokens - 1),
        prefill_rate=worker.load.prefill_rate,
        read_rate=worker.load.read_rate,
        token_bytes=peer.endpoint.region.page_bytes // fingerprint.page_size,
    )


async def _hashes(tokens: list[int], page_size: int, salt: str) -> list[int]:
    if len(tokens) <= HASH_OFF_LOOP:
        return page_hashes(tokens, page_size, salt)
    return await asyncio.to_thread(page_hashes, tokens, page_size, salt)


def _needed(sampling: Sampling) -> dict[str, list[str]]:
    """The capabilities that a worker needs for `sampling`, with the fields that need each."""
    needed: dict[str, list[str]] = {}
    if sampling.grammar is not None:
        needed[GRAMMAR] = ["grammar"]
    if sampling.processors is not None:
        needed[PROCESSORS] = sampling.processors.names()
    if sampling.prompt_logprobs is not None:
        needed[PROMPT_LOGPROBS] = ["prompt_logprobs"]
    if sampling.logprob_start:
        needed[LOGPROB_START] = ["logprob_start_len"]
    return needed


def _continued(sampling: Sampling, sent: int) -> Sampling:
    """The sampling for the rest of a sequence of which `sent` tokens were sent."""
    if sent == 0:
        return sampling
    processors = sampling.processors
    if processors is None and sampling.grammar is not None:
        processors = LogitsProcessors()
    if processors is not None:  # which tell the prompt's own tokens from those that were generated
        processors = msgspec.structs.replace(processors, replayed=sent)
    return msgspec.structs.replace(
        sampling,
        max_tokens=sampling.max_tokens - sent,
        min_tokens=max(0, sampling.min_tokens - sent),
        processors=processors,
        prompt_logprobs=None,  # they were told with the first token
        logprob_start=0,
    )


def _exhausted(failed: list[WorkerFailed]) -> EngineError:
    if all(each.code == "overloaded" for each in failed):
        return EngineError("overloaded", f"all workers are overloaded: {failed[-1].message}", 503)
    codes = ", ".join(each.code for each in failed)  # names and messages are in the log: a client is no operator
    return EngineError("no_worker", f"no worker could finish the request: {codes}", 503)

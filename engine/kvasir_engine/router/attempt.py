"""One attempt of a request on a decode worker, with or without a prefill worker: the router's side of a handoff."""

from collections.abc import AsyncGenerator
from dataclasses import dataclass, replace

from kvasir_engine import faults
from kvasir_engine.delta_inbox import DeltaInbox
from kvasir_engine.engine_client import EngineError
from kvasir_engine.protocol import (
    COUNTS,
    NONCES,
    Delta,
    Lease,
    Leased,
    PromptLogprobs,
    Reserve,
    Sampling,
    Submit,
    TokenLogprobs,
)
from kvasir_engine.router.connection import ConnectionLost, Event, Peer, WorkerConnection
from kvasir_engine.scored_prompt import ScoredPrompt

_POINTS = {0: "router.first_token", 4: "router.streaming"}  # by the index of a token that is new


class WorkerFailed(Exception):
    """`worker` ended the attempt. `code` is a stable snake_case word; later attempts avoid the worker `avoid`."""

    def __init__(self, worker: WorkerConnection, avoid: Peer, code: str, message: str) -> None:
        super().__init__(message)
        self.worker = worker
        self.avoid = avoid
        self.code = code
        self.message = message


@dataclass(frozen=True)
class Target:
    """A worker at the time of placement. `expected_tokens`: the prompt tokens that it would have to compute."""

    worker: WorkerConnection
    peer: Peer
    expected_tokens: int

    @property
    def counts(self) -> bool:
        """Whether the worker counts canaries apart from requests."""
        return COUNTS in self.peer.capabilities

    @property
    def nonces(self) -> bool:
        """Whether the worker's protocol version has nonces in leases."""
        return self.peer.version >= NONCES

    def available(self) -> bool:
        """Whether the worker is still the same peer and takes requests."""
        return self.worker.peer is self.peer and self.worker.state == "ready"


@dataclass(frozen=True)
class OutputPart:
    """New tokens of the attempt's output; none where only `cached` is new. `cached` is that of `Delta`."""

    tokens: list[int]
    logprobs: list[TokenLogprobs] | None
    finish: str | None
    cached: int
    prompt_logprobs: list[PromptLogprobs] | None = None


class Attempt:
    """Runs `tokens` on `decode`, with the prompt's KV from `prefill` when there is one.

    Decode reserves pages; its lease goes to prefill with the prompt; prefill sends the first token, decode repeats
    it and goes on. When decode grants no lease, or there is no prefill worker, decode computes everything. With
    `lend_from`, prefill already has that many tokens, and reads from decode what decode has beyond them. Where the
    prompt's log-probabilities are wanted, no token is yielded before them, though decode's tokens may arrive before
    prefill's last frame.
    """

    def __init__(
        self,
        id: str,
        tokens: list[int],
        sampling: Sampling,
        salt: str,
        threshold: int,
        decode: Target,
        prefill: Target | None,
        lend_from: int | None = None,
        priority: int = 0,
        canary: bool = False,
    ) -> None:
        self._id = id
        self._canary = canary
        self._cached = 0
        self._priority = priority
        self._tokens = tokens
        self._sampling = sampling
        self._salt = salt
        self._threshold = threshold
        self._decode = decode
        self._prefill = prefill
        self._lend_from = lend_from
        self._inbox: DeltaInbox[Target, Event] = DeltaInbox()
        self._output: list[int] = []
        self._prompt = ScoredPrompt(len(tokens), sampling)
        self._held: list[OutputPart] = []
        self._leased = False
        self._decoding = False  # D has sent a token: P's work is done, whatever P says

    async def run(self) -> AsyncGenerator[OutputPart, None]:
        """The output's parts, in order, up to one with a finish. Raises WorkerFailed, or EngineError for a bad
        stream.

        Closing the iterator early aborts the request on both workers.
        """
        ended = False
        self._start()
        try:
            while not ended or self._held:
                source, event = await self._inbox.get()
                if isinstance(event, Leased):
                    if source is not self._decode:
                        self._fail(source, "bad_frame", "it sent a lease, and was not asked for one", avoid=source)
                        continue
                    self._take_lease(event.lease)
                elif isinstance(event, ConnectionLost):
                    code = "decode_lost" if source is self._decode else "prefill_lost"
                    self._fail(source, code, event.reason, avoid=source)
                elif event.failure is not None:
                    self._fail(source, event.failure.code, event.failure.message, avoid=self._at_fault(source))
                else:
                    part = self._take(source, event)
                    ended = ended or part.finish is not None
                    known = self._cached
                    self._cached = max(known, part.cached)
                    if part.tokens or part.finish is not None or part.cached > known:
                        self._held.append(part)
                    for each in self._released():
                        yield each
        finally:
            # What has ended by itself was closed as it ended.
            self._decode.worker.close(self._id, abort=True)
            if self._prefill is not None:
                self._prefill.worker.close(self._id, abort=not self._decoding)

    def _released(self) -> list[OutputPart]:
        """The held parts, once the prompt's log-probabilities are complete; the first part with tokens carries
        them.
        """
        if not self._held or not self._prompt.complete:
            return []
        parts, self._held = self._held, []
        if any(part.tokens for part in parts) and (scores := self._prompt.report()) is not None:
            place = next(place for place, part in enumerate(parts) if part.tokens)
            parts[place] = replace(parts[place], prompt_logprobs=scores)
        return parts

    def _open(self, target: Target, frame: Submit | Reserve, expected_tokens: int) -> None:
        target.worker.open(frame, lambda event: self._inbox.put(target, event), expected_tokens)

    def _start(self) -> None:
        decode, prefill = self._decode, self._prefill
        if prefill is None:
            submit = Submit(
                self._id,
                self._tokens,
                self._sampling,
                self._salt,
                priority=self._priority,
                canary=self._canary and decode.counts,
            )
            self._open(decode, submit, decode.expected_tokens)
            return
        reserve = Reserve(
            id=self._id,
            tokens=self._tokens,
            sampling=self._sampling,
            writer=prefill.peer.endpoint,
            salt=self._salt,
            threshold=self._threshold,
            lend_from=self._lend_from,
            priority=self._priority,
            canary=self._canary and decode.counts,
            nonces=decode.nonces and prefill.nonces,
            place=prefill.peer.transport.place if decode.nonces else "",
        )
        self._open(decode, reserve, 0)

    def _take_lease(self, lease: Lease | None) -> None:
        prefill = self._prefill
        if lease is None or prefill is None:
            return  # D does it all
        if self._leased:
            self._fail(self._decode, "bad_frame", "a second lease", avoid=self._decode)
        faults.hit("router.leased")
        if not prefill.available():
            raise WorkerFailed(prefill.worker, prefill.peer, "prefill_lost", "gone before the lease was granted")
        self._leased = True
        submit = Submit(
            id=self._id,
            tokens=self._tokens,
            sampling=self._sampling,
            salt=self._salt,
            lease=lease,
            to=self._decode.peer.endpoint,
            priority=self._priority,
            canary=self._canary and prefill.counts,
            place=self._decode.peer.transport.place if prefill.nonces else "",
        )
        self._open(prefill, submit, prefill.expected_tokens)

    def _fail(self, source: Target, code: str, message: str, avoid: Target) -> None:
        source.worker.close(self._id, abort=False)
        if source is self._decode or not self._decoding or not self._prompt.complete:
            raise WorkerFailed(source.worker, avoid.peer, code, message)

    def _at_fault(self, source: Target) -> Target:
        """The worker to blame for a failure that `source` reports. Decode reports prefill's while
        it waits for KV.
        """
        waiting = self._leased and not self._decoding
        return self._prefill if source is self._decode and waiting and self._prefill is not None else source

    def _take(self, source: Target, delta: Delta) -> OutputPart:
        if delta.prompt_logprobs and (wrong := self._prompt.take(delta)) is not None:
            self._fail(source, "bad_frame", wrong, avoid=source)
        fresh = self._fresh(source, delta)
        for index in range(delta.index + len(delta.tokens) - len(fresh), delta.index + len(delta.tokens)):
            if index in _POINTS:
                faults.hit(_POINTS[index])
        if source is self._decode and delta.tokens:
            self._decoding = True
        if delta.finish == "handoff" and source is self._decode:
            self._fail(source, "bad_frame", "the decode worker says that it handed off", avoid=source)
        if delta.logprobs is not None and len(delta.logprobs) != len(delta.tokens):
            why = f"{len(delta.logprobs)} logprobs of {len(delta.tokens)} tokens"
            self._fail(source, "bad_frame", why, avoid=source)
        if delta.finish is not None:
            scorer = self._prefill if self._leased else self._decode
            if source is scorer and not self._prompt.complete:
                self._fail(source, "bad_frame", "it ended without all prompt_logprobs", avoid=source)
            source.worker.close(self._id, abort=False)
        finish = None if delta.finish == "handoff" else delta.finish
        logprobs = delta.logprobs[len(delta.tokens) - len(fresh) :] if delta.logprobs is not None else None
        return OutputPart(fresh, logprobs, finish, delta.cached)

    def _fresh(self, source: Target, delta: Delta) -> list[int]:
        """The delta's tokens that are new; the others must repeat what is known."""
        known = self._output[delta.index : delta.index + len(delta.tokens)]
        if delta.index > len(self._output):
            gap = f"worker {source.worker.name} sent token {delta.index} after token {len(self._output) - 1}"
            raise EngineError("token_gap", gap)
        for place, (ours, theirs) in enumerate(zip(known, delta.tokens, strict=False), delta.index):
            if ours != theirs:
                message = (
                    f"worker {source.worker.name} sent {theirs} as token {place} of the output, which is {ours}"
                )
                raise EngineError("token_mismatch", message)
        fresh = delta.tokens[len(known) :]
        if len(self._output) + len(fresh) > self._sampling.max_tokens:
            self._fail(source, "bad_frame", f"more than {self._sampling.max_tokens} tokens", avoid=source)
            fresh = []
        self._output += fresh
        return fresh

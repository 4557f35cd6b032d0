"""Sampled tokens: append them to their requests, tell the routers, and finish or hand off."""

from typing import Literal

from kvasir_engine import faults
from kvasir_engine.core.pushes import Pushes
from kvasir_engine.core.request_finisher import RequestFinisher
from kvasir_engine.core.requests import Job, Requests, Stats
from kvasir_engine.core.sequence import Sequence
from kvasir_engine.protocol import Delta, TokenLogprobs


class OutputProcessor:
    """Takes sampled tokens to their requests and routers. No sequence passes `max_length` tokens."""

    def __init__(
        self, requests: Requests, pushes: Pushes, finisher: RequestFinisher, stats: Stats, max_length: int
    ) -> None:
        self._requests = requests
        self._pushes = pushes
        self._finisher = finisher
        self._stats = stats
        self._max_length = max_length

    def take(self, job: Job, token: int, logprobs: TokenLogprobs | None) -> None:
        """The next token of a job, whose sequence is computed up to it."""
        if job.lease is not None and job.to is not None:
            self._handoff(job, token, logprobs)
        else:
            self.append(job, token, logprobs)

    def append(self, job: Job, token: int, logprobs: TokenLogprobs | None, sampled: bool = True) -> None:
        """One more token of a sequence that is decoded here, `sampled` here or by its prefill worker."""
        if job.sequence.generated == 1 and job.lease is not None:
            faults.hit("decode.stepped")
        self._stats.tokens(job).generated += sampled
        if self._say(job, token, logprobs):
            self._finisher.finish(job)
            self._finisher.forget(job)

    def _handoff(self, job: Job, token: int, logprobs: TokenLogprobs | None) -> None:
        """The prompt is computed: report the first token, push the rest of the KV, release the pages."""
        prompt = len(job.sequence.tokens)
        self._stats.tokens(job).generated += 1
        finished = self._say(job, token, logprobs)
        if not finished:
            self._pushes.complete(job, prompt, token, logprobs)
        self._finisher.finish(job)
        if finished:
            self._pushes.withdraw(job, "the first token was the last")
            self._finisher.forget(job)

    def _say(self, job: Job, token: int, logprobs: TokenLogprobs | None) -> bool:
        """Add a token to the job's sequence and tell its router. Whether it is the last."""
        sequence = job.sequence
        index = sequence.generated
        sequence.tokens.append(token)
        finish = self._finish(sequence, token)
        said = None if logprobs is None else [logprobs]
        self._requests.tell(job, Delta(sequence.id, index, [token], said, finish, cached=sequence.cached))
        return finish is not None

    def _finish(self, sequence: Sequence, token: int) -> Literal["stop", "length"] | None:
        sampling = sequence.sampling
        if token in sampling.stop_token_ids and sequence.generated >= sampling.min_tokens:
            return "stop"
        if sequence.generated >= sampling.max_tokens or len(sequence.tokens) >= self._max_length:
            return "length"
        return None

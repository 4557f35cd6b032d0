"""Appends sampled tokens, and those that a grammar forces behind them, to their requests; reports them to routers;
ends requests or hands them off."""

from collections.abc import Sequence as Seq
from typing import Literal

from kvasir_engine import faults
from kvasir_engine.core.jobs import DecodeJob, Job, PrefillJob
from kvasir_engine.core.pushes import Pushes
from kvasir_engine.core.request_finisher import RequestFinisher
from kvasir_engine.core.requests import Requests
from kvasir_engine.core.sequence import Sequence
from kvasir_engine.core.stats import Stats
from kvasir_engine.grammar.base import GrammarError
from kvasir_engine.protocol import Delta, PromptLogprobs, TokenLogprobs
from kvasir_engine.sampling.token_masks import NO_TOKEN

Finish = Literal["stop", "length"]
MOST_SCORES = 1024
"""Of a prompt's tokens, told at once: a third of a megabyte."""
NO_TOKEN_ALLOWED = "no_token_allowed"
_CONFLICT = (
    "all that the grammar allows next is forbidden by min_tokens, bad_words, allowed_token_ids or logit_bias"
)


class OutputProcessor:
    """Processes sampled tokens. No sequence gets longer than `max_length` tokens."""

    def __init__(
        self, requests: Requests, pushes: Pushes, finisher: RequestFinisher, stats: Stats, max_length: int
    ) -> None:
        self._requests = requests
        self._pushes = pushes
        self._finisher = finisher
        self._stats = stats
        self._max_length = max_length

    def take(self, job: Job, tokens: Seq[int], logprobs: Seq[TokenLogprobs | None]) -> None:
        """Take the next tokens of a job, whose sequence is computed up to the first of them."""
        if isinstance(job, PrefillJob):
            self._handoff(job, tokens[0], logprobs[0])
        else:
            self.append(job, tokens, logprobs)

    def append(self, job: Job, tokens: Seq[int], logprobs: Seq[TokenLogprobs | None], sampled: bool = True) -> None:
        """Append tokens to a sequence that is decoded here. They were `sampled` here, or by its prefill worker."""
        sequence = job.sequence
        if isinstance(job, DecodeJob) and job.lease is not None and sequence.generated == 1:
            faults.hit("decode.first_step")
        finish: Finish | None = None
        wrong: str | None = None
        for token in tokens:
            if token == NO_TOKEN:
                wrong = _nothing_left(sequence)
                break
            self._stats.tokens(job).generated += sampled
            sequence.tokens.append(token)
            finish = self._finish(sequence, token)
            if finish is None and sequence.constraint is not None:
                try:
                    finish, wrong = self._follow(job, token)
                except GrammarError as error:
                    wrong = f"grammar: {error}"
            if finish is not None or wrong is not None:
                break
        self._tell(job, logprobs, finish)
        if wrong is not None:
            self._finisher.fail(job, NO_TOKEN_ALLOWED, wrong)
        elif finish is not None:
            self._finisher.finish(job)
            self._finisher.forget(job)

    def take_scores(self, job: Job, place: int, scores: Seq[PromptLogprobs]) -> None:
        """Take the scores of the tokens from `place` + 1 on. Those of the prompt are reported; those of forced
        tokens are kept until their tokens are reported.
        """
        sequence = job.sequence
        prompt = scores[: max(0, sequence.prompt - 1 - place)]
        for start in range(0, len(prompt), MOST_SCORES):
            some = list(prompt[start : start + MOST_SCORES])
            delta = Delta(sequence.id, prompt_index=place + 1 + start, prompt_logprobs=some)
            self._requests.send(job, delta)
        if prompt:
            sequence.scored = place + len(prompt)
        sequence.forced_scores += [TokenLogprobs(each.logprob, each.top) for each in scores[len(prompt) :]]

    def _follow(self, job: Job, token: int) -> tuple[Finish | None, str | None]:
        """Let the grammar accept the newest token, and append the tokens that it forces. Returns why the sequence
        ends, and the error, if any.
        """
        sequence, constraint = job.sequence, job.sequence.constraint
        assert constraint is not None
        if not constraint.accept(token):
            return None, f"token {token} is not in the grammar's language"
        # A forced token is scored by the step that computes the one before it, so a step samples the last.
        scored = sequence.sampling.logprobs is not None
        ahead = constraint.forced(sequence.limit - len(sequence.tokens) - scored)
        sequence.tokens += ahead
        self._stats.tokens(job).forced += len(ahead)
        if len(sequence.tokens) >= sequence.limit:
            return "length", None
        if not constraint.complete:
            return None, None
        ends = constraint.ends()
        if not ahead and token in ends:
            return "stop", None
        if not constraint.jump or not ends or scored:
            return None, None  # the next step samples the end
        possible = constraint.possible(ends, sequence.generated)
        if not possible:
            return None, _nothing_left(sequence)
        sequence.tokens.append(possible[0])
        self._stats.tokens(job).forced += 1
        return "stop", None

    def _handoff(self, job: PrefillJob, token: int, logprobs: TokenLogprobs | None) -> None:
        """Hand off a computed prompt: report the first token, push the rest of the KV, release the pages.

        The decode worker computes by itself what a grammar forces behind that token.
        """
        sequence = job.sequence
        if token == NO_TOKEN:
            return self._finisher.fail(job, NO_TOKEN_ALLOWED, _nothing_left(sequence))
        prompt = len(sequence.tokens)
        self._stats.tokens(job).generated += 1
        sequence.tokens.append(token)
        finish = self._finish(sequence, token)
        self._tell(job, [logprobs], finish)
        if finish is None:
            self._pushes.complete(job, prompt, token, logprobs)
        self._finisher.finish(job)
        if finish is not None:
            self._pushes.withdraw(job, "the first token was the last")
            self._finisher.forget(job)
        return None

    def _tell(self, job: Job, logprobs: Seq[TokenLogprobs | None], finish: Finish | None) -> None:
        """Report tokens that the router does not have. If log-probabilities are requested, only tokens that have
        theirs: sampled ones (`logprobs`), and forced ones before them.
        """
        sequence = job.sequence
        index, tokens = sequence.reported, sequence.tokens[sequence.prompt + sequence.reported :]
        scored: list[TokenLogprobs] | None = None
        if logprobs[0] is not None:
            scored = [*sequence.forced_scores, *(each for each in logprobs if each is not None)][: len(tokens)]
            tokens = tokens[: len(scored)]
            sequence.forced_scores.clear()
        if not tokens:
            return
        sequence.reported = index + len(tokens)
        self._requests.send(job, Delta(sequence.id, index, tokens, scored, finish, cached=sequence.cached))

    def _finish(self, sequence: Sequence, token: int) -> Finish | None:
        sampling, generated = sequence.sampling, len(sequence.tokens) - sequence.prompt
        if token in sampling.stop_token_ids and generated >= sampling.min_tokens:
            return "stop"
        if generated >= sampling.max_tokens or len(sequence.tokens) >= self._max_length:
            return "length"
        return None


def _nothing_left(sequence: Sequence) -> str:
    """The error if no token is allowed."""
    fault = None if sequence.constraint is None else sequence.constraint.fault
    return f"no token is left after {sequence.generated} generated ones: {fault or _CONFLICT}"

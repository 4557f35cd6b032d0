"""Requests that wait until their grammar is compiled."""

import queue
from collections.abc import Callable, Iterable

from kvasir_engine.core.grammar_service import MOST_COMPILING, Compilation, FilledMask, GrammarService
from kvasir_engine.core.jobs import Job, PrefillJob
from kvasir_engine.core.request_finisher import RequestFinisher
from kvasir_engine.core.requests import Requests
from kvasir_engine.core.sequence import Sequence
from kvasir_engine.core.stats import Stats
from kvasir_engine.grammar.base import GrammarBusy, GrammarError


class GrammarRequests:
    """For one engine, on its thread. `service` is `None` if the worker compiles no grammars; then no request has
    one.

    `admissible` gets each job whose grammar is compiled.
    """

    def __init__(
        self,
        service: GrammarService | None,
        requests: Requests,
        finisher: RequestFinisher,
        stats: Stats,
        admissible: Callable[[Job], None],
    ) -> None:
        self.service = service
        self.wake: Callable[[], None] = lambda: None
        """Called on other threads when there is something to take."""
        self._requests = requests
        self._finisher = finisher
        self._stats = stats
        self._admissible = admissible
        self._compiled: queue.SimpleQueue[tuple[Job, Compilation, float]] = queue.SimpleQueue()

    @property
    def ready(self) -> bool:
        """Whether a compiled grammar waits to be taken."""
        return not self._compiled.empty()

    @property
    def compiling(self) -> int:
        """The number of requests that wait for their grammar."""
        return 0 if self.service is None else self.service.compiling

    def begin(self, job: Job) -> None:
        """Start to compile a job's grammar, for which the job waits. A job without one is admissible at once."""
        grammar = job.sequence.sampling.grammar
        if grammar is None or self.service is None:
            return self._admissible(job)
        job.compiling = True

        def done(compiled: Compilation, seconds: float) -> None:
            self._compiled.put((job, compiled, seconds))
            self.wake()

        if not self.service.compile(grammar, done):
            job.compiling = False
            why = f"{MOST_COMPILING} requests wait for their grammars already"
            return self._finisher.fail(job, "overloaded", why)
        return None

    def take(self) -> bool:
        """Continue the requests whose grammars have been compiled or refused. Whether there was one."""
        taken = False
        while self.service is not None and self.ready:
            job, compiled, seconds = self._compiled.get()
            self.service.compiled(seconds)
            taken = True
            if self._requests.find(job.sequence) is job:
                job.compiling = False
                self._go_on(job, compiled)
        return taken

    def _go_on(self, job: Job, compiled: Compilation) -> None:
        assert self.service is not None
        if isinstance(compiled, GrammarBusy):
            return self._finisher.fail(job, "overloaded", str(compiled))
        if isinstance(compiled, GrammarError):
            return self._finisher.fail(job, "bad_request", f"grammar: {compiled}")
        sequence = job.sequence
        constraint = self.service.constraint(compiled, sequence.sampling, sequence.history)
        try:
            if not constraint.replay(sequence.tokens[sequence.own_prompt :]):
                why = "grammar: what was generated before is not in its language"
                return self._finisher.fail(job, "bad_request", why)
            # What has to come first is computed with the prompt. A token is left for the step to sample.
            elsewhere = sequence.remote or isinstance(job, PrefillJob)
            most = 0 if elsewhere else sequence.limit - len(sequence.tokens) - 1
            ahead = constraint.forced(most)
        except GrammarError as error:
            return self._finisher.fail(job, "bad_request", f"grammar: {error}")
        sequence.constraint = constraint
        sequence.tokens += ahead
        self._stats.tokens(job).forced += len(ahead)
        return self._admissible(job)

    def masks(self, sequences: Iterable[Sequence]) -> dict[Sequence, FilledMask]:
        """Start to fill the masks of the constrained ones among `sequences`."""
        if self.service is None:
            return {}
        constrained = {each: each.constraint for each in sequences if each.constraint is not None}
        if not constrained:
            return {}
        return dict(zip(constrained, self.service.masks(list(constrained.values())), strict=True))

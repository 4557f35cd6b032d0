"""A request as the scheduler sees it: a list of tokens, of which the KV of the first `computed` is in its pages."""

from dataclasses import dataclass, field

from kvasir_engine.core.constraint import Constraint
from kvasir_engine.protocol import Sampling, TokenLogprobs
from kvasir_engine.sampling.token_history import LogitsWork, TokenHistory


@dataclass(eq=False, slots=True)
class Sequence:
    """One request in the engine.

    `tokens` is the prompt and everything sampled since. A sequence is worked on until `computed` has caught up
    with `tokens`; then the next token is sampled. So a decode step is a prefill of one token, and a preempted
    sequence is simply one whose `computed` went back to what the radix tree still has.

    A step that is launched counts in `computed` at once, and in `done` when it has ended: only then may others see
    what it computed. `awaited` are the tokens that launched steps sample and that are not known yet (0, or as
    many as the newest of them samples); the step after computes them all the same, as the device has them, but where
    a `constraint` has to know them first. At `limit` tokens a sequence ends. `reported` tokens were sent to its router.

    Of the prompt, `cached` tokens had their KV here at the first admission; `read` of these had come from another
    worker for it.

    Where the prompt's log-probabilities are asked for, those behind its first `scored` tokens are known, or nobody
    asked for them. Where those of generated tokens are, forced ones are reported when a step has scored them:
    `forced_scores` are of the first that are not reported.

    `remote`: another worker computes the prompt; admission leases pages instead of holding fresh ones.
    `arrival` orders all sequences: lower ones are served first and preempted last. While it waits, `leader` may be
    the sequence that is computing this one's first `shared` tokens.
    """

    id: str
    tokens: list[int]
    sampling: Sampling
    arrival: int
    salt: str = ""
    remote: bool = False
    prompt: int = 0
    limit: int = 1 << 62
    computed: int = 0
    done: int = 0
    awaited: int = 0
    cached: int = 0
    read: int = 0
    pages: list[int] = field(default_factory=list)
    leader: "Sequence | None" = None
    shared: int = 0
    history: TokenHistory | None = None
    constraint: Constraint | None = None
    reported: int = 0
    scored: int = 0
    forced_scores: list[TokenLogprobs] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.prompt = len(self.tokens)
        if self.sampling.prompt_logprobs is not None:
            self.scored = self.sampling.unscored(self.prompt) - 1
        if self.sampling.processors is not None:
            self.history = TokenHistory(self.sampling.processors, self.own_prompt)

    @property
    def own_prompt(self) -> int:
        """Tokens of the prompt that nobody generated."""
        processors = self.sampling.processors
        return self.prompt - (0 if processors is None else processors.replayed)

    def logits_work(self, awaited: int | None) -> LogitsWork | None:
        """What the sampling's processors have to do for the next token; of the one before, if it is not known yet,
        the newest step samples row `awaited`.
        """
        return None if self.history is None else self.history.work(self.tokens, awaited)

    @property
    def unscored(self) -> bool:
        """Whether log-probabilities of tokens that are there are still wanted."""
        return self._prompt_unscored or bool(self._forced_unscored)

    @property
    def _prompt_unscored(self) -> bool:
        return self.sampling.prompt_logprobs is not None and self.scored < self.prompt - 1

    @property
    def _forced_unscored(self) -> range:
        """The places of tokens behind which a forced one has no score."""
        if self.sampling.logprobs is None or self.constraint is None:
            return range(0)
        return range(self.prompt + self.reported + len(self.forced_scores) - 1, len(self.tokens) - 1)

    @property
    def reusable(self) -> int:
        """Tokens whose KV may come from a cache: what comes behind the others has to be computed."""
        if self._prompt_unscored:
            return self.scored
        forced = self._forced_unscored
        return forced.start if forced else len(self.tokens) - 1

    def to_score(self, count: int) -> range:
        """The places, among the next `count` tokens to compute, behind which a score is wanted: below `prompt - 1`
        of the prompt's next token, else of a forced one.
        """
        end, found = self.computed + count, range(0)
        if self._prompt_unscored:
            found = range(max(self.computed, self.scored), min(end, self.prompt - 1))
        forced = self._forced_unscored
        if forced:
            behind = range(max(self.computed, forced.start), min(end, forced.stop))
            found = range(found.start if found else behind.start, behind.stop) if behind else found
        return found

    @property
    def length(self) -> int:
        """Tokens, those that are awaited included."""
        return len(self.tokens) + self.awaited

    @property
    def remaining(self) -> int:
        """Tokens whose KV no step computes yet; none when a token that is awaited is certain to be the last, or has
        to be known first.
        """
        if self.awaited and (self.constraint is not None or self.length >= self.limit):
            return 0
        return self.length - self.computed

    @property
    def generated(self) -> int:
        """Tokens behind the prompt so far, sampled or forced."""
        return len(self.tokens) - self.prompt

"""A request as the scheduler sees it: a list of tokens. Its pages hold the KV of the first `computed` tokens."""

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

    A launched step counts in `computed` at once, and in `done` when it has ended; only then may other requests use
    what it computed. `awaited`: how many tokens the newest launched step samples that are not known yet. The next
    step can compute them, since the device has them, unless a `constraint` has to know them first. A sequence ends
    at `limit` tokens. Its router has `reported` tokens.

    At the first admission the KV of `cached` tokens of the prompt was here; `read` of these were read from another
    worker for this request.

    If the prompt's log-probabilities are requested, those behind its first `scored` tokens are done. If those of
    generated tokens are requested, forced ones are reported when a step has scored them: `forced_scores` belong to
    the first forced tokens that are not reported.

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
        """The number of prompt tokens without those that an earlier attempt generated."""
        processors = self.sampling.processors
        return self.prompt - (0 if processors is None else processors.replayed)

    def logits_work(self, awaited: int | None) -> LogitsWork | None:
        """The work of the logits processors for the next token. If the last token is not known yet, the newest step
        samples it in row `awaited`.
        """
        return None if self.history is None else self.history.work(self.tokens, awaited)

    @property
    def unscored(self) -> bool:
        """Whether log-probabilities of known tokens are still to be computed."""
        return self._prompt_unscored or bool(self._forced_unscored)

    @property
    def _prompt_unscored(self) -> bool:
        return self.sampling.prompt_logprobs is not None and self.scored < self.prompt - 1

    @property
    def _forced_unscored(self) -> range:
        """The places of tokens whose successor is a forced token without a score."""
        if self.sampling.logprobs is None or self.constraint is None:
            return range(0)
        return range(self.prompt + self.reported + len(self.forced_scores) - 1, len(self.tokens) - 1)

    @property
    def reusable(self) -> int:
        """The number of tokens whose KV may come from a cache. The KV of later ones has to be computed."""
        if self._prompt_unscored:
            return self.scored
        forced = self._forced_unscored
        return forced.start if forced else len(self.tokens) - 1

    def to_score(self, count: int) -> range:
        """The places among the next `count` tokens to compute whose successor needs a score: below `prompt - 1` the
        prompt's next token, else a forced one.
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
        """The number of tokens, awaited ones included."""
        return len(self.tokens) + self.awaited

    @property
    def remaining(self) -> int:
        """The number of tokens whose KV no launched step computes. 0 while an awaited token is certainly the last,
        or has to be known first.
        """
        if self.awaited and (self.constraint is not None or self.length >= self.limit):
            return 0
        return self.length - self.computed

    @property
    def generated(self) -> int:
        """The number of tokens after the prompt, sampled or forced."""
        return len(self.tokens) - self.prompt

"""The log-probabilities of one prompt on their way to whoever asked: collected until all are there, told once."""

from kvasir_engine.protocol import Delta, PromptLogprobs, Sampling


class ScoredPrompt:
    """Of a prompt of so many `tokens`; where the `sampling` asks for none there is nothing to wait for."""

    def __init__(self, tokens: int, sampling: Sampling) -> None:
        self._first = sampling.unscored(tokens)
        self._wanted = 0 if sampling.prompt_logprobs is None else tokens - self._first
        self._most = sampling.prompt_logprobs or 0
        self._scores: list[PromptLogprobs] | None = None if sampling.prompt_logprobs is None else []

    @property
    def complete(self) -> bool:
        """Whether nothing is awaited any more."""
        return self._scores is None or len(self._scores) == self._wanted

    def take(self, delta: Delta) -> str | None:
        """The scores of a delta that has some; what is wrong with them, if anything is."""
        known = 0 if self._scores is None else len(self._scores)
        if self._scores is None or known + len(delta.prompt_logprobs) > self._wanted:
            return "more prompt_logprobs than were asked for"
        if delta.prompt_index != self._first + known:
            return f"prompt_logprobs from token {delta.prompt_index} on, not from {self._first + known}"
        if any(len(each.top) > self._most for each in delta.prompt_logprobs):
            return f"more than {self._most} alternatives in prompt_logprobs"
        self._scores += delta.prompt_logprobs
        return None

    def told(self) -> list[PromptLogprobs] | None:
        """All of them, the first time; then None."""
        scores, self._scores = self._scores, None
        return scores

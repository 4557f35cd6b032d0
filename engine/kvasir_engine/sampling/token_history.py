"""A sequence's tokens so far, and their effect on the next token's logits; on the host, updated once a step.

A step may be launched before the previous step's token is known. Work that depends on that token is left to
`logits_processors.py`, on the device: nothing here waits.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvasir_engine.protocol import LogitsProcessors

Ids = NDArray[np.int64]
Floats = NDArray[np.float32]
NO_IDS: Ids = np.zeros(0, np.int64)
NO_COUNTS: NDArray[np.int32] = np.zeros(0, np.int32)


@dataclass(frozen=True, slots=True, eq=False)
class LogitsWork:
    """The work on one row of logits. Immutable.

    `ids` are tokens of the sequence, each once, that were generated `counts` times (0: in the prompt only).
    `banned` tokens are impossible, and `then[1][i]` is too if the awaited token is `then[0][i]`. `awaited` is the
    row of the previous step that samples the token before the next one; None if that token is known.
    """

    ids: Ids
    counts: NDArray[np.int32]
    presence: float
    frequency: float
    repetition: float
    bias_ids: Ids
    biases: Floats
    allowed: Ids | None
    banned: Ids
    then: tuple[Ids, Ids]
    awaited: int | None

    @property
    def penalizes(self) -> bool:
        """Whether generated tokens have an effect."""
        return (self.presence, self.frequency, self.repetition) != (0.0, 0.0, 1.0)


class _BadWords:
    """Banned token sequences, by the token before their last."""

    def __init__(self, words: Sequence[Sequence[int]]) -> None:
        self._always = np.array(sorted({word[0] for word in words if len(word) == 1}), np.int64)
        self._after: defaultdict[int, list[Sequence[int]]] = defaultdict(list)
        self._before: defaultdict[int, list[Sequence[int]]] = defaultdict(list)
        self._pairs = [word for word in words if len(word) == 2]
        for word in words:
            if len(word) > 1:
                self._after[word[-2]].append(word)
            if len(word) > 2:
                self._before[word[-3]].append(word)

    def banned(self, generated: Sequence[int]) -> Ids:
        """The tokens that must not follow `generated`, the last relevant tokens."""
        if not generated:
            return self._always
        ends = [word[-1] for word in self._after.get(generated[-1], ()) if _ends(generated, word[:-1])]
        return np.concatenate([self._always, np.array(ends, np.int64)]) if ends else self._always

    def then(self, generated: Sequence[int]) -> tuple[Ids, Ids]:
        """The same for the token after the next: pairs of a next token and one that must not follow it."""
        words = self._pairs
        if generated:
            longer = [word for word in self._before.get(generated[-1], ()) if _ends(generated, word[:-2])]
            words = words + longer if longer else words
        return np.array([word[-2] for word in words], np.int64), np.array([word[-1] for word in words], np.int64)


def _ends(tokens: Sequence[int], end: Sequence[int]) -> bool:
    return len(tokens) >= len(end) and list(tokens[-len(end) :]) == list(end)


class TokenHistory:
    """The history of one sequence, whose first `prompt` tokens are its prompt's own."""

    def __init__(self, processors: LogitsProcessors, prompt: int) -> None:
        self._prompt = prompt
        self._presence, self._frequency = processors.presence_penalty, processors.frequency_penalty
        self._repetition = processors.repetition_penalty
        self._bias_ids = np.array([token for token, _ in processors.logit_bias], np.int64)
        self._biases = np.array([bias for _, bias in processors.logit_bias], np.float32)
        allowed = processors.allowed_token_ids
        self._allowed = None if allowed is None else np.unique(np.array(allowed, np.int64))
        self._words = _BadWords(processors.bad_words) if processors.bad_words else None
        self._longest = max(map(len, processors.bad_words), default=1)
        self._counted = (self._presence, self._frequency, self._repetition) != (0.0, 0.0, 1.0)
        self._seen = 0
        self._places: dict[int, int] = {}
        self._ids, self._counts = NO_IDS, NO_COUNTS

    def work(self, tokens: Sequence[int], awaited: int | None) -> LogitsWork:
        """The work on the logits of the token after `tokens`, or after the awaited token."""
        if self._counted:
            self._count(tokens)
        used = len(self._places)
        banned, then = NO_IDS, (NO_IDS, NO_IDS)
        if self._words is not None:
            tail = tokens[max(self._prompt, len(tokens) - self._longest + 1) :]
            banned = self._words.banned(tail if awaited is None else ())
            if awaited is not None:
                then = self._words.then(tail)
        return LogitsWork(
            ids=self._ids[:used],  # which are only added to
            counts=self._counts[:used].copy(),
            presence=self._presence,
            frequency=self._frequency,
            repetition=self._repetition,
            bias_ids=self._bias_ids,
            biases=self._biases,
            allowed=self._allowed,
            banned=banned,
            then=then,
            awaited=awaited,
        )

    def bars(self, generated: Sequence[int], token: int) -> bool:
        """Whether `token` is impossible behind these tokens of the sequence, whatever its logit."""
        if self._allowed is not None:
            place = int(self._allowed.searchsorted(token))
            if place == len(self._allowed) or self._allowed[place] != token:
                return True
        return self._words is not None and bool((self._words.banned(generated) == token).any())

    def _count(self, tokens: Sequence[int]) -> None:
        if not self._seen and self._repetition != 1.0:
            for token in dict.fromkeys(tokens[: self._prompt]):
                self._place(token)
        for token in tokens[max(self._seen, self._prompt) :]:
            place = self._places.get(token)  # before the arrays: `_place` may replace them
            place = self._place(token) if place is None else place
            self._counts[place] += 1
        self._seen = len(tokens)

    def _place(self, token: int) -> int:
        place = self._places[token] = len(self._places)
        if place >= len(self._ids):
            more = max(64, 2 * len(self._ids))
            ids, counts = np.zeros(more, np.int64), np.zeros(more, np.int32)
            ids[:place], counts[:place] = self._ids, self._counts
            self._ids, self._counts = ids, counts
        self._ids[place] = token
        return place

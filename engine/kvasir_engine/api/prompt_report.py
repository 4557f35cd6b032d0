"""A prompt's log-probabilities in answers: `prompt_logprobs`, and the echo of completions. Pure."""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass

from kvasir_engine.api.named_tokens import NamedToken, named
from kvasir_engine.api.schemas import PromptLogprob
from kvasir_engine.api.schemas import PromptLogprobs as ShownLogprobs
from kvasir_engine.api.tokenizer import TokenBytes
from kvasir_engine.protocol import PromptLogprobs


@dataclass(frozen=True)
class EchoedToken:
    """A prompt's token; `offset` is where its text begins, in characters of the prompt. `logprob` None: unknown."""

    token: NamedToken
    logprob: float | None
    top: list[tuple[NamedToken, float]]
    offset: int


class PromptReport:
    """The tokens of one prompt, and the scores of the last of them: all but the first, or fewer."""

    def __init__(self, vocabulary: TokenBytes, tokens: Sequence[int], scores: Sequence[PromptLogprobs]) -> None:
        self._vocabulary = vocabulary
        self._tokens = tokens
        self._scores = scores
        self._first = len(tokens) - len(scores)
        self._names: dict[int, NamedToken] = {}

    def __len__(self) -> int:
        return len(self._tokens)

    def shown(self, most: int) -> ShownLogprobs:
        """The value of `prompt_logprobs`, with the `most` likeliest."""
        entries: ShownLogprobs = [None] * self._first
        for token, score in zip(self._tokens[self._first :], self._scores, strict=True):
            entry = {str(token): PromptLogprob(score.logprob, score.rank, self._name(token).name)}
            for rank, (other, logprob) in enumerate(score.top[:most], 1):
                entry.setdefault(str(other), PromptLogprob(logprob, rank, self._name(other).name))
            entries.append(entry)
        return entries

    def echoed(self, text: str, most: int) -> list[EchoedToken]:
        """Each token of the prompt, which is echoed as `text`, with the `most` likeliest at its place."""
        offsets, first = self._offsets(text), self._first
        before = zip(self._tokens[:first], offsets[:first], strict=True)
        found = [EchoedToken(self._name(token), None, [], offset) for token, offset in before]
        for token, score, offset in zip(self._tokens[first:], self._scores, offsets[first:], strict=True):
            top = [(self._name(other), logprob) for other, logprob in score.top[:most]]
            found.append(EchoedToken(self._name(token), score.logprob, top, offset))
        return found

    def _name(self, token: int) -> NamedToken:
        known = self._names.get(token)
        if known is None:
            known = self._names[token] = named(self._vocabulary, token)
        return known

    def _offsets(self, text: str) -> list[int]:
        """Where each token begins. A special token may stand in the text by its name, and some tokenizers put a
        space before a text that the text has not.
        """
        utf8, offsets, at = codecs.getincrementaldecoder("utf-8")("replace"), list[int](), 0
        for token in self._tokens:
            offsets.append(min(at, len(text)))
            name = self._name(token)
            if name.raw is None:
                at += len(name.name) if text.startswith(name.name, at) else 0
                continue
            piece = utf8.decode(name.raw)
            if at == 0 and piece.startswith(" ") and not text.startswith(" "):
                piece = piece[1:]
            at += len(piece)
        return offsets

"""Detokenizes a stream: complete characters only, and no part of a stop string. Pure."""

import codecs
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from kvasir_engine.api.named_tokens import NamedToken, named
from kvasir_engine.api.prompt_report import PromptReport
from kvasir_engine.api.tokenizer import TokenBytes
from kvasir_engine.api.tools.types import Delta
from kvasir_engine.engine_client import Output
from kvasir_engine.protocol import TokenLogprobs


@dataclass(frozen=True)
class ScoredToken:
    """A shown token with its log-probability; `offset` is where its text begins, in characters of the answer."""

    token: NamedToken
    logprob: float
    top: list[tuple[NamedToken, float]]
    offset: int


class Piece(msgspec.Struct, frozen=True):
    """The next text of one choice. `tokens` is how many were generated for it, shown or held back; `ids` are those
    since the last piece that was not empty.

    The finish reason is "error" where there is a `failure`. `stop` is the stop string that ended the text.
    The first that is not empty has what is known of the `prompt`, where that is asked for.
    `deltas` are the text taken apart, where something takes it apart; then `text` is of the content alone.
    """

    text: str
    tokens: int
    scored: list[ScoredToken] = []
    finish_reason: str | None = None
    failure: Exception | None = None
    ids: tuple[int, ...] = ()
    stop: str | None = None
    prompt: PromptReport | None = None
    deltas: tuple[Delta, ...] | None = None


class ShownTokens:
    """A vocabulary in which some special tokens add their names to the text, for the parser of the text."""

    def __init__(self, vocabulary: TokenBytes, shown: Mapping[int, bytes]) -> None:
        self._vocabulary = vocabulary
        self._shown = shown

    def token_bytes(self, token: int) -> bytes:
        """The bytes that `token` adds to the text."""
        return self._shown.get(token) or self._vocabulary.token_bytes(token)

    def token_name(self, token: int) -> str | None:
        """The name of a token that adds no bytes."""
        return self._vocabulary.token_name(token)


@dataclass(frozen=True)
class _Waiting:
    token: ScoredToken
    end: int


class Detokenizer:
    """The text of one choice.

    Text is held back while it could be the beginning of one of `stop`. At the first whole one the answer ends
    before it, or before the longest of several that are whole at once. As with vLLM, the text of the first
    `min_tokens` tokens is not searched. A character that the answer ends in the middle of is dropped, as is the
    token that the engine stopped at.
    """

    def __init__(self, vocabulary: TokenBytes, stop: Sequence[str] = (), min_tokens: int = 0) -> None:
        self.vocabulary = vocabulary
        self._stop = tuple(stop)
        self._min_tokens = min_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self._decoded = 0  # characters decoded so far: those released, then those in _held
        self._tokens = 0
        self._waiting: deque[_Waiting] = deque()

    def push(self, output: Output) -> Piece:
        """Add the engine's next tokens. After a piece with a finish reason no more may come."""
        shown = len(output.tokens) - (output.finish_reason == "stop")
        if not self._stop and output.logprobs is None:
            return self._plain(output, shown)
        released: list[str] = []
        scored: list[ScoredToken] = []
        for place, token in enumerate(output.tokens[:shown]):
            self._tokens += 1
            raw = self.vocabulary.token_bytes(token)
            text = self._utf8.decode(raw)
            start = self._decoded
            self._decoded += len(text)
            if output.logprobs is not None:
                self._waiting.append(_Waiting(self._score(token, output.logprobs[place], start), self._decoded))
            self._held += text
            found = self._find_stop()
            if found is not None:
                cut, stop = found
                released.append(self._held[:cut])
                end = self._decoded - len(self._held) + cut
                scored += [each.token for each in self._waiting if each.token.offset < end]
                return Piece("".join(released), place + 1, scored, "stop", stop=stop)
            keep = self._hold_back()
            released.append(self._held[: len(self._held) - keep])
            self._held = self._held[len(self._held) - keep :]
        if output.finish_reason is not None:
            released.append(self._held)
            self._held = ""
        settled = self._decoded - len(self._held)
        while self._waiting and self._waiting[0].end <= settled:
            scored.append(self._waiting.popleft().token)
        by = self._stop_token(output) if self._stop and output.finish_reason == "stop" else None
        return Piece("".join(released), len(output.tokens), scored, output.finish_reason, stop=by)

    def _plain(self, output: Output, shown: int) -> Piece:
        """The same without stop strings and log-probabilities."""
        text = self._utf8.decode(b"".join(map(self.vocabulary.token_bytes, output.tokens[:shown])))
        self._tokens += shown
        self._decoded += len(text)
        return Piece(text, len(output.tokens), [], output.finish_reason)

    def _stop_token(self, output: Output) -> str | None:
        """The one of `stop` that names the special token at which the engine stopped."""
        name = self.vocabulary.token_name(output.tokens[-1]) if output.tokens else None
        return name if name in self._stop else None

    def _score(self, token: int, logprobs: TokenLogprobs, start: int) -> ScoredToken:
        top = [(named(self.vocabulary, each), logprob) for each, logprob in logprobs.top]
        return ScoredToken(named(self.vocabulary, token), logprobs.logprob, top, start)

    def _find_stop(self) -> tuple[int, str] | None:
        """The place where a stop string ends the answer, and that stop string."""
        if self._tokens <= self._min_tokens:
            return None
        found = [(at + len(stop), at, stop) for stop in self._stop if (at := self._held.find(stop)) >= 0]
        return min(found)[1:] if found else None

    def _hold_back(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        if self._tokens <= self._min_tokens:
            return 0
        for length in range(min(len(self._held), max(map(len, self._stop), default=0)), 0, -1):
            tail = self._held[-length:]
            if any(stop.startswith(tail) for stop in self._stop):
                return length
        return 0

"""Reasoning between two markers, before the answer: DeepSeek-R1's and Qwen3's `<think>`, Mistral's `[THINK]`."""

from dataclasses import dataclass
from typing import Protocol

from kvasir_engine.api.tools.base import first_of, held_back
from kvasir_engine.api.tools.json_scanner import SPACE
from kvasir_engine.api.tools.types import ContentDelta, Delta, MessageParser, ReasoningDelta


@dataclass(frozen=True)
class ThinkingMarkers:
    """Of one format."""

    open: str
    close: str


THINK = ThinkingMarkers("<think>", "</think>")
MISTRAL_THINK = ThinkingMarkers("[THINK]", "[/THINK]")


class PlainText:
    """A parser to which everything is content."""

    completed = 0
    reasoning = False
    may_reason = False

    def push(self, text: str) -> list[Delta]:
        """The text."""
        return [ContentDelta(text)] if text else []

    def end(self) -> list[Delta]:
        """Nothing waits."""
        return []


class _Counting(MessageParser, Protocol):
    @property
    def completed(self) -> int: ...


class ThinkingParser:
    """Separates reasoning from the answer, which `answer` parses. `begun`: the prompt ends with the opening marker.

    Whitespace around the reasoning is dropped. Text without the opening marker at its beginning is the answer.
    """

    def __init__(self, markers: ThinkingMarkers, begun: bool, answer: _Counting) -> None:
        self._markers = markers
        self._answer = answer
        self._text = ""
        self._at = "beginning of reasoning" if begun else "beginning"
        self._started = False  # some of the reasoning was shown

    @property
    def completed(self) -> int:
        """How many calls have ended."""
        return self._answer.completed

    @property
    def may_reason(self) -> bool:
        """Whether there may still be reasoning."""
        return self._at != "answer"

    @property
    def reasoning(self) -> bool:
        """Whether the next text is reasoning, as far as is known."""
        return self._at in ("reasoning", "beginning of reasoning")

    def push(self, text: str) -> list[Delta]:
        """What is certain once `text` has come."""
        if self._at == "answer":
            return self._answer.push(text)
        self._text += text
        return self._read(ended=False)

    def end(self) -> list[Delta]:
        """The rest, when no more text comes."""
        return [*self._read(ended=True), *self._answer.end()]

    def _read(self, ended: bool) -> list[Delta]:
        deltas: list[Delta] = []
        if self._at in ("beginning", "beginning of reasoning"):
            deltas += self._begin(ended)
        if self._at == "reasoning":
            deltas += self._reason(ended)
        if self._at == "beginning of answer":
            self._text = self._text.lstrip(SPACE)
            if self._text:
                self._at = "answer"
        if self._at == "answer" and self._text:
            text, self._text = self._text, ""
            deltas += self._answer.push(text)
        return deltas

    def _begin(self, ended: bool) -> list[Delta]:
        stripped = self._text.lstrip(SPACE)
        opening = self._markers.open
        if opening.startswith(stripped) and stripped != opening and not ended:
            return []
        if stripped.startswith(opening):
            self._text, self._at = stripped[len(opening) :], "reasoning"
        else:
            self._at = "answer" if self._at == "beginning" else "reasoning"
        return []

    def _reason(self, ended: bool) -> list[Delta]:
        if not self._started:
            self._text = self._text.lstrip(SPACE)
        closing = self._markers.close
        found = first_of(self._text, (closing,))
        if found is not None:
            shown, self._text = self._text[: found[0]].rstrip(SPACE), self._text[found[0] + len(closing) :]
            self._at = "beginning of answer"
        else:
            end = len(self._text) - (0 if ended else held_back(self._text, (closing,)))
            shown = self._text[:end].rstrip(SPACE)
            self._text = self._text[len(shown) :]
        self._started = self._started or bool(shown)
        return [ReasoningDelta(shown)] if shown else []

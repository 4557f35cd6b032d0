"""Parses one choice's pieces: the deltas that the API sends, and how the choice ends. Pure."""

import secrets
from dataclasses import dataclass

import msgspec

from kvasir_engine.api.detokenizer import Piece
from kvasir_engine.api.tools.formats import AnswerParser
from kvasir_engine.api.tools.thinking import ThinkingMarkers
from kvasir_engine.api.tools.types import ArgumentsDelta, ContentDelta, Delta, ReasoningDelta, ToolCallBegin


def new_call_id() -> str:
    """A unique id for a call."""
    return f"call_{secrets.token_hex(12)}"


def begun_by(tail: str, markers: ThinkingMarkers | None) -> bool | None:
    """Whether a prompt that ends with `tail` has begun the reasoning (True) or ended it (False); None: neither."""
    if markers is None:
        return None
    tail = tail.rstrip()
    return True if tail.endswith(markers.open) else False if tail.endswith(markers.close) else None


@dataclass(frozen=True)
class CallLimits:
    """`one`: the answer ends with its first call. `named`: the client named the function, so calls are no finish
    reason, as at OpenAI.
    """

    one: bool = False
    named: bool = False


class ChoiceParser:
    """Parses a choice's text.

    `reasoning_tokens` counts the tokens of the reasoning and its markers; with `shown` false the reasoning is only
    counted.
    """

    def __init__(self, parser: AnswerParser, limits: CallLimits, shown: bool = True) -> None:
        self.reasoning_tokens = 0
        self._parser = parser
        self._limits = limits
        self._shown = shown
        self._called = False

    @property
    def may_reason(self) -> bool:
        """Whether reasoning may still come, whose tokens are counted."""
        return self._parser.may_reason

    def parse(self, piece: Piece) -> Piece:
        """The piece with deltas, and the content as its text. It may end the choice before the engine does."""
        before = self._parser.reasoning
        deltas = self._parser.push(piece.text)
        if before or self._parser.reasoning:
            self.reasoning_tokens += piece.tokens
        finish = piece.finish_reason
        if finish is not None:
            deltas += self._parser.end()
        if self._limits.one:
            deltas = self._first_call(deltas)
            if finish is None and self._called and self._parser.completed:
                finish = "stop"
        self._called = self._called or any(isinstance(each, ToolCallBegin) for each in deltas)
        if not self._shown:
            deltas = [each for each in deltas if not isinstance(each, ReasoningDelta)]
        if finish == "stop" and self._called and not self._limits.named:
            finish = "tool_calls"
        text = "".join(each.text for each in deltas if isinstance(each, ContentDelta))
        return msgspec.structs.replace(piece, text=text, deltas=tuple(deltas), finish_reason=finish)

    def _first_call(self, deltas: list[Delta]) -> list[Delta]:
        kept: list[Delta] = []
        for delta in deltas:
            if isinstance(delta, ToolCallBegin) and not self._called:
                self._called = True
            elif self._called and not (isinstance(delta, ArgumentsDelta) and delta.index == 0):
                continue
            kept.append(delta)
        return kept

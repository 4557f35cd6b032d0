"""Splits an answer into consecutive parts: reasoning, text and tool calls. Pure."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from kvasir_engine.api.detokenizer import Piece, ScoredToken
from kvasir_engine.api.tools.types import ArgumentsDelta, ContentDelta, Delta, ReasoningDelta, ToolCallBegin


@dataclass(frozen=True)
class ReasoningPart:
    """The model's reasoning."""

    text: str = ""


@dataclass(frozen=True)
class TextPart:
    """Text of the answer, and its tokens where they have log-probabilities."""

    text: str = ""
    scored: Sequence[ScoredToken] = ()


@dataclass(frozen=True)
class ToolCallPart:
    """A tool call; `text` is its arguments, JSON as the model wrote it."""

    text: str
    id: str
    name: str


Part = ReasoningPart | TextPart | ToolCallPart


@dataclass(frozen=True)
class PartOpened:
    """A part begins, still without text. `index` counts the parts from 0."""

    index: int
    part: Part


@dataclass(frozen=True)
class PartGrown:
    """The next text of the part that is open; `part` is of its kind."""

    index: int
    part: Part
    text: str
    scored: Sequence[ScoredToken]


@dataclass(frozen=True)
class PartClosed:
    """A whole part. `cut`: the answer was cut off within it."""

    index: int
    part: Part
    cut: bool


Change = PartOpened | PartGrown | PartClosed


def deltas_of(piece: Piece) -> Sequence[Delta]:
    """A piece's deltas; where no parser made any, its text is one."""
    if piece.deltas is not None:
        return piece.deltas
    return (ContentDelta(piece.text),) if piece.text or piece.scored else ()


class AnswerParts:
    """Collects the pieces of one choice into parts, and returns what changes.

    Tokens with log-probabilities are those of the text that came with them, or next; those of reasoning and calls
    are dropped. `never_empty`: an answer of nothing is a text of nothing.
    """

    def __init__(self, never_empty: bool = False) -> None:
        self.closed: list[PartClosed] = []
        self._never_empty = never_empty
        self._open: Part | None = None
        self._texts: list[str] = []
        self._scored: list[ScoredToken] = []
        self._waiting: list[ScoredToken] = []

    def push(self, piece: Piece) -> list[Change]:
        """Take the next piece; with the last one all parts are closed."""
        changes: list[Change] = []
        deltas = deltas_of(piece)
        scored = [*self._waiting, *piece.scored]
        self._waiting = [] if deltas else scored
        for delta in deltas:
            match delta:
                case ContentDelta(text):
                    if not isinstance(self._open, TextPart):
                        changes += self._begin(TextPart())
                    changes.append(self._grow(text, scored))
                    scored = []
                case ReasoningDelta(text):
                    if not isinstance(self._open, ReasoningPart):
                        changes += self._begin(ReasoningPart())
                    changes.append(self._grow(text))
                case ToolCallBegin(_, id, name):
                    changes += self._begin(ToolCallPart("", id, name))
                case ArgumentsDelta(_, text):
                    changes.append(self._grow(text))
        if piece.finish_reason is not None:
            if self._open is None and self._never_empty:
                changes += self._begin(TextPart())
            changes += self._close(piece.finish_reason == "length" or piece.stop is not None)
        return changes

    def _begin(self, part: Part) -> list[Change]:
        changes = self._close(cut=False)
        self._open = part
        return [*changes, PartOpened(len(self.closed), part)]

    def _grow(self, text: str, scored: Sequence[ScoredToken] = ()) -> Change:
        assert self._open is not None
        self._texts.append(text)
        self._scored += scored
        return PartGrown(len(self.closed), self._open, text, scored)

    def _close(self, cut: bool) -> list[Change]:
        if self._open is None:
            return []
        part = replace(self._open, text="".join(self._texts))
        if isinstance(part, TextPart):
            part = replace(part, scored=tuple(self._scored))
        closed = PartClosed(len(self.closed), part, cut)
        self.closed.append(closed)
        self._open = None
        self._texts, self._scored = [], []
        return [closed]


def parts_of(pieces: Iterable[Piece], never_empty: bool = False) -> list[PartClosed]:
    """The parts of a whole answer."""
    parts = AnswerParts(never_empty)
    for piece in pieces:
        parts.push(piece)
    return parts.closed

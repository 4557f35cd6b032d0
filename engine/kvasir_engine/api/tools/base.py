"""What all formats share: pending text, markers that may be cut anywhere, and the resulting deltas."""

from collections.abc import Callable, Sequence

from kvasir_engine.api.tools.json_scanner import SPACE
from kvasir_engine.api.tools.types import ArgumentsDelta, ContentDelta, Delta, ReasoningDelta, ToolCallBegin

NewId = Callable[[], str]


def held_back(text: str, markers: Sequence[str]) -> int:
    """The length of the longest end of `text` that begins a marker without being one."""
    for length in range(min(len(text), max(map(len, markers), default=1) - 1), 0, -1):
        tail = text[-length:]
        if any(marker.startswith(tail) for marker in markers):
            return length
    return 0


def first_of(text: str, markers: Sequence[str]) -> tuple[int, str] | None:
    """The place of the first marker in `text`, and the marker. No marker is the beginning of another."""
    return min(((at, marker) for marker in markers if (at := text.find(marker)) >= 0), default=None)


class Writer:
    """Collects deltas. Whitespace around a tool call is not content."""

    def __init__(self, new_id: NewId) -> None:
        self.calls = 0
        self._new_id = new_id
        self._deltas: list[Delta] = []
        self._space = ""
        self._after_call = False

    def content(self, text: str) -> None:
        """Some text of the answer; whitespace waits for what comes after it."""
        text = self._space + text
        shown = text.rstrip(SPACE)
        self._space = text[len(shown) :]
        if shown:
            self._deltas.append(ContentDelta(shown))
            self._after_call = False

    def reasoning(self, text: str) -> None:
        if text:
            self._deltas.append(ReasoningDelta(text))

    def begin(self, name: str) -> None:
        self._space, self._after_call = "", True
        self._deltas.append(ToolCallBegin(self.calls, self._new_id(), name))
        self.calls += 1

    def arguments(self, text: str) -> None:
        """Some text of the arguments of the call that began last."""
        if text:
            self._deltas.append(ArgumentsDelta(self.calls - 1, text))

    def end(self) -> None:
        """No more text comes."""
        if self._space and not self._after_call:
            self._deltas.append(ContentDelta(self._space))
        self._space = ""

    def take(self) -> list[Delta]:
        """The deltas since the last call; neighbours of one kind are merged."""
        merged: list[Delta] = []
        for delta in self._deltas:
            last = merged[-1] if merged else None
            match last, delta:
                case ContentDelta(before), ContentDelta(text):
                    merged[-1] = ContentDelta(before + text)
                case ReasoningDelta(before), ReasoningDelta(text):
                    merged[-1] = ReasoningDelta(before + text)
                case ArgumentsDelta(index, before), ArgumentsDelta(other, text) if index == other:
                    merged[-1] = ArgumentsDelta(index, before + text)
                case _:
                    merged.append(delta)
        self._deltas.clear()
        return merged


class FormatParser:
    """A state machine over the pending text in `_text`.

    A state consumes what it can, and returns whether it changed anything; then the machine runs the current state
    again. `completed` counts the calls whose arguments have ended.
    """

    def __init__(self, new_id: NewId) -> None:
        self.completed = 0
        self._writer = Writer(new_id)
        self._text = ""
        self._ended = False
        self._state: Callable[[], bool] = self._free_text

    @property
    def reasoning(self) -> bool:
        """Whether the next text is reasoning, as far as is known."""
        return False

    @property
    def may_reason(self) -> bool:
        """Whether there may still be reasoning."""
        return False

    def push(self, text: str) -> list[Delta]:
        """What is certain once `text` has come."""
        self._text += text
        while self._state():
            pass
        return self._writer.take()

    def end(self) -> list[Delta]:
        """The rest, when no more text comes."""
        self._ended = True
        while self._state():
            pass
        self._finish()
        self._writer.end()
        return self._writer.take()

    def _free_text(self) -> bool:
        raise NotImplementedError

    def _go(self, state: Callable[[], bool]) -> bool:
        self._state = state
        return True

    def _finish(self) -> None:
        """Show what waits, as it came: it will never be whole."""
        self._writer.content(self._text)
        self._text = ""

    def _up_to(self, markers: Sequence[str], take: Callable[[str], None]) -> str | None:
        """Give `take` the text before the first marker, and take away both. The marker, or None if there is none
        yet; an end that may begin one waits.
        """
        found = first_of(self._text, markers)
        if found is not None:
            at, marker = found
            take(self._text[:at])
            self._text = self._text[at + len(marker) :]
            return marker
        end = len(self._text) - (0 if self._ended else held_back(self._text, markers))
        take(self._text[:end])
        self._text = self._text[end:]
        return None

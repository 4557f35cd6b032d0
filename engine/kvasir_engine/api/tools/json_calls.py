"""Calls that are JSON objects, alone or in an array, between markers or in place of an answer."""

from collections.abc import Callable
from dataclasses import dataclass

from kvasir_engine.api.tools.base import FormatParser, NewId
from kvasir_engine.api.tools.json_scanner import SPACE, CallReader


@dataclass(frozen=True)
class JsonFormat:
    """How calls are recognised in text.

    A call begins after a marker of `opens`, and with `bare` at the beginning of the answer; it may be in a `fence`.
    `separators` may stand between calls outside an array. A marker of `closes` after a call is removed.
    """

    opens: tuple[str, ...] = ()
    closes: tuple[str, ...] = ()
    separators: str = ""
    bare: bool = False
    fence: bool = False


class JsonCallParser(FormatParser):
    """Parses JSON calls in a text. Bare ones are calls only if they name one of the tools in `names`."""

    def __init__(self, new_id: NewId, names: frozenset[str], format: JsonFormat) -> None:
        super().__init__(new_id)
        self._format = format
        self._names = names
        self._raw = ""  # what is shown if this is no call
        self._array = False
        self._inside = False  # behind calls whose closing marker may come
        self._bare = False
        self._fenced = False
        self._reader = CallReader()
        self._announced = False
        if format.bare:
            self._state = self._beginning

    def _beginning(self) -> bool:
        """A bare answer: whitespace, perhaps a fence, and the call."""
        stripped = self._text.lstrip(SPACE)
        for fence in ("```json", "```") if self._format.fence else ():
            if stripped.startswith(fence):
                self._fenced = True
                stripped = stripped[len(fence) :].lstrip(SPACE)
                break
            if fence.startswith(stripped) and not self._ended:
                return False
        if not stripped and not self._ended:
            return False
        self._bare = stripped.startswith(("{", "[") if self._format.fence else "{")
        if not self._bare:
            return self._go(self._free_text)
        return self._take(len(self._text) - len(stripped), self._element)

    def _free_text(self) -> bool:
        closes = self._format.closes if self._inside else ()
        marker = self._up_to((*self._format.opens, *closes), self._writer.content)
        if marker is None:
            return False
        self._inside = False
        if marker in self._format.closes:
            return True
        self._raw, self._bare = marker, False
        return self._go(self._element)

    def _element(self) -> bool:
        """Before the first call of a block."""
        stripped = self._text.lstrip(SPACE)
        if not stripped:
            return self._ended and self._no_call()
        if stripped[0] == "[" and not self._array:
            self._array = True
            return self._take(len(self._text) - len(stripped) + 1, self._element)
        if stripped[0] == "{":
            self._reader, self._announced = CallReader(strict=self._bare), False
            return self._take(len(self._text) - len(stripped), self._object)
        return self._no_call()

    def _object(self) -> bool:
        reader, text = self._reader, self._text
        if not text:
            return False
        for at, character in enumerate(text):
            if not reader.feed(character):
                self._announce(text[:at])
                self._text = text[at:]
                return self._broken()
            if self._bare and reader.name is not None and reader.name not in self._names:
                self._announce(text[: at + 1])
                self._text = text[at + 1 :]
                return self._no_call()
            if reader.done:
                self._announce(text[: at + 1])
                self._text = text[at + 1 :]
                if not self._announced:
                    return self._no_call()
                if not reader.has_arguments:
                    self._writer.arguments("{}")
                self.completed += 1
                return self._go(self._after)
        self._announce(text)
        self._text = ""
        return False

    def _announce(self, read: str) -> None:
        """Emit what is known of the call; `read` is the latest part of its text."""
        reader = self._reader
        self._raw += read
        known = reader.name is not None and reader.name != "" and (reader.has_arguments or reader.done)
        if known and not self._announced and self._is_call(str(reader.name)):
            self._announced = True
            self._writer.begin(str(reader.name))
        if self._announced:
            self._raw = ""
            self._writer.arguments(reader.take())

    def _is_call(self, name: str) -> bool:
        return not self._bare or (name in self._names and self._reader.has_arguments)

    def _broken(self) -> bool:
        if not self._announced:
            return self._no_call()
        if not self._reader.arguments_ended:
            return self._go(self._rest)
        self.completed += 1
        return self._go(self._after)

    def _rest(self) -> bool:
        """Arguments that stop being JSON: emit all the rest as it came."""
        if self._up_to(self._format.closes, self._writer.arguments) is None:
            return False
        self.completed += 1
        self._array = self._inside = False
        return self._go(self._free_text)

    def _after(self) -> bool:
        """Behind a call: another one, the end of the block, or text."""
        for at, character in enumerate(self._text):
            if character in SPACE:
                continue
            if self._array and character == "]":
                self._array, self._raw = False, ""
                return self._drop(at + 1, self._after)
            if character in ("," if self._array else self._format.separators) and not self._raw.strip():
                return self._take(at + 1, self._after)
            if character == "{" and (self._raw.strip() or (not self._array and self._format.separators)):
                self._reader, self._announced = CallReader(strict=self._bare), False
                return self._take(at, self._object)
            return self._end_of_block()
        return self._ended and bool(self._text + self._raw) and self._end_of_block()

    def _end_of_block(self) -> bool:
        if self._fenced and not self._array:
            stripped = self._text.lstrip(SPACE)
            if stripped.startswith("```"):
                self._text, self._fenced = stripped[3:], False
            elif "```".startswith(stripped) and not self._ended:
                return False
        self._inside = True
        return self._no_call()

    def _no_call(self) -> bool:
        """The supposed beginning of a call is text."""
        self._writer.content(self._raw)
        self._raw, self._array = "", False
        return self._go(self._free_text)

    def _finish(self) -> None:
        self._writer.content(self._raw)
        super()._finish()

    def _take(self, count: int, state: Callable[[], bool]) -> bool:
        """Consume `count` characters, which are text if this is no call."""
        self._raw += self._text[:count]
        return self._drop(count, state)

    def _drop(self, count: int, state: Callable[[], bool]) -> bool:
        self._text = self._text[count:]
        return self._go(state)

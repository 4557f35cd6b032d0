"""Mistral's: `[TOOL_CALLS][{"name": ..., "arguments": {...}}]`, and since its tokenizer's version 11
`[TOOL_CALLS]name[ARGS]{...}` for each call, perhaps with a `[CALL_ID]` before the arguments.
"""

import re

from kvasir_engine.api.tools.base import NewId, first_of
from kvasir_engine.api.tools.json_calls import JsonCallParser, JsonFormat
from kvasir_engine.api.tools.json_scanner import MOST_NAME, SPACE
from kvasir_engine.api.tools.json_value import ValueReader

OPEN, ARGS, CALL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
_NAME = re.compile(r"[\w.:-]+")


class MistralParser(JsonCallParser):
    """Of both forms."""

    def __init__(self, new_id: NewId, names: frozenset[str]) -> None:
        super().__init__(new_id, names, JsonFormat(opens=(OPEN,)))
        self._value = ValueReader()

    def _element(self) -> bool:
        stripped = self._text.lstrip(SPACE)
        if not stripped or stripped[0] in "[{":
            return super()._element()
        found = first_of(stripped, (ARGS, CALL_ID, "{"))
        head = stripped if found is None else stripped[: found[0]]
        if not _NAME.match(head) or len(head) > MOST_NAME + len(CALL_ID):
            return self._no_call()
        if found is None:
            return self._ended and self._no_call()
        at, marker = found
        name = head.strip(SPACE)
        if marker == CALL_ID:
            found = first_of(stripped, (ARGS, "{"))
            if found is None or found[0] > 2 * MOST_NAME:
                return (self._ended or len(stripped) > 2 * MOST_NAME + len(ARGS)) and self._no_call()
            at, marker = found
        if not _NAME.fullmatch(name) or len(name) > MOST_NAME:
            return self._no_call()
        rest = stripped[at + (0 if marker == "{" else len(marker)) :].lstrip(SPACE)
        if not rest:
            return self._ended and self._no_call()
        if rest[0] not in "{[":
            return self._no_call()
        self._raw, self._text, self._value = "", rest, ValueReader()
        self._writer.begin(name)
        return self._go(self._bare_arguments)

    def _bare_arguments(self) -> bool:
        """Arguments that nothing encloses: they end where they are whole."""
        rest = self._value.read(self._text)
        self._writer.arguments(self._value.take())
        if rest is None:
            self._text = ""
            return False
        self._text = rest
        self._inside = True
        if not self._value.done:
            return self._go(self._rest)
        self.completed += 1
        return self._go(self._free_text)

    def _rest(self) -> bool:
        """Arguments that are no JSON from here on: all there is before the next call, as it came."""
        if self._up_to((OPEN,), self._writer.arguments) is None:
            return False
        self.completed += 1
        self._array, self._raw = False, OPEN
        return self._go(self._element)


def parser(new_id: NewId, names: frozenset[str]) -> MistralParser:
    """A parser of one message."""
    return MistralParser(new_id, names)

"""Llama 3.2's and 4's other form: an answer that is a list of Python calls, `[f(a=1, b="x"), g()]`, perhaps between
`<|python_start|>` and `<|python_end|>`.

The arguments of a call come as one delta: Python's text becomes JSON only when it is whole.
"""

import ast
import json
import re
from typing import Any

from kvasir_engine.api.tools.base import FormatParser, NewId
from kvasir_engine.api.tools.json_scanner import MOST_NAME, SPACE, writable

START, END = "<|python_start|>", "<|python_end|>"
MOST_CALL = 1 << 16
_NAME = re.compile(r"[A-Za-z_][\w.]*\(")


class PythonicParser(FormatParser):
    """Of a message that is nothing but calls of the tools' `names`. A call that is none makes text of the rest."""

    def __init__(self, new_id: NewId, names: frozenset[str]) -> None:
        super().__init__(new_id)
        self._names = names
        self._raw = ""
        self._at = 0  # how much of the call was looked at
        self._open = 0
        self._quote = ""
        self._escaped = False
        self._state = self._beginning

    def _beginning(self) -> bool:
        stripped = self._text.lstrip(SPACE)
        if START.startswith(stripped) and stripped != START and not self._ended:
            return False
        behind = stripped.removeprefix(START).lstrip(SPACE)
        if not behind and not self._ended:
            return False
        if not behind.startswith("["):
            return self._go(self._free_text)
        self._take(len(self._text) - len(behind) + 1)
        return self._go(self._call)

    def _free_text(self) -> bool:
        shown, self._text = self._text, ""
        self._writer.content(shown)
        return False

    def _call(self) -> bool:
        """One call, up to the parenthesis that closes it."""
        start = len(self._text) - len(self._text.lstrip(SPACE))
        for at in range(max(self._at, start), len(self._text)):
            if self._closes(self._text[at]):
                self._at = 0
                found = _called(self._text[start : at + 1], self._names)
                if found is None:
                    return self._no_call()
                self._writer.begin(found[0])
                self._writer.arguments(found[1])
                self.completed += 1
                self._raw, self._text = "", self._text[at + 1 :]
                return self._go(self._behind)
        self._at = len(self._text)
        text = self._text[start:]
        hopeless = text and not _NAME.match(text) and ("(" in text or len(text) > MOST_NAME)
        return bool(hopeless or len(text) > MOST_CALL or self._ended) and self._no_call()

    def _closes(self, character: str) -> bool:
        """Whether the call ends with this character."""
        if self._quote:
            if self._escaped:
                self._escaped = False
            elif character == "\\":
                self._escaped = True
            elif character == self._quote:
                self._quote = ""
        elif character in "'\"":
            self._quote = character
        elif character in "([{":
            self._open += 1
        elif character in ")]}":
            self._open -= 1
            return self._open <= 0
        return False

    def _behind(self) -> bool:
        stripped = self._text.lstrip(SPACE)
        if not stripped:
            return self._ended and bool(self._text) and self._go(self._free_text)
        if stripped[0] not in ",]":
            return self._go(self._free_text)
        self._take(len(self._text) - len(stripped) + 1)
        if stripped[0] == ",":
            return self._go(self._call)
        self._raw = ""
        return self._go(self._marker)

    def _marker(self) -> bool:
        stripped = self._text.lstrip(SPACE)
        if END.startswith(stripped) and stripped != END and not self._ended:
            return False
        self._text = stripped.removeprefix(END) if stripped.startswith(END) else self._text
        return self._go(self._free_text)

    def _take(self, count: int) -> None:
        self._raw += self._text[:count]
        self._text = self._text[count:]
        self._at = self._open = 0

    def _no_call(self) -> bool:
        self._text, self._raw = self._raw + self._text, ""
        return self._go(self._free_text)

    def _finish(self) -> None:
        self._writer.content(self._raw)
        super()._finish()


def _called(text: str, names: frozenset[str]) -> tuple[str, str] | None:
    """The name and the arguments as JSON of a Python call of literals; None if it is none."""
    try:
        parsed = ast.parse(text, mode="eval").body
        if not isinstance(parsed, ast.Call) or parsed.args:
            return None
        name = ast.unparse(parsed.func)
        arguments: dict[str, Any] = {str(each.arg): ast.literal_eval(each.value) for each in parsed.keywords}
        written = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
    named = name in names and all(each.arg is not None for each in parsed.keywords)
    return (name, written) if named and writable(written) else None


def parser(new_id: NewId, names: frozenset[str]) -> PythonicParser:
    """A parser of one message."""
    return PythonicParser(new_id, names)

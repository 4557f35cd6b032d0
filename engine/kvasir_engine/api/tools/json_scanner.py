"""Follows a JSON value character by character, and takes a tool call's name and arguments out of one. Pure."""

import json
import re
from typing import Literal

SPACE = " \t\n\r"
_LITERAL = re.compile(r"true|false|null|-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_LITERAL_CHARACTERS = frozenset("-+.0123456789eEtrufalsn")
MOST_DEPTH = 256
MOST_NAME = 256
_MEMBERS = ("name", "arguments", "parameters", "type", "id")
_ARGUMENTS = ("arguments", "parameters")

State = Literal[
    "value", "value or ]", "key", "key or }", "colon", "next", "string", "escape", "hex", "literal", "done"
]


class JsonScanner:
    """Says of each character whether it can continue a JSON value.

    Accepts control characters in strings: models write line breaks there.
    """

    def __init__(self) -> None:
        self.state: State = "value"
        self._open: list[str] = []
        self._in_key = False
        self._hex = 0
        self._literal = ""

    @property
    def depth(self) -> int:
        """How many objects and arrays are open."""
        return len(self._open)

    def feed(self, character: str) -> bool:
        """Go on by a character; False, with nothing changed, if no value goes on so."""
        state = self.state
        if state == "string":
            if character == '"':
                self._after_string()
            elif character == "\\":
                self.state = "escape"
            return True
        if state == "escape":
            if character == "u":
                self.state, self._hex = "hex", 4
                return True
            self.state = "string" if character in '"\\/bfnrt' else "escape"
            return self.state == "string"
        if state == "hex":
            if character not in "0123456789abcdefABCDEF":
                return False
            self._hex -= 1
            if not self._hex:
                self.state = "string"
            return True
        if state == "literal":
            if character in _LITERAL_CHARACTERS:
                self._literal += character
                return len(self._literal) < 400
            if not _LITERAL.fullmatch(self._literal):
                return False
            self._after_value()
            if self.state == "done":
                return character in SPACE
            return self.feed(character)
        return character in SPACE or self._structure(character)

    def _structure(self, character: str) -> bool:
        state = self.state
        if state in ("value", "value or ]"):
            if character == "]" and state == "value or ]":
                return self._close("[")
            return self._begin(character)
        if state in ("key", "key or }"):
            if character == '"':
                self.state, self._in_key = "string", True
                return True
            return character == "}" and state == "key or }" and self._close("{")
        if state == "colon" and character == ":":
            self.state = "value"
            return True
        if state == "next":
            if character == ",":
                self.state = "key" if self._open[-1] == "{" else "value"
                return True
            return (character == "}" and self._close("{")) or (character == "]" and self._close("["))
        return False

    def _begin(self, character: str) -> bool:
        if character in "{[":
            if len(self._open) == MOST_DEPTH:
                return False
            self._open.append(character)
            self.state = "key or }" if character == "{" else "value or ]"
        elif character == '"':
            self.state, self._in_key = "string", False
        elif character in "-0123456789tfn":
            self.state, self._literal = "literal", character
        else:
            return False
        return True

    def _close(self, opened: str) -> bool:
        if self._open[-1] != opened:
            return False
        self._open.pop()
        self._after_value()
        return True

    def _after_string(self) -> None:
        if self._in_key:
            self.state, self._in_key = "colon", False
        else:
            self._after_value()

    def _after_value(self) -> None:
        self.state = "next" if self._open else "done"


def clean(character: str) -> str:
    """A character of a JSON string as it has to be written there."""
    return character if character >= " " else json.dumps(character)[1:-1]


class CallReader:
    """Reads one object `{"name": ..., "arguments": {...}}`, its members in any order, others ignored.

    `name` is None until it was read. Arguments that are a string hold JSON once more. A `strict` one takes no
    members that calls do not have.
    """

    def __init__(self, strict: bool = False) -> None:
        self._strict = strict
        self.name: str | None = None
        self.has_arguments = False
        self.arguments_ended = False
        self.done = False
        self._scanner = JsonScanner()
        self._member: list[str] | None = None
        self._value: list[str] | None = None
        self._handing_on = False
        self._key = ""
        self._arguments: list[str] = []

    def take(self) -> str:
        """The text of the arguments since the last call."""
        text = "".join(self._arguments)
        self._arguments.clear()
        return text

    def feed(self, character: str) -> bool:
        """Go on by a character; False, with nothing changed, if this is no object of a call."""
        scanner = self._scanner
        before, depth = scanner.state, scanner.depth
        if depth == 0 and before == "value" and character not in "{" + SPACE:
            return False
        if not scanner.feed(character):
            return False
        if depth == 1 and before in ("key", "key or }") and character == '"':
            self._member = ['"']
        elif self._member is not None:
            self._member.append(clean(character))
            if scanner.state == "colon":
                self._key, self._member = json.loads("".join(self._member)), None
                if self._strict and self._key not in _MEMBERS:
                    return False
        elif depth == 1 and before == "value" and character not in SPACE:
            self._value = []
            self._add(character)
        elif self._value is not None:
            self._go_on(before, depth, character)
        if self._value is not None and scanner.depth == 1 and scanner.state == "next":
            self._end_value()
        self.done = scanner.state == "done"
        return self.name is None or bool(self.name)

    def _go_on(self, before: State, depth: int, character: str) -> None:
        if before == "literal" and depth == 1 and self._scanner.state != "literal":
            self._end_value()
        else:
            self._add(clean(character) if before == "string" else character)

    def _add(self, text: str) -> None:
        """More of the value; arguments that are an object or an array are not kept, but handed on."""
        assert self._value is not None
        if not self._value and text in "{[" and self._key in _ARGUMENTS and not self.arguments_ended:
            self.has_arguments = self._handing_on = True
        if self._handing_on:
            self._arguments.append(text)
        self._value.append("" if self._handing_on else text)

    def _end_value(self) -> None:
        assert self._value is not None
        value, handed_on = "".join(self._value), self._handing_on
        self._value, self._handing_on = None, False
        if handed_on:
            self.arguments_ended = True
        elif self._key == "name" and self.name is None:
            self.name = _name(value)
        elif self._key in _ARGUMENTS and not self.arguments_ended:
            self.has_arguments = self.arguments_ended = True
            self._arguments.append(_unwrapped(value))


def _name(literal: str) -> str:
    """A name; empty if it is none."""
    name = json.loads(literal)
    return name if isinstance(name, str) and len(name) <= MOST_NAME and writable(name) else ""


def writable(text: str) -> bool:
    """Whether UTF-8 has all of it: a half of a surrogate pair may have been escaped."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _unwrapped(value: str) -> str:
    """Arguments that are no object or array: JSON in a string is that JSON, null is none."""
    if value == "null":
        return "{}"
    if value.startswith('"'):
        inner: str = json.loads(value)
        try:
            if writable(inner) and isinstance(json.loads(inner), dict):
                return inner
        except (ValueError, RecursionError):
            pass
    return value

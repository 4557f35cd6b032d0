"""Parses the forms of calls that write each argument as an element of its own, its value as plain text.

The deltas are the JSON of the arguments. A value that can only be a string comes as it is written; others when they
are whole, as `value_types.as_json` has them.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

from kvasir_engine.api.tools.base import FormatParser, NewId, first_of, held_back
from kvasir_engine.api.tools.json_scanner import MOST_NAME, SPACE, JsonScanner
from kvasir_engine.api.tools.value_types import STRING, Schema, as_json, types_of

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_NAME = re.compile(r"[\w.:-]+")


@dataclass(frozen=True)
class XmlFormat:
    """The elements of a form. `name`: what stands between OPEN and the function's name; the name ends at
    `name_end`, or, where that is empty, at the first argument or the call's end.

    An argument is `key`, its name, `key_end`, `value`, its value and `value_end`. `call_end` ends the arguments.
    `trims`: a line break at either end of a value is none of it.
    """

    name: str
    name_end: str
    key: str
    key_end: str
    value: str
    value_end: str
    call_end: str
    trims: bool = False

    @property
    def markers(self) -> tuple[str, ...]:
        """All of them, for tokens that have to be seen."""
        own = (self.name, self.name_end, self.key, self.key_end, self.value, self.value_end, self.call_end)
        return (OPEN, CLOSE, *(each for each in own if each.startswith("<")))


class Argument:
    """One argument as JSON, whose value comes in pieces. `lead` is what stands before the value; None: there was an
    argument of this name, and this one is left out. `trims` as the format has it.
    """

    def __init__(self, lead: str | None, types: frozenset[str], trims: bool) -> None:
        self._lead = lead
        self._types = types
        self._trims = trims
        self._begun = False
        self._value = ""
        self._json: JsonScanner | None = None if "string" in types else JsonScanner()

    def quotes_next(self, text: str) -> bool:
        """Whether what follows `text`, the next piece, is within a string of the value's JSON."""
        for character in text:
            if self._json is not None and not self._json.feed(character):
                self._json = None
        return self._json is not None and self._json.state in ("string", "escape")

    def more(self, text: str, whole: bool) -> str:
        """The JSON that a piece adds; `whole`: it is the last."""
        if self._trims and text and not self._begun:
            text = text.removeprefix("\n")
            self._begun = True
        if self._trims and whole:
            text = text.removesuffix("\n")
        if self._lead is None:
            return ""
        if self._types != STRING:
            self._value += text
            return self._lead + as_json(self._value, self._types) if whole else ""
        opening, self._lead = self._lead and self._lead + '"', ""
        return opening + json.dumps(text, ensure_ascii=False)[1:-1] + ('"' if whole else "")


class XmlCallParser(FormatParser):
    """Of one message. `schemas` are those of the functions' arguments."""

    def __init__(self, new_id: NewId, form: XmlFormat, schemas: Mapping[str, Schema]) -> None:
        super().__init__(new_id)
        self._form = form
        self._schemas = schemas
        self._raw = ""  # what is text, if no call or argument comes of it
        self._name = ""
        self._schema: Schema = {}
        self._keys: set[str] = set()
        self._argument = Argument(None, STRING, False)

    def _free_text(self) -> bool:
        if self._up_to((OPEN,), self._writer.content) is None:
            return False
        self._raw = OPEN
        return self._go(self._opened if self._form.name else self._named)

    def _opened(self) -> bool:
        """Behind the marker that opens a call, where another one has to follow."""
        found = self._next_marker((self._form.name,))
        if found is None:
            return self._ended and self._no_call()
        return self._go(self._named) if found else self._no_call()

    def _named(self) -> bool:
        form = self._form
        found = first_of(self._text, (form.name_end,) if form.name_end else (form.key, form.call_end))
        if found is None:
            return (self._ended or len(self._text) > 2 * MOST_NAME) and self._no_call()
        at, _ = found
        self._name = self._text[:at].strip(SPACE)
        if at > MOST_NAME or not _NAME.fullmatch(self._name):
            return self._no_call()
        at += len(form.name_end)
        self._raw += self._text[:at]
        self._text = self._text[at:]
        return self._go(self._first)

    def _first(self) -> bool:
        """Behind the name: an argument or the end makes it a call."""
        before = self._raw
        found = self._next_marker((self._form.key, self._form.call_end))
        if found is None:
            return self._ended and self._no_call()
        if not found:
            return self._no_call()
        self._raw = self._raw.removeprefix(before)
        self._schema = self._schemas.get(self._name, {})
        self._keys.clear()
        self._writer.begin(self._name)
        self._writer.arguments("{")
        return self._go(self._key) if found == self._form.key else self._end_of_call()

    def _key(self) -> bool:
        form = self._form
        found = first_of(self._text, (form.key_end,))
        if found is None:
            return len(self._text) > 2 * MOST_NAME and self._broken()
        at, marker = found
        key = self._text[:at].strip(SPACE)
        if at > MOST_NAME or not key or "<" in key:
            return self._broken()
        self._raw += self._text[: at + len(marker)]
        self._text = self._text[at + len(marker) :]
        properties = self._schema.get("properties")
        other = self._schema.get("additionalProperties", True)
        schema = properties.get(key, other) if isinstance(properties, dict) else other
        lead = None
        if key not in self._keys:
            lead = f"{', ' if self._keys else ''}{json.dumps(key, ensure_ascii=False)}: "
            self._keys.add(key)
        self._argument = Argument(lead, types_of(schema, self._schema), form.trims)
        return self._go(self._value_opens if form.value else self._value)

    def _value_opens(self) -> bool:
        found = self._next_marker((self._form.value,))
        if found is None:
            return False
        return self._go(self._value) if found else self._broken()

    def _value(self) -> bool:
        """A string comes as it is read, but for what may be the line break at its end."""
        self._raw = ""
        end = self._form.value_end
        found = first_of(self._text, (end,))
        if found is not None:
            at, marker = found
            text, self._text = self._text[:at], self._text[at + len(marker) :]
            ended = not self._argument.quotes_next(text)
            if ended:
                self._writer.arguments(self._argument.more(text, True))
                return self._go(self._between)
            self._argument.quotes_next(marker)
            self._writer.arguments(self._argument.more(text + marker, False))
            return True
        kept = held_back(self._text, (end, "\n" + end) if self._form.trims else (end,))
        text = self._text[: len(self._text) - kept]
        self._text = self._text[len(text) :]
        self._argument.quotes_next(text)
        self._writer.arguments(self._argument.more(text, False))
        return False

    def _between(self) -> bool:
        """Behind an argument: the next one, or the call's end."""
        found = self._next_marker((self._form.key, self._form.call_end))
        if found is None:
            return False
        if not found:
            return self._broken()
        return self._go(self._key) if found == self._form.key else self._end_of_call()

    def _end_of_call(self) -> bool:
        self._raw = ""
        self._writer.arguments("}")
        self.completed += 1
        return self._go(self._closed if self._form.call_end != CLOSE else self._free_text)

    def _closed(self) -> bool:
        """Behind the function: the marker that closes the call, if it comes."""
        if self._next_marker((CLOSE,)) is None and not self._ended:
            return False
        self._raw = ""
        return self._go(self._free_text)

    def _broken(self) -> bool:
        """What comes is no argument: the call has those before it, and the rest is text."""
        self._writer.arguments("}")
        self.completed += 1
        return self._no_call()

    def _next_marker(self, markers: tuple[str, ...]) -> str | None:
        """The marker of these that comes next, behind whitespace, which is taken; "" if another text comes; None
        while that is unknown.
        """
        stripped = self._text.lstrip(SPACE)
        for marker in markers:
            if stripped.startswith(marker):
                taken = len(self._text) - len(stripped) + len(marker)
                self._raw += self._text[:taken]
                self._text = self._text[taken:]
                return marker
        return None if any(marker.startswith(stripped) for marker in markers) else ""

    def _no_call(self) -> bool:
        self._writer.content(self._raw)
        self._raw = ""
        return self._go(self._free_text)

    def _finish(self) -> None:
        """A call that was cut off keeps the arguments so far; else what waits is text."""
        if self._state == self._free_text:
            super()._finish()

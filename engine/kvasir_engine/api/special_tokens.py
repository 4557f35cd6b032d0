"""Separates special tokens in users' text from the markers that a chat template writes. Pure.

A user's `<|im_end|>` gets a character inserted after its first one; no text has that character, and it survives
what templates do with text (strip, split, join). It is removed after the rendered text was split at the remaining
markers, which are the template's own.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Unicode's noncharacters: not for texts that are exchanged, and no template looks for them.
_NONCHARACTERS = [chr(each) for each in range(0xFDD0, 0xFDF0)]

Segment = str | int
"""A text to encode, or a token."""


class Unmarkable(Exception):
    """The texts use all noncharacters."""


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield key
            yield from _texts(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _texts(each)


def _map(value: Any, pattern: re.Pattern[str], mark: str) -> Any:
    if isinstance(value, str):
        while pattern.search(value):  # again, where two markers overlapped
            value = pattern.sub(lambda match: match[0][0] + mark + match[0][1:], value)
        return value
    if isinstance(value, Mapping):
        return {_map(key, pattern, mark): _map(each, pattern, mark) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_map(each, pattern, mark) for each in value]
    return value


def _any_of(names: Iterable[str]) -> re.Pattern[str]:
    return re.compile("|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)))


@dataclass(frozen=True)
class Strips:
    """The markers that absorb the whitespace before or after them."""

    before: frozenset[str] = frozenset()
    after: frozenset[str] = frozenset()


class Markers:
    """The tokens whose names have a meaning: `special` ones, and `others` in brackets such as `<think>`.

    Assistants' messages may have the others: the model wrote them, and templates look for them.
    """

    def __init__(
        self, special: Mapping[str, int], others: Mapping[str, int], strips: "Strips | None" = None
    ) -> None:
        self._strips = strips or Strips()
        self._special = {name: token for name, token in special.items() if len(name) > 1}
        self._all = {**others, **self._special}

    def escape(self, messages: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], str | None]:
        """The messages with their markers broken up, and the character used; None if there are none.

        Keys and values at any depth are escaped. Raises Unmarkable.
        """
        texts = [text for message in messages for text in _texts(message)]
        whole = "\n".join(texts)
        present = [name for name in self._all if name in whole]
        found = [self._found(message, present) for message in messages] if present else []
        if not any(found):
            return [dict(message) for message in messages], None
        mark = next((each for each in _NONCHARACTERS if not any(each in text for text in texts)), None)
        if mark is None:
            raise Unmarkable("the messages use all of Unicode's noncharacters")
        pairs = zip(messages, found, strict=True)
        return [_map(message, _any_of(names), mark) if names else dict(message) for message, names in pairs], mark

    def _found(self, message: Mapping[str, Any], present: Sequence[str]) -> list[str]:
        names = (
            [name for name in present if name in self._special] if message.get("role") == "assistant" else present
        )
        texts = list(_texts(message))
        return [name for name in names if any(name in text for text in texts)]

    def split(self, rendered: str, mark: str) -> list[Segment]:
        """The template's markers as tokens, and the unescaped text between them."""
        segments: list[Segment] = []
        at, last = 0, ""
        present = [name for name in self._all if name in rendered]
        for match in _any_of(present).finditer(rendered) if present else ():
            segments += [self._between(rendered[at : match.start()], last, match[0]).replace(mark, "")]
            segments += [self._all[match[0]]]
            at, last = match.end(), match[0]
        segments.append(self._between(rendered[at:], last, "").replace(mark, ""))
        return [each for each in segments if each != ""]

    def _between(self, text: str, left: str, right: str) -> str:
        text = text.lstrip() if left in self._strips.after else text
        return text.rstrip() if right in self._strips.before else text

"""The parts of a model's output: content, reasoning and tool calls, whole and as deltas."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class ContentDelta:
    """The next text of the answer itself."""

    text: str


@dataclass(frozen=True)
class ReasoningDelta:
    """The next text of the reasoning before the answer."""

    text: str


@dataclass(frozen=True)
class ToolCallBegin:
    """A tool call begins; `index` counts the calls of one message from 0."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class ArgumentsDelta:
    """The next text of the arguments of the call with this `index`."""

    index: int
    text: str


Delta = ContentDelta | ReasoningDelta | ToolCallBegin | ArgumentsDelta


@dataclass(frozen=True)
class ParsedCall:
    """A tool call. `arguments` is JSON as the model wrote it: cut off where the answer was."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class ParsedMessage:
    """A whole message; `content` and `reasoning` are None if empty."""

    content: str | None
    reasoning: str | None
    tool_calls: tuple[ParsedCall, ...]


class MessageParser(Protocol):
    """Parses one message as its text comes. The joined deltas do not depend on how the text was cut."""

    @property
    def reasoning(self) -> bool:
        """Whether the next text is reasoning, as far as is known."""
        ...

    def push(self, text: str) -> list[Delta]:
        """What is certain once `text` has come."""
        ...

    def end(self) -> list[Delta]:
        """The rest, when no more text comes."""
        ...


def joined(deltas: Iterable[Delta]) -> ParsedMessage:
    """The message from its deltas."""
    content: list[str] = []
    reasoning: list[str] = []
    begun: list[ToolCallBegin] = []
    arguments: list[list[str]] = []
    for delta in deltas:
        match delta:
            case ContentDelta(text):
                content.append(text)
            case ReasoningDelta(text):
                reasoning.append(text)
            case ToolCallBegin():
                begun.append(delta)
                arguments.append([])
            case ArgumentsDelta(index, text):
                arguments[index].append(text)
    calls = (ParsedCall(each.id, each.name, "".join(parts)) for each, parts in zip(begun, arguments, strict=True))
    return ParsedMessage("".join(content) or None, "".join(reasoning) or None, tuple(calls))

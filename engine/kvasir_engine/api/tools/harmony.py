"""gpt-oss's harmony: messages in channels, of which analysis is reasoning, and calls are messages to a function.

`<|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>commentary to=functions.NAME
<|constrain|>json<|message|>{...}<|call|>`. This reads the text of the markers. OpenAI's own library reads tokens of
one vocabulary, which it downloads when it is first used.
"""

import re

from kvasir_engine.api.tools.base import FormatParser, NewId
from kvasir_engine.api.tools.json_scanner import MOST_NAME, SPACE

START, CHANNEL, MESSAGE, CONSTRAIN = "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"
ENDS = ("<|end|>", "<|call|>", "<|return|>")
MARKERS = (START, CHANNEL, MESSAGE, CONSTRAIN, *ENDS)
FUNCTIONS = "functions."
_CHANNEL = re.compile(r"<\|channel\|>\s*([A-Za-z]+)")
_TO = re.compile(r"(?:^|\s)to=([^\s<]+)")
_MOST_HEADER = 2 * MOST_NAME
_BEGINNINGS = (START, CHANNEL, MESSAGE, "to=")


class HarmonyParser(FormatParser):
    """Of one answer's messages. Without `calls`, what is said to a function is content."""

    def __init__(self, new_id: NewId, calls: bool, reasoning: bool) -> None:
        super().__init__(new_id)
        self._calls = calls
        self._shows_reasoning = reasoning
        self._raw = ""
        self._kind = "content"
        self._begun: set[str] = set()  # the kinds of which there was a message before
        self._state = self._beginning

    @property
    def reasoning(self) -> bool:
        return self._state == self._body and self._kind == "reasoning"

    @property
    def may_reason(self) -> bool:
        return self._shows_reasoning

    def _beginning(self) -> bool:
        """The prompt ends within a header; what comes first is the rest of it, unless the model leaves it out."""
        stripped = self._text.lstrip(SPACE)
        if any(each.startswith(stripped) and each != stripped for each in _BEGINNINGS) and not self._ended:
            return False
        begins = any(stripped.startswith(each) for each in _BEGINNINGS)
        return self._go(self._header if begins else self._between)

    def _between(self) -> bool:
        marker = self._up_to((START, CHANNEL, *ENDS), self._writer.content)
        if marker is None:
            return False
        if marker in (START, CHANNEL):
            self._raw = marker
            return self._go(self._header)
        return True

    def _header(self) -> bool:
        head, marker, rest = self._text.partition(MESSAGE)
        if not marker:
            none = self._ended or len(head) > _MOST_HEADER + len(MESSAGE)
            return none and self._no_message()
        if len(head) > _MOST_HEADER or any(end in head for end in ENDS):
            return self._no_message()
        head, self._raw, self._text = self._raw + head, "", rest
        channel, to = _CHANNEL.search(head), _TO.search(head.replace(CHANNEL, " " + CHANNEL))
        self._kind = "content"
        if to is not None and self._calls and to[1] != "user":
            self._kind = "call"
            self._writer.begin(to[1].removeprefix(FUNCTIONS) or to[1])
        elif to is None and channel is not None and channel[1] == "analysis" and self._shows_reasoning:
            self._kind = "reasoning"
        return self._go(self._message_begins)

    def _message_begins(self) -> bool:
        """The second message of a kind begins on a line of its own."""
        if not self._text:
            return False
        if self._kind in self._begun and self._kind != "call":
            self._show("\n")
        self._begun.add(self._kind)
        return self._go(self._body)

    def _body(self) -> bool:
        marker = self._up_to((*ENDS, START, CHANNEL), self._show)
        if marker is None:
            return False
        self.completed += self._kind == "call"
        self._raw = marker if marker in (START, CHANNEL) else ""
        return self._go(self._header if self._raw else self._between)

    def _show(self, text: str) -> None:
        if self._kind == "call":
            self._writer.arguments(text)
        elif self._kind == "reasoning":
            self._writer.reasoning(text)
        else:
            self._writer.content(text)

    def _no_message(self) -> bool:
        """What was taken for the header of a message is text."""
        self._writer.content(self._raw)
        self._raw = ""
        return self._go(self._between_or_text)

    def _between_or_text(self) -> bool:
        """Past a header that is none: its own markers are text, so that the end is found."""
        marker = self._up_to((START, *ENDS), self._writer.content)
        if marker is None:
            return False
        self._raw = marker if marker == START else ""
        return self._go(self._header if marker == START else self._between)

"""DeepSeek's, between `<｜tool▁calls▁begin｜>` and `<｜tool▁calls▁end｜>`.

A call of V3 and R1 is `<｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME`, a line break, and the arguments as a
fenced block of JSON; one of V3.1 `<｜tool▁call▁begin｜>NAME<｜tool▁sep｜>{...}`. Both end with
`<｜tool▁call▁end｜>`.
"""

from kvasir_engine.api.tools.base import FormatParser, NewId
from kvasir_engine.api.tools.json_scanner import MOST_NAME, SPACE
from kvasir_engine.api.tools.json_value import ValueReader

CALLS, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL, SEPARATOR, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
MARKERS = (CALLS, CALLS_END, CALL, SEPARATOR, CALL_END)
_KIND = "function"
_FENCES = ("```json", "```")


class DeepseekParser(FormatParser):
    """Of both forms."""

    def __init__(self, new_id: NewId) -> None:
        super().__init__(new_id)
        self._raw = ""
        self._inside = False
        self._fenced = False
        self._value = ValueReader()

    def _free_text(self) -> bool:
        marker = self._up_to((CALLS, CALLS_END, CALL) if self._inside else (CALLS, CALL), self._writer.content)
        if marker is None:
            return False
        if marker == CALLS_END:
            self._inside = False
            return True
        self._raw = marker
        return self._go(self._between if marker == CALLS else self._head)

    def _between(self) -> bool:
        """Behind the marker that opens all calls."""
        stripped = self._text.lstrip(SPACE)
        if CALL.startswith(stripped) and stripped != CALL and not self._ended:
            return False
        if not stripped.startswith(CALL):
            return self._no_call()
        self._take(len(self._text) - len(stripped) + len(CALL))
        return self._go(self._head)

    def _head(self) -> bool:
        """The name, and what stands before the arguments."""
        head, separator, rest = self._text.partition(SEPARATOR)
        if not separator:
            none = len(head) > MOST_NAME + len(SEPARATOR) or CALL_END in head or CALLS_END in head
            return (self._ended or none) and self._no_call()
        name, body = head.strip(SPACE), rest.lstrip(SPACE)
        if not body or len(head) > MOST_NAME:
            return (self._ended or bool(body)) and self._no_call()
        if name == _KIND and body[0] != "{":
            line, newline, body = body.partition("\n")
            if not newline or len(line) > MOST_NAME:
                return (self._ended or len(line) > MOST_NAME) and self._no_call()
            name, body = line.strip(SPACE), body.lstrip(SPACE)
        if not name or "<｜" in name:
            return self._no_call()
        if any(each.startswith(body) for each in _FENCES) and body != _FENCES[0]:
            return self._ended and self._no_call()
        fence = next((each for each in _FENCES if body.startswith(each)), "")
        body = body[len(fence) :].lstrip(SPACE)
        if not body or body[0] not in "{[":
            return (self._ended or bool(body)) and self._no_call()
        self._raw, self._fenced, self._text = "", bool(fence), body
        self._writer.begin(name)
        self._value = ValueReader()
        return self._go(self._arguments)

    def _arguments(self) -> bool:
        rest = self._value.read(self._text)
        self._writer.arguments(self._value.take())
        if rest is None:
            self._text = ""
            return False
        self._text = rest
        if not self._value.done:
            return self._go(self._rest)
        self.completed += 1
        return self._go(self._behind)

    def _behind(self) -> bool:
        """Behind whole arguments: the fence's end, and the call's."""
        stripped = self._text.lstrip(SPACE)
        ends = ("```", CALL_END) if self._fenced else (CALL_END,)
        if any(each.startswith(stripped) and each != stripped for each in ends) and not self._ended:
            return False
        for each in ends:
            if stripped.startswith(each):
                self._text, self._fenced = stripped[len(each) :], False
                if each == "```":
                    return True
                break
        self._inside = True
        return self._go(self._free_text)

    def _rest(self) -> bool:
        """Arguments that are no JSON from here on: all there is, as it came."""
        if self._up_to((CALL_END,), self._writer.arguments) is None:
            return False
        self.completed += 1
        self._inside = True
        return self._go(self._free_text)

    def _no_call(self) -> bool:
        self._writer.content(self._raw)
        self._raw = ""
        return self._go(self._free_text)

    def _finish(self) -> None:
        self._writer.content(self._raw)
        super()._finish()

    def _take(self, count: int) -> None:
        self._raw += self._text[:count]
        self._text = self._text[count:]


def parser(new_id: NewId, names: frozenset[str]) -> DeepseekParser:
    """A parser of one message."""
    return DeepseekParser(new_id)

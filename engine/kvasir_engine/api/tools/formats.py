"""The formats by name, and which of them a model's chat template writes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from kvasir_engine.api.tools import (
    deepseek,
    glm45,
    harmony,
    hermes,
    llama3_json,
    mistral,
    plain_json,
    pythonic,
    qwen3_coder,
)
from kvasir_engine.api.tools.base import FormatParser, NewId
from kvasir_engine.api.tools.harmony import HarmonyParser
from kvasir_engine.api.tools.parser_names import ReasoningParserName, ToolParserName
from kvasir_engine.api.tools.thinking import MISTRAL_THINK, THINK, PlainText, ThinkingMarkers, ThinkingParser
from kvasir_engine.api.tools.types import MessageParser
from kvasir_engine.api.tools.value_types import Schema
from kvasir_engine.api.tools.xml_calls import XmlCallParser, XmlFormat

_PARSERS: dict[str, Callable[[NewId, frozenset[str]], FormatParser]] = {
    "deepseek_v3": deepseek.parser,
    "hermes": hermes.parser,
    "json": plain_json.parser,
    "llama3_json": llama3_json.parser,
    "mistral": mistral.parser,
    "pythonic": pythonic.parser,
}
XML_FORMS: dict[ToolParserName, XmlFormat] = {"glm45": glm45.FORM, "qwen3_coder": qwen3_coder.FORM}
NO_SCHEMAS: Mapping[str, Schema] = {}
_TOOL_MARKERS: dict[str, tuple[str, ...]] = {
    "deepseek_v3": deepseek.MARKERS,
    "glm45": glm45.FORM.markers,
    "hermes": (hermes.OPEN, hermes.CLOSE),
    "llama3_json": (llama3_json.TAG,),
    "mistral": (mistral.OPEN, mistral.ARGS, mistral.CALL_ID),
    "openai": harmony.MARKERS,
    "pythonic": (pythonic.START, pythonic.END),
    "qwen3_coder": qwen3_coder.FORM.markers,
}
_THINKING: dict[str, ThinkingMarkers] = {"deepseek_r1": THINK, "mistral": MISTRAL_THINK, "qwen3": THINK}


class AnswerParser(MessageParser, Protocol):
    """A parser that knows how many calls have ended."""

    @property
    def completed(self) -> int:
        """How many calls have ended."""
        ...

    @property
    def may_reason(self) -> bool:
        """Whether there may still be reasoning."""
        ...


@dataclass(frozen=True)
class OutputFormat:
    """How a model writes calls and reasoning. `tools` is "none" where its calls cannot be read.

    `tools_in_system_message`: the chat template knows no tools, so a system message describes them. `newer`: the
    format's later form, as DeepSeek's since V3.1 and Mistral's since version 11 of its tokenizer.
    """

    tools: ToolParserName = "none"
    reasoning: ReasoningParserName = "none"
    tools_in_system_message: bool = False
    newer: bool = False

    @property
    def thinking(self) -> ThinkingMarkers | None:
        """The markers around the reasoning, where it has such."""
        return _THINKING.get(self.reasoning)

    def markers(self, calls: bool) -> tuple[str, ...]:
        """Those that the parser has to see, though they may be special tokens."""
        shown = _TOOL_MARKERS.get(self.tools, ()) if calls else ()
        if self.reasoning == "openai":
            shown += harmony.MARKERS
        thinking = self.thinking
        return shown if thinking is None else (*shown, thinking.open, thinking.close)

    def parser(
        self,
        new_id: NewId,
        names: frozenset[str] | None,
        begun: bool | None,
        schemas: Mapping[str, Schema] = NO_SCHEMAS,
    ) -> AnswerParser:
        """A parser of one answer. `names` are the tools' that may be called; None: calls are text. `schemas` are
        those of their arguments, for formats that write values without their types.

        `begun`: whether the prompt ends within the reasoning (True) or behind it (False), if either.
        """
        if "openai" in (self.reasoning, self.tools if names is not None else ""):
            return HarmonyParser(new_id, names is not None and self.tools == "openai", self.reasoning == "openai")
        answer: AnswerParser = PlainText()
        if names is not None and self.tools in _PARSERS:
            answer = _PARSERS[self.tools](new_id, names)
        elif names is not None and self.tools in XML_FORMS:
            answer = XmlCallParser(new_id, XML_FORMS[self.tools], schemas)
        thinking = self.thinking
        if thinking is None or begun is False:
            return answer
        return ThinkingParser(thinking, begun is True or self.reasoning == "deepseek_r1", answer)


def output_format(
    template: str, tools: ToolParserName = "auto", reasoning: ReasoningParserName = "auto"
) -> OutputFormat:
    """How a model with this chat template writes, unless it is said."""
    tools_in_system_message = "tools" not in template and tools in ("auto", "hermes")
    if "tools" not in template and not tools_in_system_message:
        tools = "none"  # the message that tells of them is in the form of hermes
    if tools == "auto":
        tools = "hermes" if tools_in_system_message else _tools_of(template)
    reasoning = _reasoning_of(template) if reasoning == "auto" else reasoning
    newer = mistral.ARGS in template if tools == "mistral" else "```json" not in template
    return OutputFormat(tools, reasoning, tools_in_system_message, newer)


def _tools_of(template: str) -> ToolParserName:
    """The format that a template with tools has in its own text."""
    if deepseek.CALL in template:
        return "deepseek_v3"
    if mistral.OPEN in template:
        return "mistral"
    if harmony.CHANNEL in template and harmony.MESSAGE in template:
        return "openai"
    if hermes.OPEN in template:  # Qwen3-Coder and GLM have a form of XML between the same markers
        xml = (name for name, form in XML_FORMS.items() if form.key in template)
        return next(xml, "hermes")
    if pythonic.START in template:
        return "pythonic"
    if llama3_json.TAG in template or ("<|start_header_id|>" in template and '"parameters"' in template):
        return "llama3_json"
    return "json"


def _reasoning_of(template: str) -> ReasoningParserName:
    if harmony.CHANNEL in template and "analysis" in template:
        return "openai"
    if MISTRAL_THINK.open in template:
        return "mistral"
    return "qwen3" if THINK.close in template else "none"

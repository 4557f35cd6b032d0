"""How answers are read, as the command line says it."""

from dataclasses import dataclass

from kvasir_engine.api.tools.parser_names import (
    REASONING_PARSERS,
    TOOL_PARSERS,
    ReasoningParserName,
    ToolParserName,
)
from kvasir_engine.errors import UserError

TOOL_VARIABLE, REASONING_VARIABLE = "KVASIR_TOOL_CALL_PARSER", "KVASIR_REASONING_PARSER"
TOOL_HELP = f"the form of the model's tool calls, auto: its chat template's; {', '.join(TOOL_PARSERS)}"
REASONING_HELP = f"the form of the model's reasoning, auto: its chat template's; {', '.join(REASONING_PARSERS)}"


@dataclass(frozen=True)
class Parsers:
    """The forms of tool calls and of reasoning."""

    tools: ToolParserName = "auto"
    reasoning: ReasoningParserName = "auto"


AUTO = Parsers()


def parsers(tools: str, reasoning: str) -> Parsers:
    """The values of the two flags. Raises UserError."""
    tool = next((each for each in TOOL_PARSERS if each == tools), None)
    reason = next((each for each in REASONING_PARSERS if each == reasoning), None)
    if tool is None:
        raise UserError(f"tool-call-parser is one of {', '.join(TOOL_PARSERS)}, not {tools!r}")
    if reason is None:
        raise UserError(f"reasoning-parser is one of {', '.join(REASONING_PARSERS)}, not {reasoning!r}")
    return Parsers(tool, reason)

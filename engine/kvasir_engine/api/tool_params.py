"""The tools of a request: what is wrong with them, and how the model may use them. Pure."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from kvasir_engine.api.errors import bad_request, unsupported
from kvasir_engine.api.ranges import few, short
from kvasir_engine.api.schemas import ChatRequest, FunctionDefinition, NamedToolChoice
from kvasir_engine.api.tools.schema_check import count_of, fault_of_schema

MOST_TOOLS = 128
MOST_DESCRIPTION = 16_384
MOST_PARAMETERS = 65_536
MOST_TOOL_CHARACTERS = 1 << 20
MOST_NODES = 4096
"""Objects and arrays in all schemas of a request: checking one takes a fraction of a millisecond."""
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")

Choice = Literal["none", "auto", "required", "named"]


@dataclass(frozen=True)
class FunctionTool:
    """A function that the model may call; `parameters` is a JSON schema, `strict` whether it has to be kept to."""

    name: str
    description: str | None
    parameters: dict[str, Any] | None
    strict: bool

    def described(self) -> dict[str, Any]:
        """As chat templates take it."""
        function: dict[str, Any] = {"name": self.name}
        if self.description is not None:
            function["description"] = self.description
        function["parameters"] = self.schema
        return {"type": "function", "function": function}

    @property
    def schema(self) -> dict[str, Any]:
        """Of the arguments: a function without parameters has none."""
        return {"type": "object", "properties": {}} if self.parameters is None else self.parameters


@dataclass(frozen=True)
class ToolUse:
    """The tools of one request. `callable` are those that may be called, one alone where it is named."""

    tools: tuple[FunctionTool, ...]
    choice: Choice
    callable: tuple[FunctionTool, ...]
    parallel: bool

    @property
    def forced(self) -> bool:
        """Whether there has to be a call."""
        return self.choice in ("required", "named")

    @property
    def strict(self) -> bool:
        """Whether a tool's calls have to keep to its schema."""
        return any(tool.strict for tool in self.callable)


def tool_use(request: ChatRequest) -> ToolUse | None:
    """The tools that the model is told of; None if there are none, or none may be called. Raises ApiError.

    With a `tool_choice` of none the model is not told of any: it could call them.
    """
    choice, name = _choice(request.tool_choice)
    if not request.tools:
        for field, neutral in (("tool_choice", choice in ("auto", "none")), ("parallel_tool_calls", True)):
            if not neutral or (field == "parallel_tool_calls" and request.parallel_tool_calls is False):
                raise bad_request(
                    f"Invalid value for '{field}': '{field}' is only allowed when 'tools' are specified.", field
                )
        return None
    few("tools", len(request.tools), MOST_TOOLS)
    tools: list[FunctionTool] = []
    size = 0
    nodes = sum(
        count_of(each.function.parameters) for each in request.tools if each.function and each.function.parameters
    )
    if nodes > MOST_NODES:
        raise bad_request(
            f"Invalid 'tools': their schemas have more than {MOST_NODES} objects and arrays.", "tools"
        )
    for place, tool in enumerate(request.tools):
        at = f"tools[{place}]"
        if tool.type != "function":
            raise unsupported(f"{at}.type", f"Unsupported value: '{at}.type' does not support {tool.type[:100]!r}.")
        if tool.function is None or tool.custom is not None:
            field = f"{at}.function" if tool.function is None else f"{at}.custom"
            what = "Missing required" if tool.function is None else "Unknown"
            code = "missing_required_parameter" if tool.function is None else "unknown_parameter"
            raise bad_request(f"{what} parameter: '{field}'.", field, code)
        size += _check(tool.function, f"{at}.function", [each.name for each in tools])
        tools.append(
            FunctionTool(
                tool.function.name, tool.function.description, tool.function.parameters, bool(tool.function.strict)
            )
        )
    if size > MOST_TOOL_CHARACTERS:
        raise bad_request(f"Invalid 'tools': they have more than {MOST_TOOL_CHARACTERS} characters.", "tools")
    callable = tuple(tool for tool in tools if choice != "named" or tool.name == name)
    if not callable:
        raise bad_request(
            f"Invalid value for 'tool_choice': the function {name!r} is none of the 'tools'.", "tool_choice"
        )
    if choice == "none":
        return None
    return ToolUse(tuple(tools), choice, callable, request.parallel_tool_calls is not False)


def _choice(asked: str | NamedToolChoice | None) -> tuple[Choice, str]:
    if asked is None:
        return "auto", ""
    if isinstance(asked, str):
        for known in ("none", "auto", "required"):
            if asked == known:
                return known, ""
        raise bad_request(
            f"Invalid value for 'tool_choice': {asked[:100]!r} is not 'none', 'auto', 'required' or a function.",
            "tool_choice",
        )
    if asked.type != "function":
        at = "tool_choice.type"
        raise unsupported(at, f"Unsupported value: '{at}' does not support {asked.type[:100]!r}.")
    if asked.custom is not None or asked.allowed_tools is not None:
        field = "tool_choice.custom" if asked.custom is not None else "tool_choice.allowed_tools"
        raise bad_request(f"Unknown parameter: '{field}'.", field, "unknown_parameter")
    if asked.function is None:
        field = "tool_choice.function"
        raise bad_request(f"Missing required parameter: '{field}'.", field, "missing_required_parameter")
    short("tool_choice.function.name", asked.function.name, 64)
    return "named", asked.function.name


def _check(function: FunctionDefinition, at: str, before: Sequence[str]) -> int:
    """Refuse a function that cannot be offered. Its size in characters."""
    if not _NAME.fullmatch(function.name):
        shown = function.name if len(function.name) <= 80 else function.name[:80] + "..."
        raise bad_request(
            f"Invalid '{at}.name': {shown!r} has to be 1 to 64 letters, digits, '_' or '-'.", f"{at}.name"
        )
    if function.name in before:
        raise bad_request(f"Invalid '{at}.name': there are two tools of the name {function.name!r}.", f"{at}.name")
    short(f"{at}.description", function.description, MOST_DESCRIPTION)
    size = len(function.name) + len(function.description or "")
    if function.parameters is None:
        return size
    field = f"{at}.parameters"
    text = json.dumps(function.parameters, ensure_ascii=False)
    if len(text) > MOST_PARAMETERS:
        raise bad_request(f"Invalid '{field}': the schema has more than {MOST_PARAMETERS} characters.", field)
    fault = fault_of_schema(text)
    if fault is not None:
        raise bad_request(
            f"Invalid schema for function {function.name!r}: {fault}.", field, "invalid_function_parameters"
        )
    return size + len(text)

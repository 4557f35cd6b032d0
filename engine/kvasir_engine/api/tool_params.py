"""Checks the tools of a request, and how the model may use them. Pure."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from kvasir_engine.api.errors import bad_request, unsupported
from kvasir_engine.api.ranges import few, short
from kvasir_engine.api.schemas import AllowedTools, ChatRequest, FunctionDefinition, NamedToolChoice
from kvasir_engine.api.tools.schema_check import count_of, fault_of_schema

MOST_TOOLS = 128
MOST_DESCRIPTION = 16_384
MOST_PARAMETERS = 65_536
MOST_TOOL_CHARACTERS = 1 << 20
MOST_NODES = 4096
"""Most objects and arrays in all schemas of a request: checking one takes a fraction of a millisecond."""
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")

Choice = Literal["none", "auto", "required", "named"]


@dataclass(frozen=True)
class FunctionTool:
    """A function that the model may call; `parameters` is a JSON schema, `strict` whether it is enforced."""

    name: str
    description: str | None
    parameters: dict[str, Any] | None
    strict: bool

    def described(self) -> dict[str, Any]:
        """The tool in the form of chat templates."""
        function: dict[str, Any] = {"name": self.name}
        if self.description is not None:
            function["description"] = self.description
        function["parameters"] = self.schema
        return {"type": "function", "function": function}

    @property
    def schema(self) -> dict[str, Any]:
        """The schema of the arguments; a function without parameters takes none."""
        return {"type": "object", "properties": {}} if self.parameters is None else self.parameters


@dataclass(frozen=True)
class ToolUse:
    """The tools of one request. `callable` are those that may be called: one if it is named, several if only these
    are allowed.
    """

    tools: tuple[FunctionTool, ...]
    choice: Choice
    callable: tuple[FunctionTool, ...]
    parallel: bool

    @property
    def forced(self) -> bool:
        """Whether a call is required."""
        return self.choice in ("required", "named")

    @property
    def strict(self) -> bool:
        """Whether the beginning of a call must become a call: a tool is strict, or not all may be called."""
        return len(self.callable) < len(self.tools) or any(tool.strict for tool in self.callable)


def tool_use(request: ChatRequest) -> ToolUse | None:
    """The tools that the template shows; None if there are none, or none may be called. Raises ApiError.

    A `tool_choice` of none shows no tools: the model could call them.
    """
    choice, allowed = _choice(request.tool_choice)
    if not request.tools:
        unchosen = choice in ("auto", "none") and allowed is None
        for field, neutral in (("tool_choice", unchosen), ("parallel_tool_calls", True)):
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
    for name in allowed or ():
        if name not in (tool.name for tool in tools):
            raise bad_request(
                f"Invalid value for 'tool_choice': the function {name!r} is none of the 'tools'.", "tool_choice"
            )
    callable = tuple(tool for tool in tools if allowed is None or tool.name in allowed)
    if choice == "none":
        return None
    return ToolUse(tuple(tools), choice, callable, request.parallel_tool_calls is not False)


def _choice(choice: str | NamedToolChoice | None) -> tuple[Choice, Sequence[str] | None]:
    """The kind of choice, and the names of the callable functions; None: all."""
    if choice is None:
        return "auto", None
    if isinstance(choice, str):
        for known in ("none", "auto", "required"):
            if choice == known:
                return known, None
        raise bad_request(
            f"Invalid value for 'tool_choice': {choice[:100]!r} is not 'none', 'auto', 'required' or a function.",
            "tool_choice",
        )
    if choice.type not in ("function", "allowed_tools"):
        at = "tool_choice.type"
        raise unsupported(at, f"Unsupported value: '{at}' does not support {choice.type[:100]!r}.")
    for name, value in (
        ("function", choice.function),
        ("custom", choice.custom),
        ("allowed_tools", choice.allowed_tools),
    ):
        field = f"tool_choice.{name}"
        if value is None and name == choice.type:
            raise bad_request(f"Missing required parameter: '{field}'.", field, "missing_required_parameter")
        if value is not None and name != choice.type:
            raise bad_request(f"Unknown parameter: '{field}'.", field, "unknown_parameter")
    if choice.allowed_tools is not None:
        return _allowed(choice.allowed_tools)
    assert choice.function is not None
    short("tool_choice.function.name", choice.function.name, 64)
    return "named", (choice.function.name,)


def _allowed(choice: AllowedTools) -> tuple[Choice, Sequence[str]]:
    at = "tool_choice.allowed_tools"
    if choice.mode not in ("auto", "required"):
        message = f"Invalid value for '{at}.mode': {choice.mode[:100]!r} is not 'auto' or 'required'."
        raise bad_request(message, f"{at}.mode")
    if not choice.tools:
        raise bad_request(f"Invalid '{at}.tools': it cannot be empty.", f"{at}.tools")
    few(f"{at}.tools", len(choice.tools), MOST_TOOLS)
    names = []
    for place, tool in enumerate(choice.tools):
        field = f"{at}.tools[{place}]"
        if tool.type != "function" or tool.custom is not None:
            raise unsupported(
                f"{field}.type", f"Unsupported value: '{field}.type' does not support {tool.type[:100]!r}."
            )
        if tool.function is None:
            field = f"{field}.function"
            raise bad_request(f"Missing required parameter: '{field}'.", field, "missing_required_parameter")
        short(f"{field}.function.name", tool.function.name, 64)
        names.append(tool.function.name)
    return ("auto" if choice.mode == "auto" else "required"), names


def _check(function: FunctionDefinition, at: str, before: Sequence[str]) -> int:
    """Refuse a bad function. Returns its size in characters."""
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

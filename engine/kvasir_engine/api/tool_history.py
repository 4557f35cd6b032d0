"""Checks the tool calls and results in a conversation, and converts them for chat templates. Pure."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from kvasir_engine.api.errors import bad_request
from kvasir_engine.api.ranges import few, short
from kvasir_engine.api.schemas import ChatMessage, MessageToolCall
from kvasir_engine.api.tools.json_scanner import writable
from kvasir_engine.api.tools.schema_check import MOST_NESTED, depth_of

MOST_CALLS = 128
MOST_ID = 256
MOST_NAME = 256


class ToolHistory:
    """Reads messages in order, and knows which calls still need a result."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}  # of the functions called, by the call's id

    def more(self, message: ChatMessage, at: str) -> dict[str, Any]:
        """A message's fields other than role and content. Raises ApiError."""
        if message.tool_calls and message.role != "assistant":
            field = f"{at}.tool_calls"
            raise bad_request(f"Invalid '{field}': only assistants' messages have any.", field)
        if message.role == "tool":
            return self._answer(message, at)
        if message.tool_call_id is not None:
            field = f"{at}.tool_call_id"
            raise bad_request(f"Invalid '{field}': only tools' messages have one.", field)
        if not message.tool_calls:
            return {}
        few(f"{at}.tool_calls", len(message.tool_calls), MOST_CALLS)
        ids = [call.id for call in message.tool_calls]
        for place, id in enumerate(ids):
            if id in ids[:place]:
                field = f"{at}.tool_calls[{place}].id"
                raise bad_request(f"Invalid '{field}': there are two calls of the id {id[:MOST_ID]!r}.", field)
        return {
            "tool_calls": [self._call(call, f"{at}.tool_calls[{n}]") for n, call in enumerate(message.tool_calls)]
        }

    def _call(self, call: MessageToolCall, at: str) -> dict[str, Any]:
        if call.type != "function":
            raise bad_request(f"Invalid value for '{at}.type': expected 'function'.", f"{at}.type")
        for field, text, most in (("id", call.id, MOST_ID), ("function.name", call.function.name, MOST_NAME)):
            short(f"{at}.{field}", text, most)
            if not text:
                raise bad_request(f"Invalid '{at}.{field}': it cannot be empty.", f"{at}.{field}", "empty_string")
        field = f"{at}.function.arguments"
        try:
            arguments = json.loads(call.function.arguments or "{}", parse_constant=_no_constant)
        except (ValueError, RecursionError):
            raise bad_request(f"Invalid '{field}': it is not JSON.", field) from None
        if not isinstance(arguments, dict):
            raise bad_request(f"Invalid '{field}': it is JSON, but no object.", field)
        if depth_of(arguments) > MOST_NESTED:
            raise bad_request(f"Invalid '{field}': it is nested more than {MOST_NESTED} deep.", field)
        if not writable(json.dumps(arguments, ensure_ascii=False)):
            raise bad_request(f"Invalid '{field}': it has a half of a surrogate pair.", field)
        self._names[call.id] = call.function.name
        return {
            "id": call.id,
            "type": "function",
            "function": {"name": call.function.name, "arguments": arguments},
        }

    def _answer(self, message: ChatMessage, at: str) -> dict[str, Any]:
        field = f"{at}.tool_call_id"
        if message.tool_call_id is None:
            raise bad_request(f"Missing required parameter: '{field}'.", field, "missing_required_parameter")
        name = self._names.get(message.tool_call_id)
        if name is None:
            raise bad_request(
                f"Invalid '{field}': messages with role 'tool' must be a response to a preceding message with "
                "'tool_calls', one of which has this id.",
                field,
            )
        if message.name is not None and message.name != name:
            field = f"{at}.name"
            raise bad_request(f"Invalid '{field}': the call was of the function {name!r}.", field)
        return {"tool_call_id": message.tool_call_id, "name": name}


def _no_constant(name: str) -> Any:
    raise ValueError(name)


def arguments_as_text(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]] | None:
    """The messages with their calls' arguments as JSON; None if there are no calls."""
    if not any(message.get("tool_calls") for message in messages):
        return None
    return [
        {**message, "tool_calls": [_as_text(call) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else dict(message)
        for message in messages
    ]


def _as_text(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"]
    written = json.dumps(function["arguments"], ensure_ascii=False)
    return {**call, "function": {**function, "arguments": written}}

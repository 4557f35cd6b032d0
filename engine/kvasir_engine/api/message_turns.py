"""Converts the turns of Anthropic's Messages API to chat messages; consecutive ones of a role are joined. Pure."""

import json
from collections.abc import Sequence

from kvasir_engine.api.errors import bad_request, missing, unsupported
from kvasir_engine.api.message_schemas import CacheControl, ContentBlock, ConversationRequest, TextBlock
from kvasir_engine.api.params import only
from kvasir_engine.api.turns import Turns

ERROR = "Error: "
"""The prefix of a failed tool's result: chat templates have no other way to say so."""


def check_cache(control: CacheControl | None, at: str) -> None:
    """Raises ApiError."""
    if control is not None:
        only(f"{at}.type", control.type, "ephemeral")
        only(f"{at}.ttl", control.ttl, "5m", "1h")


def turns_of(body: ConversationRequest) -> Turns:
    """The whole conversation with alternating roles, as templates require. Raises ApiError."""
    if not body.messages:
        raise bad_request("messages: at least one message is required", "messages", "empty_array")
    turns = Turns("messages")
    if body.system is not None:
        turns.begin("system", "system").texts.append(_text(body.system, "system"))
    for place, message in enumerate(body.messages):
        at, role = f"messages[{place}]", message.role
        if role not in ("user", "assistant"):
            raise unsupported(f"{at}.role", f"Unsupported value: '{at}.role' does not support '{role[:100]}'.")
        if isinstance(message.content, str):
            turns.of(role, at).texts.append(message.content)
            continue
        for number, block in enumerate(message.content):
            _read(turns, role, block, f"{at}.content[{number}]")
        if not message.content:
            turns.of(role, at).texts.append("")
    last = turns.last
    if last is not None and last.calls:
        at = f"messages[{len(body.messages) - 1}]"
        raise bad_request(f"Invalid '{at}': the last message has a tool_use without a tool_result.", at)
    return turns


def _read(turns: Turns, role: str, block: ContentBlock, at: str) -> None:
    match role, block.type:
        case _, "text":
            turns.of(role, at).texts.append(_text_of(block, at))
        case "assistant", "thinking":
            if block.thinking is None:
                raise missing(f"{at}.thinking")
            turns.of(role, at).thoughts.append(block.thinking)
        case "assistant", "tool_use":
            check_cache(block.cache_control, f"{at}.cache_control")
            _call(turns, block, at)
        case "user", "tool_result":
            check_cache(block.cache_control, f"{at}.cache_control")
            _result(turns, block, at)
        case _, kind:
            message = f"Unsupported '{at}' of type '{kind[:100]}' in a message of the {role}'s."
            raise unsupported(at, message)


def _call(turns: Turns, block: ContentBlock, at: str) -> None:
    if block.id is None:
        raise missing(f"{at}.id")
    if block.name is None:
        raise missing(f"{at}.name")
    if block.input is None:
        raise missing(f"{at}.input")
    try:
        arguments = json.dumps(block.input, ensure_ascii=False)
    except RecursionError:
        raise bad_request(f"Invalid '{at}.input': it is nested too deeply.", f"{at}.input") from None
    call = turns.call(at, block.id, block.name, arguments)
    turns.names[f"{call}.function.arguments"] = f"{at}.input"


def _result(turns: Turns, block: ContentBlock, at: str) -> None:
    if block.tool_use_id is None:
        raise missing(f"{at}.tool_use_id")
    text = _text(block.content or "", f"{at}.content")
    message = turns.result(at, block.tool_use_id, ERROR + text if block.is_error else text)
    turns.names[f"{message}.tool_call_id"] = f"{at}.tool_use_id"


def _text(content: str | Sequence[TextBlock], at: str) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(_text_of(block, f"{at}[{place}]") for place, block in enumerate(content))


def _text_of(block: TextBlock, at: str) -> str:
    if block.type != "text" or block.text is None:
        raise unsupported(at, f"Unsupported '{at}' of type '{block.type[:100]}': only text is supported.")
    only(f"{at}.citations", block.citations, [])
    check_cache(block.cache_control, f"{at}.cache_control")
    return block.text

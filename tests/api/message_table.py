"""The tables of Anthropic's API in docs/api.md: fields and blocks of its clients, and vLLM's fields."""

import re
import typing
from typing import Any

from anthropic.types import ToolUnionParam, message_count_tokens_params, message_create_params
from anthropic.types.beta import (
    BetaContentBlockParam,
    BetaToolUnionParam,
)
from anthropic.types.beta import message_count_tokens_params as beta_count_tokens_params
from anthropic.types.beta import message_create_params as beta_create_params
from field_table import DOCS
from pydantic import BaseModel

ENDPOINTS = ("messages", "count_tokens")
PATHS = {"messages": "/v1/messages", "count_tokens": "/v1/messages/count_tokens"}
ROLES = ("user", "assistant")
HELLO = [{"role": "user", "content": "a"}]
BASES: dict[str, dict[str, Any]] = {
    "messages": {"model": "tiny", "messages": HELLO, "max_tokens": 10},
    "count_tokens": {"model": "tiny", "messages": HELLO},
}
# Of older clients, which the newest no longer names; `betas` is a header on the wire.
_OLDER = {"temperature", "top_k", "top_p", "stream"}
_HEADERS = {"betas"}
VLLM = {"priority", "seed", "min_p", "repetition_penalty", "cache_salt", "chat_template_kwargs"}
ANTHROPIC: dict[str, set[str]] = {
    "messages": {
        *message_create_params.MessageCreateParamsBase.__annotations__,
        *beta_create_params.MessageCreateParamsBase.__annotations__,
        *_OLDER,
    }
    - _HEADERS,
    "count_tokens": {
        *message_count_tokens_params.MessageCountTokensParams.__annotations__,
        *beta_count_tokens_params.MessageCountTokensParams.__annotations__,
    }
    - _HEADERS,
}
TOOLS = [{"name": "f", "input_schema": {"type": "object"}}]
VALUES: dict[str, Any] = {
    "cache_control": {"type": "ephemeral"},
    "cache_salt": "s",
    "chat_template_kwargs": {},
    "max_tokens": 5,
    "messages": HELLO,
    "metadata": {"user_id": "u"},
    "min_p": 0.1,
    "model": "tiny",
    "output_config": {"effort": "none"},
    "priority": 1,
    "repetition_penalty": 1.1,
    "seed": 1,
    "stop_sequences": ["x"],
    "stream": True,
    "system": "s",
    "temperature": 0.5,
    "thinking": {"type": "disabled"},
    "tool_choice": {"type": "any"},
    "tools": TOOLS,
    "top_k": 5,
    "top_p": 0.5,
}
BESIDE: dict[str, dict[str, Any]] = {"tool_choice": {"tools": TOOLS}}
USE = {"type": "tool_use", "id": "call", "name": "f", "input": {}}
RESULT = {"type": "tool_result", "tool_use_id": "call", "content": "r"}
BLOCKS: dict[str, dict[str, Any]] = {
    "text": {"text": "t"},
    "thinking": {"thinking": "t", "signature": ""},
    "tool_use": USE,
    "tool_result": RESULT,
}


def types_of(union: Any) -> set[str]:
    """The values of `type` that the members of a union have."""
    if isinstance(union, type) and issubclass(union, BaseModel):
        return _words(union.model_fields["type"].annotation)
    if isinstance(union, type):
        return _words(typing.get_type_hints(union).get("type"))
    return set().union(*(types_of(each) for each in typing.get_args(union)))


def _words(kind: Any) -> set[str]:
    inner = typing.get_args(kind)
    return set().union(*({each} if isinstance(each, str) else _words(each) for each in inner))


BLOCK_TYPES = types_of(BetaContentBlockParam)
TOOL_TYPES = types_of(ToolUnionParam) | types_of(BetaToolUnionParam)


def table(head: str) -> dict[str, tuple[str, str]]:
    """The two cells of each row of the table that begins with `head`."""
    _, _, rest = DOCS.read_text().partition(f"{head}\n")
    found: dict[str, tuple[str, str]] = {}
    for line in rest.splitlines()[1:]:
        match = re.fullmatch(r"\| `(\w+)` \| ([^|]+) \| ([^|]+) \|", line)
        if match is None:
            break
        found[match[1]] = match[2], match[3]
    return found


def fields_of(endpoint: str) -> set[str]:
    return ANTHROPIC[endpoint] | (VLLM if endpoint == "messages" else set())


def conversation_of(role: str, block: str) -> list[dict[str, Any]]:
    """A conversation in which a message of the role has such a block."""
    content = [{"type": block} | BLOCKS.get(block, {})]
    if block == "tool_result" and role == "user":
        return [*HELLO, {"role": "assistant", "content": [USE]}, {"role": role, "content": content}]
    if block == "tool_use" and role == "assistant":
        return [*HELLO, {"role": role, "content": content}, {"role": "user", "content": [RESULT]}]
    return [*HELLO, {"role": role, "content": content}, *HELLO]

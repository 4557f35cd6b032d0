"""An answer in the form of Anthropic's Messages API. Pure."""

import json
from collections.abc import Sequence

import msgspec
from pydantic_core import from_json

from kvasir_engine.api.answer import Answer
from kvasir_engine.api.answer_parts import Part, PartClosed, ReasoningPart, ToolCallPart, parts_of
from kvasir_engine.api.detokenizer import Piece
from kvasir_engine.api.message_schemas import (
    AnsweredBlock,
    MessageUsage,
    ModelMessage,
    ShownBlock,
    ThinkingBlock,
    ToolUseBlock,
)

INVALID = "INVALID_JSON"
"""Anthropic's documentation of tool streaming wraps malformed arguments in an object with this key."""


def usage(answer: Answer) -> MessageUsage:
    cached = answer.counter.cached_tokens
    return MessageUsage(answer.prompt_tokens - cached, answer.counter.completion_tokens, cached)


def stop_reason(last: Piece, called: bool) -> str:
    """Why the answer ended; `called`: it has a call."""
    if last.stop is not None:
        return "stop_sequence"
    if last.finish_reason == "length":
        return "max_tokens"
    return "tool_use" if called else "end_turn"


def any_called(parts: Sequence[PartClosed]) -> bool:
    """Whether the answer has a tool call."""
    return any(isinstance(each.part, ToolCallPart) for each in parts)


def block_of(part: Part, cut: bool = False) -> AnsweredBlock:
    """The content block of a part; `cut`: a call's arguments are incomplete."""
    if isinstance(part, ToolCallPart):
        id = "toolu_" + part.id.removeprefix("call_")
        return ToolUseBlock(id, part.name, _input(part.text, cut))
    return ThinkingBlock(part.text) if isinstance(part, ReasoningPart) else ShownBlock(part.text)


def _input(arguments: str, cut: bool) -> dict[str, msgspec.Raw]:
    try:
        if cut:  # as the official client reads the same deltas
            arguments = json.dumps(from_json(arguments or "{}", allow_partial=True, allow_inf_nan=False))
        return msgspec.json.decode(arguments or "{}", type=dict[str, msgspec.Raw])
    except (ValueError, RecursionError):
        return {INVALID: msgspec.Raw(msgspec.json.encode(arguments))}


def message(answer: Answer, pieces: Sequence[Piece]) -> ModelMessage:
    """The answer so far; it has no stop reason before its last piece."""
    last = pieces[-1] if pieces else None
    parts = parts_of(pieces)
    return ModelMessage(
        id=answer.id,
        model=answer.model,
        content=[block_of(each.part, each.cut) for each in parts],
        stop_reason=stop_reason(last, any_called(parts)) if last and last.finish_reason else None,
        stop_sequence=last.stop if last else None,
        usage=usage(answer),
    )

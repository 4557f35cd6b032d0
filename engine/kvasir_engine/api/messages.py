"""Anthropic's Messages API: from its body to a chat request, and from its answer to its own. Pure."""

import re
from collections.abc import Sequence

import msgspec

from kvasir_engine.api.answer import Answer
from kvasir_engine.api.detokenizer import Piece
from kvasir_engine.api.errors import bad_request, unsupported
from kvasir_engine.api.message_schemas import (
    ConversationRequest,
    MessagesRequest,
    MessageUsage,
    ModelMessage,
    ShownBlock,
    TextBlock,
    TurnMessage,
)
from kvasir_engine.api.params import only
from kvasir_engine.api.schemas import ChatMessage, ChatRequest

OLDEST = "2023-06-01"
"""The first version with named events. What is asked and answered here is in all that came after it."""
_VERSION = re.compile(r"20\d\d-\d\d-\d\d")
NAMES = {"stop": "stop_sequences", "user": "metadata.user_id"}


def check_version(version: str | None) -> None:
    """The `anthropic-version` header, where there is one. Raises ApiError."""
    if version is not None and not (_VERSION.fullmatch(version) and version >= OLDEST):
        raise bad_request(f"anthropic-version: {version[:40]!r} is not supported, only {OLDEST} and later.")


def conversation(body: ConversationRequest) -> ChatRequest:
    """The conversation alone. Raises ApiError for what cannot be honoured."""
    only("thinking", body.thinking and body.thinking.type, "disabled")
    only("tools", body.tools, [])
    only("tool_choice", body.tool_choice and body.tool_choice.type, "auto", "none")
    only("output_config", body.output_config, {})
    only("speed", body.speed, "standard")
    messages = _messages(body)
    return ChatRequest(model=body.model, messages=messages, continue_final_message=_continues(messages))


def chat_request(body: MessagesRequest) -> ChatRequest:
    """The conversation and its parameters. Raises ApiError for what cannot be honoured."""
    only("service_tier", body.service_tier, "auto", "standard_only")
    only("mcp_servers", body.mcp_servers, [])
    return msgspec.structs.replace(
        conversation(body),
        max_tokens=body.max_tokens,
        stop=body.stop_sequences,
        temperature=body.temperature,
        top_k=body.top_k,
        top_p=body.top_p,
        user=body.metadata.user_id if body.metadata else None,
        stream=body.stream,
        priority=body.priority,
        seed=body.seed,
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        cache_salt=body.cache_salt,
        chat_template_kwargs=body.chat_template_kwargs,
    )


def _continues(messages: Sequence[ChatMessage]) -> bool | None:
    """An assistant's message at the end is the beginning of the answer."""
    return True if messages[-1].role == "assistant" else None


def _messages(body: ConversationRequest) -> list[ChatMessage]:
    """Consecutive messages of one role are one, as at Anthropic: templates want roles in turns."""
    if not body.messages:
        raise bad_request("messages: at least one message is required", "messages", "empty_array")
    joined: list[ChatMessage] = []
    if body.system is not None:
        joined.append(ChatMessage("system", _text(body.system, "system")))
    for place, message in enumerate(body.messages):
        text = _text_of(message, f"messages[{place}]")
        if joined and joined[-1].role == message.role:
            text = f"{joined.pop().content}\n{text}"
        joined.append(ChatMessage(message.role, text))
    return joined


def _text_of(message: TurnMessage, at: str) -> str:
    if message.role not in ("user", "assistant"):
        shown = message.role[:100]
        raise unsupported(f"{at}.role", f"Unsupported value: '{at}.role' does not support '{shown}'.")
    return _text(message.content, f"{at}.content")


def _text(content: str | list[TextBlock], at: str) -> str:
    if isinstance(content, str):
        return content
    texts = []
    for place, block in enumerate(content):
        where = f"{at}[{place}]"
        if block.type != "text" or block.text is None:
            raise unsupported(where, f"Unsupported '{where}' of type '{block.type[:100]}': only text is supported.")
        only(f"{where}.citations", block.citations, [])
        if block.cache_control is not None:
            only(f"{where}.cache_control", block.cache_control.type, "ephemeral")
        texts.append(block.text)
    return "\n".join(texts)


def usage(answer: Answer) -> MessageUsage:
    cached = answer.tally.cached_tokens
    return MessageUsage(answer.prompt_tokens - cached, answer.tally.completion_tokens, cached)


def stop_reason(piece: Piece) -> str:
    if piece.stop is not None:
        return "stop_sequence"
    return "max_tokens" if piece.finish_reason == "length" else "end_turn"


def message(answer: Answer, pieces: Sequence[Piece]) -> ModelMessage:
    """The answer so far: without a stop reason until its last piece is there."""
    last = pieces[-1] if pieces else None
    text = "".join(piece.text for piece in pieces)
    return ModelMessage(
        id=answer.id,
        model=answer.model,
        content=[ShownBlock(text)] if text else [],
        stop_reason=stop_reason(last) if last and last.finish_reason else None,
        stop_sequence=last.stop if last else None,
        usage=usage(answer),
    )

"""The bodies of Anthropic's Messages API: what is asked, what is answered, and a stream's events."""

from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType


class CacheControl(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a client would have a cache end. All prompts are cached page by page, so it changes nothing."""

    type: str
    ttl: str | None = None


class TextBlock(msgspec.Struct, frozen=True, forbid_unknown_fields=False):
    """A block of a message; other types than `text` are refused by name, whatever else they hold."""

    type: str
    text: str | None = None
    cache_control: CacheControl | None = None
    citations: list[msgspec.Raw] | None = None


class TurnMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    role: str
    content: str | list[TextBlock]


class UserMetadata(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    user_id: str | None = None


class OfType(msgspec.Struct, frozen=True, forbid_unknown_fields=False):
    type: str


class ConversationRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a conversation is, to be answered or to be counted."""

    model: str
    messages: list[TurnMessage]
    system: str | list[TextBlock] | None = None
    cache_control: CacheControl | None = None
    # only with the value that changes nothing
    thinking: OfType | None = None
    tools: list[msgspec.Raw] | None = None
    tool_choice: OfType | None = None
    output_config: dict[str, msgspec.Raw] | None = None
    speed: str | None = None


class MessagesRequest(ConversationRequest, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Body of POST /v1/messages. `metadata` is a label."""

    max_tokens: int
    stop_sequences: list[str] | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    metadata: UserMetadata | None = None
    stream: bool | None = None
    service_tier: str | None = None
    container: None = None
    mcp_servers: list[msgspec.Raw] | None = None
    inference_geo: None = None
    # vLLM's names
    priority: int | None = None
    seed: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    cache_salt: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class CountTokensRequest(ConversationRequest, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Body of POST /v1/messages/count_tokens."""


class TokensCount(msgspec.Struct, frozen=True):
    input_tokens: int


class ShownBlock(msgspec.Struct, frozen=True, tag_field="type", tag="text"):
    text: str


class MessageUsage(msgspec.Struct, frozen=True):
    """`input_tokens` are those that came from no cache."""

    input_tokens: int
    output_tokens: int
    cache_read_input_tokens: int
    cache_creation_input_tokens: int = 0


class ModelMessage(msgspec.Struct, frozen=True, kw_only=True):
    """The answer; Anthropic calls it Message."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[ShownBlock]
    stop_reason: str | None
    stop_sequence: str | None
    usage: MessageUsage


class BlockDelta(msgspec.Struct, frozen=True, kw_only=True):
    """The next text of a block, or how the message ended."""

    type: str | UnsetType = UNSET
    text: str | UnsetType = UNSET
    stop_reason: str | UnsetType | None = UNSET
    stop_sequence: str | UnsetType | None = UNSET


class MessageEvent(msgspec.Struct, frozen=True, kw_only=True):
    """An event of a stream, of whatever type; Anthropic's types say which fields each has."""

    type: str
    message: ModelMessage | UnsetType = UNSET
    index: int | UnsetType = UNSET
    content_block: ShownBlock | UnsetType = UNSET
    delta: BlockDelta | UnsetType = UNSET
    usage: MessageUsage | UnsetType = UNSET

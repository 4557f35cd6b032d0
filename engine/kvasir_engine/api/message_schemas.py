"""The bodies of Anthropic's Messages API: what is asked, what is answered, and a stream's events."""

from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from kvasir_engine.api.schemas import Json, absent


class CacheControl(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a client would have a cache end. All prompts are cached page by page, so it changes nothing."""

    type: str
    ttl: str | None = None


class TextBlock(msgspec.Struct, frozen=True, forbid_unknown_fields=False):
    """A block of text; other types are refused by name, whatever else they hold."""

    type: str
    text: str | None = None
    cache_control: CacheControl | None = None
    citations: list[msgspec.Raw] | None = None


class ContentBlock(TextBlock, frozen=True, forbid_unknown_fields=False):
    """A block of a message: a text, an answer's `thinking`, its `tool_use`, or the `tool_result` of one."""

    thinking: str | None = None
    signature: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: str | list[TextBlock] | None = None
    is_error: bool | None = None


class TurnMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    role: str
    content: str | list[ContentBlock]


class UserMetadata(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    user_id: str | None = None


class ThinkingOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`budget_tokens` is a target, as at Anthropic: `max_tokens` alone is kept to."""

    type: str
    budget_tokens: int | None = None
    display: str | None = None


class InputTool(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A function; `input_schema` is a JSON schema of an object. From `cache_control` on: what changes nothing."""

    name: str
    type: str | None = None
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    strict: bool | None = None
    cache_control: CacheControl | None = None
    eager_input_streaming: bool | None = None
    defer_loading: bool | None = None
    allowed_callers: list[str] | None = None
    input_examples: list[dict[str, Any]] | None = None


class InputToolChoice(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    type: str
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class AnswerFormat(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    type: str
    schema: Json = msgspec.field(default_factory=absent)


class OutputConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    effort: str | None = None
    format: AnswerFormat | None = None


class ConversationRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What a conversation is, to be answered or to be counted."""

    model: str
    messages: list[TurnMessage]
    system: str | list[TextBlock] | None = None
    cache_control: CacheControl | None = None
    thinking: ThinkingOptions | None = None
    tools: list[InputTool] | None = None
    tool_choice: InputToolChoice | None = None
    output_config: OutputConfig | None = None
    # only with the value that changes nothing
    speed: str | None = None
    mcp_servers: list[msgspec.Raw] | None = None
    billing_policy: None = None
    compaction: None = None
    context_management: None = None
    user_profile_id: None = None
    workspace_id: None = None


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
    diagnostics: None = None
    fallback_credit_token: None = None
    fallbacks: None = None
    inference_geo: None = None
    thread: None = None
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


class ThinkingBlock(msgspec.Struct, frozen=True, tag_field="type", tag="thinking"):
    """What the model thought. Nothing is signed."""

    thinking: str
    signature: str = ""


class ToolUseBlock(msgspec.Struct, frozen=True, tag_field="type", tag="tool_use"):
    id: str
    name: str
    input: dict[str, msgspec.Raw]


AnsweredBlock = ShownBlock | ThinkingBlock | ToolUseBlock


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
    content: list[AnsweredBlock]
    stop_reason: str | None
    stop_sequence: str | None
    usage: MessageUsage


class BlockDelta(msgspec.Struct, frozen=True, kw_only=True):
    """The next text of a block, or how the message ended."""

    type: str | UnsetType = UNSET
    text: str | UnsetType = UNSET
    thinking: str | UnsetType = UNSET
    partial_json: str | UnsetType = UNSET
    stop_reason: str | UnsetType | None = UNSET
    stop_sequence: str | UnsetType | None = UNSET


class MessageEvent(msgspec.Struct, frozen=True, kw_only=True):
    """An event of a stream, of whatever type; Anthropic's types say which fields each has."""

    type: str
    message: ModelMessage | UnsetType = UNSET
    index: int | UnsetType = UNSET
    content_block: AnsweredBlock | UnsetType = UNSET
    delta: BlockDelta | UnsetType = UNSET
    usage: MessageUsage | UnsetType = UNSET

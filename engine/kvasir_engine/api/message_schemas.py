"""The bodies of Anthropic's Messages API: requests, answers and the events of a stream.

Docstrings of structs are descriptions in `/openapi.json`.
"""

from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from kvasir_engine.api.schemas import Json, absent


class CacheControl(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A mark for prompt caching. It has no effect: the server caches all prompts, page by page."""

    type: str
    ttl: str | None = None


class TextBlock(msgspec.Struct, frozen=True, forbid_unknown_fields=False):
    """A block of text. Blocks of other types are refused."""

    type: str
    text: str | None = None
    cache_control: CacheControl | None = None
    citations: list[msgspec.Raw] | None = None


class ContentBlock(TextBlock, frozen=True, forbid_unknown_fields=False):
    """A block of a message: `text`, or the `thinking` or `tool_use` of an earlier answer, or a `tool_result`."""

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
    """How the model thinks. `budget_tokens` is a target and not a limit, as at Anthropic; `max_tokens` is a
    limit."""

    type: str
    budget_tokens: int | None = None
    display: str | None = None


class InputTool(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A function that the model may call. `input_schema` is the JSON schema of its arguments, an object.
    `cache_control` has no effect; the fields after it accept only the values that change nothing."""

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
    """A conversation, to answer or to count."""

    model: str
    messages: list[TurnMessage]
    system: str | list[TextBlock] | None = None
    cache_control: CacheControl | None = None
    thinking: ThinkingOptions | None = None
    tools: list[InputTool] | None = None
    tool_choice: InputToolChoice | None = None
    output_config: OutputConfig | None = None
    # accepted only with the value that changes nothing
    speed: str | None = None
    mcp_servers: list[msgspec.Raw] | None = None
    billing_policy: None = None
    compaction: None = None
    context_management: None = None
    user_profile_id: None = None
    workspace_id: None = None


class MessagesRequest(ConversationRequest, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Body of POST /v1/messages. `metadata` is a label without effect."""

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
    """The model's reasoning. `signature` is always empty."""

    thinking: str
    signature: str = ""


class ToolUseBlock(msgspec.Struct, frozen=True, tag_field="type", tag="tool_use"):
    id: str
    name: str
    input: dict[str, msgspec.Raw]


AnsweredBlock = ShownBlock | ThinkingBlock | ToolUseBlock


class MessageUsage(msgspec.Struct, frozen=True):
    """The tokens of a request. `input_tokens` are those of the prompt that no cache had."""

    input_tokens: int
    output_tokens: int
    cache_read_input_tokens: int
    cache_creation_input_tokens: int = 0


class ModelMessage(msgspec.Struct, frozen=True, kw_only=True):
    """The answer, called Message at Anthropic."""

    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[AnsweredBlock]
    stop_reason: str | None
    stop_sequence: str | None
    usage: MessageUsage


class BlockDelta(msgspec.Struct, frozen=True, kw_only=True):
    """The next part of a block, or why the message ended."""

    type: str | UnsetType = UNSET
    text: str | UnsetType = UNSET
    thinking: str | UnsetType = UNSET
    partial_json: str | UnsetType = UNSET
    stop_reason: str | UnsetType | None = UNSET
    stop_sequence: str | UnsetType | None = UNSET


class MessageEvent(msgspec.Struct, frozen=True, kw_only=True):
    """An event of a stream. Its type decides which fields it has, as at Anthropic."""

    type: str
    message: ModelMessage | UnsetType = UNSET
    index: int | UnsetType = UNSET
    content_block: AnsweredBlock | UnsetType = UNSET
    delta: BlockDelta | UnsetType = UNSET
    usage: MessageUsage | UnsetType = UNSET

"""The bodies of OpenAI's Responses API: requests, answers and the events of a stream.

Docstrings of structs are descriptions in `/openapi.json`.
"""

from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from kvasir_engine.api.schemas import Json, absent


class InputText(msgspec.Struct, frozen=True, forbid_unknown_fields=False):
    """A part of an item: `input_text`, or the `output_text` or `reasoning_text` of an earlier answer."""

    type: str
    text: str | None = None


class InputItem(msgspec.Struct, frozen=True, forbid_unknown_fields=False):
    """An item of the conversation; its type decides which fields it has.

    Messages and reasoning have `content`; reasoning has `summary` and `encrypted_content`; tool calls and their
    results have `call_id`, `name`, `arguments` and `output`. `id` and `status`, which items of an answer have, are
    accepted.
    """

    type: str = "message"
    role: str | None = None
    content: str | list[InputText] | None = None
    summary: list[InputText] | None = None
    encrypted_content: str | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[InputText] | None = None


class FlatTool(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A function that the model may call. `parameters` is the JSON schema of its arguments, an object.
    `defer_loading` and `allowed_callers` accept only the values that change nothing."""

    type: str
    name: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    defer_loading: bool | None = None
    allowed_callers: list[str] | None = None


class FlatAllowedTool(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    type: str
    name: str | None = None


class FlatToolChoice(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A choice of tools: one function by `name`, or the allowed `tools` with a `mode`."""

    type: str
    name: str | None = None
    mode: str | None = None
    tools: list[FlatAllowedTool] | None = None


class TextFormat(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The format of the answer. `name`, `schema`, `description` and `strict` belong to the type json_schema."""

    type: str
    name: str | None = None
    schema: Json = msgspec.field(default_factory=absent)
    description: str | None = None
    strict: bool | None = None


class TextOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    format: TextFormat | None = None
    verbosity: str | None = None


class ReasoningOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    effort: str | None = None
    summary: str | None = None


class ResponseStreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    include_obfuscation: bool | None = None


class ResponsesRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Body of POST /v1/responses. The server stores no responses: `store` true, and fields that refer to a stored
    response, are refused."""

    model: str
    input: str | list[InputItem]
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    metadata: dict[str, str] | None = None
    truncation: str | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    include: list[str] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    # vLLM's names
    priority: int | None = None
    seed: int | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    cache_salt: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    tools: list[FlatTool] | None = None
    tool_choice: str | FlatToolChoice | None = None
    # accepted only with the value that changes nothing
    store: bool | None = None
    background: bool | None = None
    service_tier: str | None = None
    max_tool_calls: None = None
    previous_response_id: str | None = None
    conversation: str | dict[str, Any] | None = None
    prompt: dict[str, Any] | None = None


class TopTextLogprob(msgspec.Struct, frozen=True):
    token: str
    bytes: list[int]
    logprob: float


class TextLogprob(msgspec.Struct, frozen=True):
    token: str
    bytes: list[int]
    logprob: float
    top_logprobs: list[TopTextLogprob]


class OutputText(msgspec.Struct, frozen=True, tag_field="type", tag="output_text"):
    text: str
    annotations: list[str] = []
    logprobs: list[TextLogprob] = []


class OutputMessage(msgspec.Struct, frozen=True, tag_field="type", tag="message"):
    id: str
    content: list[OutputText]
    status: str
    role: str = "assistant"


class ReasoningText(msgspec.Struct, frozen=True, tag_field="type", tag="reasoning_text"):
    text: str


class OutputReasoning(msgspec.Struct, frozen=True, tag_field="type", tag="reasoning"):
    """The model's reasoning in full; `summary` is always empty."""

    id: str
    content: list[ReasoningText]
    status: str
    summary: list[ReasoningText] = []


class OutputCall(msgspec.Struct, frozen=True, tag_field="type", tag="function_call"):
    """A call of a function. `arguments` is a JSON object as a string, as the model wrote it."""

    id: str
    call_id: str
    name: str
    arguments: str
    status: str


OutputItem = OutputMessage | OutputReasoning | OutputCall
OutputPart = OutputText | ReasoningText


class InputTokensDetails(msgspec.Struct, frozen=True):
    cached_tokens: int
    cache_write_tokens: int = 0


class OutputTokensDetails(msgspec.Struct, frozen=True):
    reasoning_tokens: int = 0


class ResponseUsage(msgspec.Struct, frozen=True):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseError(msgspec.Struct, frozen=True):
    code: str
    message: str


class IncompleteDetails(msgspec.Struct, frozen=True):
    reason: str


class ShownFormat(msgspec.Struct, frozen=True):
    type: str = "text"
    name: str | UnsetType = UNSET
    schema: Json | UnsetType = UNSET
    description: str | UnsetType | None = UNSET
    strict: bool | UnsetType | None = UNSET


class ShownText(msgspec.Struct, frozen=True):
    format: ShownFormat = ShownFormat()
    verbosity: str = "medium"


class ShownReasoning(msgspec.Struct, frozen=True):
    effort: str | None = None
    summary: str | None = None


class ShownTool(msgspec.Struct, frozen=True):
    name: str
    description: str | None
    parameters: dict[str, Any] | None
    strict: bool | None
    type: Literal["function"] = "function"


class ModelResponse(msgspec.Struct, frozen=True, kw_only=True):
    """The answer, called Response at OpenAI."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None = None
    status: str
    background: bool = False
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    max_tool_calls: None = None
    model: str
    output: list[OutputItem] = []
    parallel_tool_calls: bool = True
    previous_response_id: None = None
    prompt_cache_key: str | None = None
    reasoning: ShownReasoning = ShownReasoning()
    safety_identifier: str | None = None
    service_tier: str = "default"
    store: bool = False
    temperature: float
    text: ShownText = ShownText()
    tool_choice: str | FlatToolChoice = "auto"
    tools: list[ShownTool] = []
    top_logprobs: int = 0
    top_p: float
    truncation: str = "disabled"
    usage: ResponseUsage | None = None
    user: str | None = None
    metadata: dict[str, str]


class ResponseEvent(msgspec.Struct, frozen=True, kw_only=True):
    """An event of a stream. Its type decides which fields it has, as at OpenAI."""

    type: str
    sequence_number: int
    response: ModelResponse | UnsetType = UNSET
    output_index: int | UnsetType = UNSET
    item: OutputItem | UnsetType = UNSET
    item_id: str | UnsetType = UNSET
    content_index: int | UnsetType = UNSET
    part: OutputPart | UnsetType = UNSET
    delta: str | UnsetType = UNSET
    text: str | UnsetType = UNSET
    arguments: str | UnsetType = UNSET
    logprobs: list[TextLogprob] | UnsetType = UNSET
    code: str | UnsetType | None = UNSET
    message: str | UnsetType = UNSET
    param: str | UnsetType | None = UNSET

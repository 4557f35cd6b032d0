"""The bodies of OpenAI's API. Docstrings of structs are descriptions in `/openapi.json`, so clients read them.

An unknown field is an error. `params.py` refuses values that the engine cannot honour.
"""

from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from kvasir_engine.api.errors import ErrorDetail

Json = msgspec.Raw
ABSENT = Json()
"""The value of a field of type Json that the request does not have."""


def absent() -> Json:
    """A default factory for fields of type Json: `ABSENT` is no valid JSON, so it cannot be a default in the
    schema."""
    return ABSENT


def given(value: object) -> bool:
    """Whether the request has a field. A field that is null counts as absent."""
    return bytes(value) not in (b"", b"null") if isinstance(value, msgspec.Raw) else value is not None


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class JsonSchemaFormat(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A JSON schema that the answer has to match, whether `strict` is set or not. `name` and `description` are
    labels without effect."""

    name: str
    schema: Json = msgspec.field(default_factory=absent)
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The format of the answer. `structures`, `triggers` and `format` describe a structural tag, as in vLLM and
    xgrammar."""

    type: str
    json_schema: JsonSchemaFormat | None = None
    structures: Json = msgspec.field(default_factory=absent)
    triggers: Json = msgspec.field(default_factory=absent)
    format: Json = msgspec.field(default_factory=absent)


class StructuredOutputs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Constraints on the answer, as in vLLM. `disable_fallback` has no effect: there is only one grammar
    library."""

    json: Json = msgspec.field(default_factory=absent)
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: Json = msgspec.field(default_factory=absent)
    disable_any_whitespace: bool | None = None
    disable_additional_properties: bool | None = None
    whitespace_pattern: str | None = None
    disable_fallback: bool | None = None


class CommonRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The fields that both endpoints have. A field that is null has its default, as at OpenAI.

    `user` is a label without effect, as at OpenAI. All other fields take effect.
    """

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    n: int | None = None
    # not OpenAI's; the names that vLLM and SGLang (`logprob_start_len`) use
    top_k: int | None = None
    min_p: float | None = None
    min_tokens: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    priority: int | None = None
    truncate_prompt_tokens: int | None = None
    return_token_ids: bool | None = None
    prompt_logprobs: int | None = None
    logprob_start_len: int | None = None
    cache_salt: str | None = None
    bad_words: list[str] | None = None
    allowed_token_ids: list[int] | None = None
    repetition_penalty: float | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Json = msgspec.field(default_factory=absent)
    guided_json_object: bool | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    guided_whitespace_pattern: str | None = None
    guided_decoding_backend: str | None = None
    # OpenAI's again
    response_format: ResponseFormat | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None

    user: str | None = None


class ContentPart(msgspec.Struct, frozen=True, forbid_unknown_fields=False):
    type: str
    text: str | None = None


class CalledFunction(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The function of a tool call. `arguments` is a JSON object as a string."""

    name: str
    arguments: str


class MessageToolCall(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A tool call in an assistant's message, as an earlier answer had it. `index`, which only streamed calls have,
    has no effect."""

    id: str
    function: CalledFunction
    type: str = "function"
    index: int | None = None


class ChatMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A message of the conversation.

    `refusal`, `audio`, `function_call` and `annotations` are accepted empty, as clients send an earlier answer
    back. `provider_specific_fields`, which litellm adds to answers, has no effect.
    """

    role: str
    content: str | list[ContentPart] | None = None
    name: str | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: list[Json] | None = None
    provider_specific_fields: dict[str, Json] | None = None
    tool_calls: list[MessageToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None


class FunctionDefinition(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A function that the model may call. `parameters` is the JSON schema of its arguments, an object."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    type: str
    function: FunctionDefinition | None = None
    custom: Any = None


class NamedFunction(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str


class AllowedTool(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    type: str
    function: NamedFunction | None = None
    custom: Any = None


class AllowedTools(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    mode: str
    tools: list[AllowedTool]


class NamedToolChoice(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    type: str
    function: NamedFunction | None = None
    custom: Any = None
    allowed_tools: AllowedTools | None = None


class ChatRequest(CommonRequest, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Body of POST /v1/chat/completions. `metadata`, `safety_identifier` and `prompt_cache_key` are labels
    without effect."""

    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    store: bool | None = None
    service_tier: str | None = None
    modalities: list[str] | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    parallel_tool_calls: bool | None = None
    tools: list[Tool] | None = None
    tool_choice: str | NamedToolChoice | None = None
    include_reasoning: bool | None = None
    functions: list[Json] | None = None
    function_call: str | dict[str, Json] | None = None
    audio: None = None
    prediction: None = None
    web_search_options: None = None


class CompletionRequest(CommonRequest, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Body of POST /v1/completions."""

    prompt: str | list[str | int | list[int]]
    logprobs: int | None = None

    best_of: int | None = None
    echo: bool | None = None
    suffix: str | None = None


class PromptTokensDetails(msgspec.Struct, frozen=True):
    cached_tokens: int


class CompletionTokensDetails(msgspec.Struct, frozen=True):
    reasoning_tokens: int


class Usage(msgspec.Struct, frozen=True):
    """The tokens of a request. `completion_tokens_details` is absent where the server does not separate a model's
    reasoning from its answer."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails | UnsetType = UNSET


class TopLogprob(msgspec.Struct, frozen=True):
    """One of the likeliest tokens. `bytes` is null for a token that adds no text."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatLogprob(msgspec.Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, frozen=True):
    content: list[ChatLogprob]
    refusal: None = None


class PromptLogprob(msgspec.Struct, frozen=True):
    """A token and its log-probability in the prompt. `rank` is 1 for the likeliest token."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]
"""An entry for each token of the prompt, null for the first: the token and then the likeliest ones, by token id."""


class AnsweredFunction(msgspec.Struct, frozen=True):
    name: str
    arguments: str


class AnsweredCall(msgspec.Struct, frozen=True):
    id: str
    function: AnsweredFunction
    type: str = "function"


class AssistantMessage(msgspec.Struct, frozen=True):
    content: str | None
    role: str = "assistant"
    refusal: None = None
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[AnsweredCall] | UnsetType = UNSET


class ChatChoice(msgspec.Struct, frozen=True):
    """One choice. If it failed and others did not, its finish reason is "error", and `error` says why."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: str
    error: ErrorDetail | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletion(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class FunctionDelta(msgspec.Struct, frozen=True):
    arguments: str
    name: str | UnsetType = UNSET


class CallDelta(msgspec.Struct, frozen=True):
    """The next part of a tool call. The first part has the call's `id`, its `type` and the function's name."""

    index: int
    function: FunctionDelta
    id: str | UnsetType = UNSET
    type: str | UnsetType = UNSET


class ChatDelta(msgspec.Struct, frozen=True):
    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[CallDelta] | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct, frozen=True):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    error: ErrorDetail | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET


class ChatChunk(msgspec.Struct, frozen=True, kw_only=True):
    """A chunk of a streamed answer. With `include_usage`, `usage` is null in all chunks but the last; else it is
    absent."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | UnsetType | None = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class CompletionLogprobs(msgspec.Struct, frozen=True):
    """Log-probabilities of a choice's tokens. For the first token of an echoed prompt they are null."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(msgspec.Struct, frozen=True):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    error: ErrorDetail | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: PromptLogprobs | UnsetType = UNSET


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """An answer, or a chunk of a streamed answer."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "kvasir"
    max_model_len: int | None = None


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class Version(msgspec.Struct, frozen=True):
    version: str


class TokenizeRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Body of POST /tokenize: a `prompt`, or `messages` with settings of the chat template.

    `add_special_tokens`: add the tokens that the model puts around every text. Default: true for `prompt`, false
    for `messages`.
    """

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class Tokenized(msgspec.Struct, frozen=True):
    count: int
    max_model_len: int | None
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Body of POST /detokenize."""

    model: str | None = None
    tokens: list[int]


class Detokenized(msgspec.Struct, frozen=True):
    prompt: str

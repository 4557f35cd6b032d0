"""Converts a body of OpenAI's Responses API to a chat request. Pure."""

from kvasir_engine.api.errors import bad_request, missing, unsupported
from kvasir_engine.api.params import only
from kvasir_engine.api.renaming import RenamedRequest
from kvasir_engine.api.response_items import turns_of
from kvasir_engine.api.response_schemas import FlatTool, FlatToolChoice, ResponsesRequest, TextFormat
from kvasir_engine.api.schemas import (
    AllowedTool,
    AllowedTools,
    ChatRequest,
    FunctionDefinition,
    JsonSchemaFormat,
    NamedFunction,
    NamedToolChoice,
    ResponseFormat,
    Tool,
    given,
)

_NAMES = {
    "max_completion_tokens": "max_output_tokens",
    "reasoning_effort": "reasoning.effort",
    "response_format": "text.format",
    "response_format.json_schema": "text.format",
    "tool_choice.function": "tool_choice",
    "tool_choice.allowed_tools": "tool_choice",
}
LOGPROBS = "message.output_text.logprobs"
_STATE = "this server keeps no responses: send the whole conversation as 'input'"


def chat_request(body: ResponsesRequest) -> RenamedRequest:
    """The conversation and its parameters. Raises ApiError for what cannot be honoured."""
    _refuse(body)
    include = body.include or []
    for place, each in enumerate(include):
        if each != LOGPROBS:
            raise unsupported(f"include[{place}]", f"Unsupported value: 'include' does not support '{each[:100]}'.")
    if body.top_logprobs and LOGPROBS not in include:
        raise bad_request(f"'top_logprobs' is only allowed when '{LOGPROBS}' is included.", "top_logprobs")
    scored = LOGPROBS in include
    turns = turns_of(body)
    tools = _tools(body.tools or [])
    request = ChatRequest(
        model=body.model,
        messages=turns.messages(),
        tools=tools or None,
        tool_choice=_choice(body.tool_choice),
        parallel_tool_calls=body.parallel_tool_calls,
        response_format=_format(body.text.format) if body.text and body.text.format else None,
        max_completion_tokens=body.max_output_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        logprobs=scored or None,
        top_logprobs=body.top_logprobs if scored else None,
        stream=body.stream,
        metadata=body.metadata,
        reasoning_effort=body.reasoning.effort if body.reasoning else None,
        user=body.user,
        safety_identifier=body.safety_identifier,
        prompt_cache_key=body.prompt_cache_key,
        priority=body.priority,
        seed=body.seed,
        top_k=body.top_k,
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        cache_salt=body.cache_salt,
        chat_template_kwargs=body.chat_template_kwargs,
    )
    flat = {f"tools[{place}].function": f"tools[{place}]" for place in range(len(tools))}
    return RenamedRequest(request, {**_NAMES, **turns.names, **flat})


def _refuse(body: ResponsesRequest) -> None:
    if body.store:
        raise unsupported("store", f"Unsupported value: 'store' true is not supported: {_STATE}.")
    for name in ("previous_response_id", "conversation", "prompt"):
        if getattr(body, name) is not None:
            raise unsupported(name, f"Unsupported parameter: '{name}': {_STATE}.")
    only("background", body.background, False)
    only("service_tier", body.service_tier, "auto", "default")
    only("truncation", body.truncation, "disabled")
    if body.text is not None:
        only("text.verbosity", body.text.verbosity, "medium")
    if body.reasoning is not None:
        only("reasoning.summary", body.reasoning.summary)
    if body.stream_options is not None:
        if not body.stream:
            raise bad_request(
                "The 'stream_options' parameter is only allowed when 'stream' is enabled.", "stream_options"
            )
        only("stream_options.include_obfuscation", body.stream_options.include_obfuscation, False)


def _tools(tools: list[FlatTool]) -> list[Tool]:
    chat = []
    for place, tool in enumerate(tools):
        at = f"tools[{place}]"
        if tool.type != "function":
            raise unsupported(f"{at}.type", f"Unsupported value: '{at}.type' does not support '{tool.type[:100]}'.")
        if tool.name is None:
            raise missing(f"{at}.name")
        only(f"{at}.defer_loading", tool.defer_loading, False)
        only(f"{at}.allowed_callers", tool.allowed_callers, ["direct"])
        function = FunctionDefinition(tool.name, tool.description, tool.parameters, tool.strict)
        chat.append(Tool("function", function))
    return chat


def _choice(choice: str | FlatToolChoice | None) -> str | NamedToolChoice | None:
    if not isinstance(choice, FlatToolChoice):
        return choice
    if choice.type not in ("function", "allowed_tools"):
        at = "tool_choice.type"
        raise unsupported(at, f"Unsupported value: '{at}' does not support '{choice.type[:100]}'.")
    allows = choice.type == "allowed_tools"
    for field, value, belongs in (
        ("name", choice.name, not allows),
        ("mode", choice.mode, allows),
        ("tools", choice.tools, allows),
    ):
        if value is None and belongs:
            raise missing(f"tool_choice.{field}")
        if value is not None and not belongs:
            field = f"tool_choice.{field}"
            raise bad_request(f"Unknown parameter: '{field}'.", field, "unknown_parameter")
    if not allows:
        return NamedToolChoice("function", NamedFunction(choice.name or ""))
    allowed = []
    for place, tool in enumerate(choice.tools or []):
        if tool.type == "function" and tool.name is None:
            raise missing(f"tool_choice.tools[{place}].name")
        allowed.append(AllowedTool(tool.type, NamedFunction(tool.name or "")))
    return NamedToolChoice("allowed_tools", allowed_tools=AllowedTools(choice.mode or "", allowed))


def _format(format: TextFormat) -> ResponseFormat:
    if format.type not in ("text", "json_object", "json_schema"):
        at = "text.format.type"
        raise unsupported(at, f"Unsupported value: '{at}' does not support '{format.type[:100]}'.")
    if format.type == "json_schema":
        if format.name is None:
            raise missing("text.format.name")
        schema = JsonSchemaFormat(format.name, format.schema, format.description, format.strict)
        return ResponseFormat("json_schema", schema)
    for field in ("name", "schema", "description", "strict"):
        if given(getattr(format, field)):
            at = f"text.format.{field}"
            raise bad_request(f"'{at}' is only allowed where the type is 'json_schema'.", at)
    return ResponseFormat(format.type)

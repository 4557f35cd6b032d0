"""Converts a body of Anthropic's Messages API to a chat request. Pure."""

import re

import msgspec

from kvasir_engine.api.errors import bad_request, missing, unsupported
from kvasir_engine.api.message_schemas import (
    ConversationRequest,
    InputTool,
    InputToolChoice,
    MessagesRequest,
    OutputConfig,
    ThinkingOptions,
)
from kvasir_engine.api.message_turns import check_cache, turns_of
from kvasir_engine.api.params import only
from kvasir_engine.api.ranges import within
from kvasir_engine.api.renaming import RenamedRequest
from kvasir_engine.api.schemas import (
    ChatRequest,
    FunctionDefinition,
    JsonSchemaFormat,
    NamedFunction,
    NamedToolChoice,
    ResponseFormat,
    Tool,
)
from kvasir_engine.api.tokenizer import ServedModel
from kvasir_engine.bounds import INT32

OLDEST = "2023-06-01"
"""The first version with named events. Later versions only add to what is served here."""
_VERSION = re.compile(r"20\d\d-\d\d-\d\d")
LEAST_BUDGET = 1024
_NAMES = {
    "stop": "stop_sequences",
    "user": "metadata.user_id",
    "reasoning_effort": "output_config.effort",
    "response_format": "output_config.format",
    "response_format.json_schema": "output_config.format",
    "parallel_tool_calls": "tool_choice.disable_parallel_tool_use",
    "tool_choice.function": "tool_choice",
}


def check_version(version: str | None) -> None:
    """Check the `anthropic-version` header, if there is one. Raises ApiError."""
    if version is not None and not (_VERSION.fullmatch(version) and version >= OLDEST):
        raise bad_request(f"anthropic-version: {version[:40]!r} is not supported, only {OLDEST} and later.")


def conversation(body: ConversationRequest, model: ServedModel) -> RenamedRequest:
    """The conversation without parameters. Raises ApiError for what cannot be honoured."""
    only("speed", body.speed, "standard")
    only("mcp_servers", body.mcp_servers, [])
    check_cache(body.cache_control, "cache_control")
    turns = turns_of(body)
    tools = [_tool(tool, f"tools[{place}]") for place, tool in enumerate(body.tools or [])]
    choice, parallel = _choice(body.tool_choice)
    config = body.output_config or OutputConfig()
    messages = turns.messages()
    request = ChatRequest(
        model=body.model,
        messages=messages,
        # an assistant's message at the end is the beginning of the answer
        continue_final_message=True if messages[-1].role == "assistant" else None,
        tools=tools or None,
        tool_choice=choice,
        parallel_tool_calls=parallel,
        response_format=_format(config),
        reasoning_effort=config.effort,
        include_reasoning=_thinking(body.thinking, model),
    )
    names = dict(_NAMES)
    for place in range(len(tools)):
        names[f"tools[{place}].function"] = f"tools[{place}]"
        names[f"tools[{place}].function.parameters"] = f"tools[{place}].input_schema"
    return RenamedRequest(_with_variable(request, body.thinking, model), {**names, **turns.names})


def chat_request(body: MessagesRequest, model: ServedModel) -> RenamedRequest:
    """The conversation and its parameters. Raises ApiError for what cannot be honoured."""
    only("service_tier", body.service_tier, "auto", "standard_only")
    request, names = conversation(body, model)
    if body.thinking is not None and body.thinking.budget_tokens is not None:
        within("thinking.budget_tokens", body.thinking.budget_tokens, LEAST_BUDGET, body.max_tokens - 1)
    variables = {**(request.chat_template_kwargs or {}), **(body.chat_template_kwargs or {})}
    request = msgspec.structs.replace(
        request,
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
        chat_template_kwargs=variables or None,
    )
    return RenamedRequest(request, names)


def _thinking(thinking: ThinkingOptions | None, model: ServedModel) -> bool:
    """Whether reasoning is shown."""
    if thinking is None:
        return False
    if thinking.type not in ("enabled", "disabled", "adaptive"):
        at = "thinking.type"
        raise unsupported(at, f"Unsupported value: '{at}' does not support '{thinking.type[:100]}'.")
    if thinking.type == "enabled":
        if thinking.budget_tokens is None:
            raise missing("thinking.budget_tokens")
        within("thinking.budget_tokens", thinking.budget_tokens, LEAST_BUDGET, INT32)
        if model.output.reasoning == "none":
            message = (
                "Unsupported value: 'thinking': the server cannot separate this model's reasoning from its answers."
            )
            raise unsupported("thinking", message)
    else:
        only("thinking.budget_tokens", thinking.budget_tokens)
    if thinking.type == "disabled":
        only("thinking.display", thinking.display)
    only("thinking.display", thinking.display, "summarized", "omitted")
    return thinking.type != "disabled" and thinking.display != "omitted"


def _with_variable(request: ChatRequest, thinking: ThinkingOptions | None, model: ServedModel) -> ChatRequest:
    """Set the chat template's variable for thinking, if it has one."""
    name = "enable_thinking"
    if thinking is None or thinking.type == "adaptive" or name not in model.tokenizer.template_variables:
        return request
    return msgspec.structs.replace(request, chat_template_kwargs={name: thinking.type == "enabled"})


def _tool(tool: InputTool, at: str) -> Tool:
    if tool.type not in (None, "custom"):
        raise unsupported(f"{at}.type", f"Unsupported value: '{at}.type' does not support '{tool.type[:100]}'.")
    if tool.input_schema is None:
        raise missing(f"{at}.input_schema")
    check_cache(tool.cache_control, f"{at}.cache_control")
    only(f"{at}.eager_input_streaming", tool.eager_input_streaming, True)
    only(f"{at}.defer_loading", tool.defer_loading, False)
    only(f"{at}.allowed_callers", tool.allowed_callers, ["direct"])
    only(f"{at}.input_examples", tool.input_examples, [])
    function = FunctionDefinition(tool.name, tool.description, tool.input_schema, tool.strict)
    return Tool("function", function)


def _choice(choice: InputToolChoice | None) -> tuple[str | NamedToolChoice | None, bool | None]:
    """The tool choice, and whether several calls are allowed."""
    if choice is None:
        return None, None
    parallel = False if choice.disable_parallel_tool_use else None
    if choice.type != "tool":
        only("tool_choice.name", choice.name)
    match choice.type:
        case "auto":
            return "auto", parallel
        case "any":
            return "required", parallel
        case "none":
            only("tool_choice.disable_parallel_tool_use", choice.disable_parallel_tool_use, False)
            return "none", None
        case "tool":
            if choice.name is None:
                raise missing("tool_choice.name")
            return NamedToolChoice("function", NamedFunction(choice.name)), parallel
    at = "tool_choice.type"
    raise unsupported(at, f"Unsupported value: '{at}' does not support '{choice.type[:100]}'.")


def _format(config: OutputConfig) -> ResponseFormat | None:
    if config.format is None:
        return None
    if config.format.type != "json_schema":
        at = "output_config.format.type"
        shown = config.format.type[:100]
        raise unsupported(at, f"Unsupported value: '{at}' does not support '{shown}'.")
    return ResponseFormat("json_schema", JsonSchemaFormat("answer", config.format.schema))

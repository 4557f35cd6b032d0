"""OpenAI's Responses API: from its body to a chat request, and from its answer to its own. Pure."""

import time
from collections.abc import Sequence

import msgspec

from kvasir_engine.api.answer import Answer
from kvasir_engine.api.detokenizer import Piece, ScoredToken
from kvasir_engine.api.errors import bad_request, unsupported
from kvasir_engine.api.params import only
from kvasir_engine.api.response_schemas import (
    IncompleteDetails,
    InputItem,
    InputTokensDetails,
    ModelResponse,
    OutputMessage,
    OutputText,
    OutputTokensDetails,
    ResponsesRequest,
    ResponseUsage,
    ShownReasoning,
    TextLogprob,
    TopTextLogprob,
)
from kvasir_engine.api.schemas import ChatMessage, ChatRequest

NAMES = {
    "max_completion_tokens": "max_output_tokens",
    "messages": "input",
    "reasoning_effort": "reasoning.effort",
}
LOGPROBS = "message.output_text.logprobs"
_ROLES = ("user", "assistant", "system", "developer")
_PARTS = ("input_text", "output_text", "text")
_STATE = "this server keeps no responses: send the whole conversation as 'input'"


def chat_request(body: ResponsesRequest) -> ChatRequest:
    """The conversation and its parameters. Raises ApiError for what cannot be honoured."""
    _refuse(body)
    include = body.include or []
    for place, each in enumerate(include):
        if each != LOGPROBS:
            raise unsupported(f"include[{place}]", f"Unsupported value: 'include' does not support '{each[:100]}'.")
    if body.top_logprobs and LOGPROBS not in include:
        raise bad_request(f"'top_logprobs' is only allowed when '{LOGPROBS}' is included.", "top_logprobs")
    scored = LOGPROBS in include
    return ChatRequest(
        model=body.model,
        messages=_messages(body),
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


def _refuse(body: ResponsesRequest) -> None:
    if body.store:
        raise unsupported("store", f"Unsupported value: 'store' true is not supported: {_STATE}.")
    for name in ("previous_response_id", "conversation", "prompt"):
        if getattr(body, name) is not None:
            raise unsupported(name, f"Unsupported parameter: '{name}': {_STATE}.")
    only("background", body.background, False)
    only("service_tier", body.service_tier, "auto", "default")
    only("parallel_tool_calls", body.parallel_tool_calls, True)
    only("tools", body.tools, [])
    only("tool_choice", body.tool_choice, "none", "auto")
    only("truncation", body.truncation, "disabled")
    if body.text is not None:
        only("text.format", body.text.format and body.text.format.type, "text")
        only("text.verbosity", body.text.verbosity, "medium")
    if body.reasoning is not None:
        only("reasoning.summary", body.reasoning.summary)
    if body.stream_options is not None:
        if not body.stream:
            raise bad_request(
                "The 'stream_options' parameter is only allowed when 'stream' is enabled.", "stream_options"
            )
        only("stream_options.include_obfuscation", body.stream_options.include_obfuscation, False)


def _messages(body: ResponsesRequest) -> list[ChatMessage]:
    messages = [] if body.instructions is None else [ChatMessage("system", body.instructions)]
    if isinstance(body.input, str):
        return [*messages, ChatMessage("user", body.input)]
    if not body.input:
        raise bad_request("Invalid 'input': empty array. Expected at least one item.", "input", "empty_array")
    return messages + [_message(item, f"input[{place}]") for place, item in enumerate(body.input)]


def _message(item: InputItem, at: str) -> ChatMessage:
    if item.type != "message":
        raise unsupported(f"{at}.type", f"Unsupported value: '{at}.type' does not support '{item.type[:100]}'.")
    if item.role is None:
        raise bad_request(f"Missing required parameter: '{at}.role'.", f"{at}.role", "missing_required_parameter")
    if item.role not in _ROLES:
        raise unsupported(f"{at}.role", f"Unsupported value: '{at}.role' does not support '{item.role[:100]}'.")
    if item.content is None:
        raise bad_request(
            f"Missing required parameter: '{at}.content'.", f"{at}.content", "missing_required_parameter"
        )
    if isinstance(item.content, str):
        return ChatMessage(item.role, item.content)
    texts = []
    for place, part in enumerate(item.content):
        if part.type not in _PARTS or part.text is None:
            where = f"{at}.content[{place}]"
            raise unsupported(where, f"Unsupported content type '{part.type[:100]}': only text is supported.")
        texts.append(part.text)
    return ChatMessage(item.role, "\n".join(texts))


def begun(body: ResponsesRequest, answer: Answer) -> ModelResponse:
    """The answer as it is before its first token."""
    return ModelResponse(
        id=answer.id,
        created_at=answer.created,
        status="in_progress",
        instructions=body.instructions,
        max_output_tokens=body.max_output_tokens,
        model=answer.model,
        prompt_cache_key=body.prompt_cache_key,
        reasoning=ShownReasoning(body.reasoning.effort if body.reasoning else None),
        safety_identifier=body.safety_identifier,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_logprobs=body.top_logprobs or 0,
        top_p=1.0 if body.top_p is None else body.top_p,
        user=body.user,
        metadata=body.metadata or {},
    )


def message_id(answer: Answer) -> str:
    """Of the one item that an answer's text is in."""
    return "msg_" + answer.id.removeprefix("resp_")


def text_logprobs(scored: Sequence[ScoredToken]) -> list[TextLogprob]:
    return [
        TextLogprob(
            each.token.name,
            list(each.token.raw or b""),
            each.logprob,
            [TopTextLogprob(token.name, list(token.raw or b""), logprob) for token, logprob in each.top],
        )
        for each in scored
    ]


def ended(
    response: ModelResponse, answer: Answer, text: str, logprobs: list[TextLogprob], finish: str
) -> ModelResponse:
    """The whole answer. One that was cut off is incomplete."""
    cut = finish == "length"
    status = "incomplete" if cut else "completed"
    tokens = answer.tally.completion_tokens
    usage = ResponseUsage(
        answer.prompt_tokens,
        InputTokensDetails(answer.tally.cached_tokens),
        tokens,
        OutputTokensDetails(),
        answer.prompt_tokens + tokens,
    )
    return msgspec.structs.replace(
        response,
        status=status,
        completed_at=None if cut else int(time.time()),
        incomplete_details=IncompleteDetails("max_output_tokens") if cut else None,
        output=[OutputMessage(message_id(answer), [OutputText(text, logprobs=logprobs)], status)],
        usage=usage,
    )


def response_body(response: ModelResponse, answer: Answer, pieces: Sequence[Piece]) -> bytes:
    text = "".join(piece.text for piece in pieces)
    logprobs = text_logprobs([token for piece in pieces for token in piece.scored])
    return msgspec.json.encode(ended(response, answer, text, logprobs, pieces[-1].finish_reason or "stop"))

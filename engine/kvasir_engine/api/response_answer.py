"""An answer in the form of OpenAI's Responses API. Pure."""

import time
from collections.abc import Sequence

import msgspec
from msgspec import UNSET

from kvasir_engine.api.answer import Answer
from kvasir_engine.api.answer_parts import Part, PartClosed, ReasoningPart, TextPart, ToolCallPart, parts_of
from kvasir_engine.api.detokenizer import Piece, ScoredToken
from kvasir_engine.api.response_schemas import (
    IncompleteDetails,
    InputTokensDetails,
    ModelResponse,
    OutputCall,
    OutputItem,
    OutputMessage,
    OutputPart,
    OutputReasoning,
    OutputText,
    OutputTokensDetails,
    ReasoningText,
    ResponsesRequest,
    ResponseUsage,
    ShownFormat,
    ShownReasoning,
    ShownText,
    ShownTool,
    TextFormat,
    TextLogprob,
    TopTextLogprob,
)


def begun(body: ResponsesRequest, answer: Answer) -> ModelResponse:
    """The answer before its first token."""
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
        parallel_tool_calls=body.parallel_tool_calls is not False,
        text=ShownText(_shown_format(body.text.format)) if body.text and body.text.format else ShownText(),
        tool_choice=body.tool_choice or "auto",
        tools=[
            ShownTool(each.name or "", each.description, each.parameters, each.strict) for each in body.tools or []
        ],
        temperature=1.0 if body.temperature is None else body.temperature,
        top_logprobs=body.top_logprobs or 0,
        top_p=1.0 if body.top_p is None else body.top_p,
        user=body.user,
        metadata=body.metadata or {},
    )


def _shown_format(format: TextFormat) -> ShownFormat:
    if format.type != "json_schema":
        return ShownFormat(format.type)
    return ShownFormat(format.type, format.name or UNSET, format.schema, format.description, format.strict)


def content_of(part: ReasoningPart | TextPart) -> OutputPart:
    """The content of an item for text or reasoning."""
    if isinstance(part, ReasoningPart):
        return ReasoningText(part.text)
    return OutputText(part.text, logprobs=text_logprobs(part.scored))


def item_of(answer: Answer, index: int, part: Part, status: str) -> OutputItem:
    """The item of a part; one in progress is empty."""
    id = f"{answer.id.removeprefix('resp_')}_{index}"
    begun = status == "in_progress"
    if isinstance(part, ToolCallPart):
        return OutputCall(f"fc_{id}", part.id, part.name, part.text, status)
    if isinstance(part, ReasoningPart):
        return OutputReasoning(f"rs_{id}", [] if begun else [ReasoningText(part.text)], status)
    text = OutputText(part.text, logprobs=text_logprobs(part.scored))
    return OutputMessage(f"msg_{id}", [] if begun else [text], status)


def whole_item(answer: Answer, closed: PartClosed) -> OutputItem:
    """The item of a part that is complete, or was cut off."""
    return item_of(answer, closed.index, closed.part, "incomplete" if closed.cut else "completed")


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


def ended(response: ModelResponse, answer: Answer, items: Sequence[OutputItem], finish: str) -> ModelResponse:
    """The complete answer. One that was cut off is incomplete."""
    cut = finish == "length"
    tokens = answer.counter.completion_tokens
    usage = ResponseUsage(
        answer.prompt_tokens,
        InputTokensDetails(answer.counter.cached_tokens),
        tokens,
        OutputTokensDetails(answer.counter.reasoning_tokens),
        answer.prompt_tokens + tokens,
    )
    return msgspec.structs.replace(
        response,
        status="incomplete" if cut else "completed",
        completed_at=None if cut else int(time.time()),
        incomplete_details=IncompleteDetails("max_output_tokens") if cut else None,
        output=list(items),
        usage=usage,
    )


def response_body(response: ModelResponse, answer: Answer, pieces: Sequence[Piece]) -> bytes:
    items = [whole_item(answer, closed) for closed in parts_of(pieces, never_empty=True)]
    return msgspec.json.encode(ended(response, answer, items, pieces[-1].finish_reason or "stop"))

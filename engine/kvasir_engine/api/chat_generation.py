"""From messages to the pieces of an answer, for all endpoints with conversations."""

import secrets
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from functools import partial

from starlette.requests import Request

from kvasir_engine.api.answer import Answer
from kvasir_engine.api.answer_reading import answer_reading, constrained, for_template, no_tools
from kvasir_engine.api.caller import Caller
from kvasir_engine.api.detokenizer import Piece
from kvasir_engine.api.errors import ApiError
from kvasir_engine.api.generation import Choice, TokenClock, run_choices
from kvasir_engine.api.http_responses import while_client_stays
from kvasir_engine.api.params import Params, chat_params
from kvasir_engine.api.prompts import chat_messages, rendering
from kvasir_engine.api.schemas import ChatRequest
from kvasir_engine.api.service import Service
from kvasir_engine.api.tool_params import ToolUse, tool_use


@dataclass(frozen=True)
class Generation:
    """An answer that is ready to run: iterating `pieces` starts it."""

    answer: Answer
    params: Params
    pieces: Callable[[], AsyncGenerator[tuple[Choice, Piece], None]]


async def chat_tokens(
    service: Service, request: Request, body: ChatRequest, truncate: int | None, tools: ToolUse | None = None
) -> list[int]:
    """The messages' tokens, in the model's template, with the tools. Raises ApiError."""
    messages = chat_messages(body, service.most)
    how = rendering(body, service.model.tokenizer.template_variables)
    messages, how = for_template(messages, how, tools, service.model.output)
    if not service.model.tokenizer.has_chat_template:
        raise ApiError(
            400, f"The model '{service.model.name}' has no chat template: use /v1/completions.", param="messages"
        )
    await service.check_ready(request)
    return await service.tokens(request, messages, "messages", truncate, how)


async def checked_tools(service: Service, request: Request, body: ChatRequest) -> ToolUse | None:
    """The tools of a chat, checked on a thread, since schemas take long. Raises ApiError."""
    if not body.tools:
        return tool_use(body)
    use = await while_client_stays(request, service.off_loop.run_long(partial(tool_use, body)))
    if use is not None and service.model.output.tools == "none":
        raise no_tools(service.model.name)
    return use


async def begin_chat(
    service: Service, request: Request, caller: Caller, body: ChatRequest, clock: TokenClock, prefix: str
) -> Generation:
    """The answer to a conversation, ready to run; its id begins with `prefix`. Raises ApiError."""
    service.check_model(body.model)
    params = chat_params(body, service.model)
    tools = await checked_tools(service, request, body)
    tokens = await chat_tokens(service, request, body, params.truncate, tools)
    reading = answer_reading(body, params, service.model, tools, tokens)
    params = constrained(params, tools, reading)
    await service.check_grammar(request, params)
    id = f"{prefix}{secrets.token_hex(12)}"
    choices = service.choices(id, caller, params, [tokens], "messages", reading)
    answer = service.answer(id, params, [tokens], choices, reasons=reading.format.reasoning != "none")
    return Generation(answer, params, partial(run_choices, service.client, choices, answer.counter, clock))

"""From messages to the pieces of an answer: what all endpoints of conversations share."""

import secrets
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from functools import partial

from starlette.requests import Request

from kvasir_engine.api.answer import Answer
from kvasir_engine.api.caller import Caller
from kvasir_engine.api.detokenizer import Piece
from kvasir_engine.api.errors import ApiError
from kvasir_engine.api.generation import Choice, TokenClock, run_choices
from kvasir_engine.api.params import Params, chat_params
from kvasir_engine.api.prompts import chat_messages, rendering
from kvasir_engine.api.schemas import ChatRequest
from kvasir_engine.api.service import Service


@dataclass(frozen=True)
class Generation:
    """An answer that can begin: `pieces` asks the engine."""

    answer: Answer
    params: Params
    pieces: Callable[[], AsyncGenerator[tuple[Choice, Piece], None]]


async def chat_tokens(service: Service, request: Request, body: ChatRequest, truncate: int | None) -> list[int]:
    """The messages' tokens, in the model's template. Raises ApiError."""
    messages = chat_messages(body, service.most)
    how = rendering(body, service.model.tokenizer.template_variables)
    if not service.model.tokenizer.has_chat_template:
        raise ApiError(
            400, f"The model '{service.model.name}' has no chat template: use /v1/completions.", param="messages"
        )
    await service.check_ready(request)
    return await service.tokens(request, messages, "messages", truncate, how)


async def begin_chat(
    service: Service, request: Request, caller: Caller, body: ChatRequest, clock: TokenClock, prefix: str
) -> Generation:
    """What a conversation is answered with; its id begins with `prefix`. Raises ApiError."""
    service.check_model(body.model)
    params = chat_params(body, service.model)
    tokens = await chat_tokens(service, request, body, params.truncate)
    id = f"{prefix}{secrets.token_hex(12)}"
    choices = service.choices(id, caller, params, [tokens], "messages")
    answer = service.answer(id, params, [tokens], choices)
    return Generation(answer, params, partial(run_choices, service.client, choices, answer.tally, clock))

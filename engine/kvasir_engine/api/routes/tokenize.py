"""`POST /tokenize` and `POST /detokenize`, as vLLM has them."""

import asyncio

from fastapi import FastAPI, Request
from starlette.responses import Response

from kvasir_engine.api.errors import bad_request
from kvasir_engine.api.http_responses import json_response
from kvasir_engine.api.prompts import chat_messages, check_tokens, rendering
from kvasir_engine.api.rendering import AS_USUAL
from kvasir_engine.api.schemas import (
    ChatRequest,
    Detokenized,
    DetokenizeRequest,
    Tokenized,
    TokenizeRequest,
)
from kvasir_engine.api.service import Service

_OF_MESSAGES = ("add_generation_prompt", "continue_final_message", "chat_template_kwargs")


def _conversation(body: TokenizeRequest) -> ChatRequest | None:
    """The same as a chat, or None where a prompt is to be tokenized. Raises ApiError."""
    if (body.prompt is None) == (body.messages is None):
        raise bad_request("Expected one of 'prompt' and 'messages'.", "prompt")
    if body.messages is not None:
        return ChatRequest(
            model=body.model or "",
            messages=body.messages,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            chat_template_kwargs=body.chat_template_kwargs,
        )
    for name in _OF_MESSAGES:
        if getattr(body, name) is not None:
            raise bad_request(f"'{name}' is only allowed with 'messages'.", name)
    return None


def add(app: FastAPI, service: Service) -> None:
    tokenizer = service.model.tokenizer

    @app.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        service.caller(request)
        body = await service.read(request, TokenizeRequest)
        if body.model is not None:
            service.check_model(body.model)
        chat = _conversation(body)
        if chat is None:
            around = body.add_special_tokens is not False
            tokens = await service.tokens(request, body.prompt or "", "prompt", None, AS_USUAL, around)
        else:
            if not tokenizer.has_chat_template:
                raise bad_request(f"The model '{service.model.name}' has no chat template.", "messages")
            how = rendering(chat, tokenizer.template_variables)
            around = bool(body.add_special_tokens)
            messages = chat_messages(chat, service.most)
            tokens = await service.tokens(request, messages, "messages", None, how, around)
        names = [tokenizer.token_name(each) or "" for each in tokens] if body.return_token_strs else None
        return json_response(Tokenized(len(tokens), service.client.max_length or None, tokens, names))

    @app.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        service.caller(request)
        body = await service.read(request, DetokenizeRequest)
        if body.model is not None:
            service.check_model(body.model)
        await asyncio.sleep(0)
        check_tokens(body.tokens, service.model.vocab_size, service.most, "tokens")
        return json_response(Detokenized(tokenizer.decode(body.tokens)))

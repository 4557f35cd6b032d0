"""`POST /v1/messages` and `POST /v1/messages/count_tokens`, Anthropic's."""

import msgspec
from fastapi import FastAPI, Request
from starlette.responses import Response

from kvasir_engine.api.caller import Caller
from kvasir_engine.api.chat_generation import begin_chat, chat_tokens, checked_tools
from kvasir_engine.api.generation import text_of
from kvasir_engine.api.http_responses import EventResponse, JsonResponse, json_response
from kvasir_engine.api.message_answer import message
from kvasir_engine.api.message_events import STYLE, message_events
from kvasir_engine.api.message_schemas import CountTokensRequest, MessagesRequest, TokensCount
from kvasir_engine.api.messages import chat_request, check_version, conversation
from kvasir_engine.api.renaming import renaming_fields
from kvasir_engine.api.service import Service


def add(app: FastAPI, service: Service) -> None:
    def caller_of(request: Request) -> Caller:
        caller = service.caller(request, "x-api-key")
        check_version(request.headers.get("anthropic-version"))
        return caller

    @app.post("/v1/messages")
    async def create(request: Request) -> Response:
        caller = caller_of(request)
        clock = service.clock(caller)
        body = await service.read(request, MessagesRequest)
        chat, names = chat_request(body, service.model)
        with renaming_fields(names):
            generation = await begin_chat(service, request, caller, chat, clock, "msg_")
        answer = generation.answer
        if generation.params.stream:
            return EventResponse(lambda: message_events(answer, generation.pieces()), STYLE)

        async def whole() -> bytes:
            (pieces,) = await text_of(generation.pieces(), 1)
            return msgspec.json.encode(message(answer, pieces))

        return JsonResponse(whole)

    @app.post("/v1/messages/count_tokens")
    async def count(request: Request) -> Response:
        caller_of(request)
        body = await service.read(request, CountTokensRequest)
        service.check_model(body.model)
        chat, names = conversation(body, service.model)
        with renaming_fields(names):
            tools = await checked_tools(service, request, chat)
            tokens = await chat_tokens(service, request, chat, None, tools)
        return json_response(TokensCount(len(tokens)))

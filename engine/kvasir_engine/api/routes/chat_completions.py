"""`POST /v1/chat/completions`."""

from fastapi import FastAPI, Request
from starlette.responses import Response

from kvasir_engine.api.chat import chat_body, chat_events
from kvasir_engine.api.chat_generation import begin_chat
from kvasir_engine.api.http_responses import EventResponse, JsonResponse
from kvasir_engine.api.schemas import ChatRequest
from kvasir_engine.api.service import Service


def add(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        caller = service.caller(request)
        clock = service.clock(caller)
        body = await service.read(request, ChatRequest)
        begun = await begin_chat(service, request, caller, body, clock, "chatcmpl-")
        scored = begun.params.sampling.logprobs is not None
        if begun.params.stream:
            return EventResponse(lambda: chat_events(begun.answer, begun.pieces(), scored))
        return JsonResponse(lambda: chat_body(begun.answer, begun.pieces(), scored))

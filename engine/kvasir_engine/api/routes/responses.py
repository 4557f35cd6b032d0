"""`POST /v1/responses`; nothing is stored."""

from fastapi import FastAPI, Request
from starlette.responses import Response

from kvasir_engine.api.chat_generation import begin_chat
from kvasir_engine.api.errors import ApiError
from kvasir_engine.api.generation import text_of
from kvasir_engine.api.http_responses import EventResponse, JsonResponse
from kvasir_engine.api.renaming import renaming_fields
from kvasir_engine.api.response_answer import begun, response_body
from kvasir_engine.api.response_events import ResponseEvents
from kvasir_engine.api.response_schemas import ResponsesRequest
from kvasir_engine.api.responses import chat_request
from kvasir_engine.api.service import Service


def add(app: FastAPI, service: Service) -> None:
    @app.post("/v1/responses")
    async def respond(request: Request) -> Response:
        caller = service.caller(request)
        clock = service.clock(caller)
        body = await service.read(request, ResponsesRequest)
        chat, names = chat_request(body)
        with renaming_fields(names):
            generation = await begin_chat(service, request, caller, chat, clock, "resp_")
        answer = generation.answer
        shown = begun(body, answer)
        if generation.params.stream:
            events = ResponseEvents(shown, answer)
            return EventResponse(lambda: events.write(generation.pieces()), events.style)

        async def whole() -> bytes:
            (pieces,) = await text_of(generation.pieces(), 1)
            return response_body(shown, answer, pieces)

        return JsonResponse(whole)

    @app.api_route("/v1/responses/{id}", methods=["GET", "DELETE"])
    async def stored(id: str, request: Request) -> Response:
        service.caller(request)
        raise ApiError(404, f"Response with id '{id[:100]}' not found: this server keeps no responses.", param="id")

"""`/v1/models`: the one model that is served."""

from fastapi import FastAPI, Request
from starlette.responses import Response

from kvasir_engine.api.http_responses import json_response
from kvasir_engine.api.schemas import ModelCard, ModelList
from kvasir_engine.api.service import Service


def add(app: FastAPI, service: Service) -> None:
    model = service.model

    def card() -> ModelCard:
        return ModelCard(id=model.name, created=model.created, max_model_len=service.client.max_length or None)

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        service.caller(request)
        return json_response(ModelList(data=[card()]))

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str, request: Request) -> Response:
        service.caller(request)
        service.check_model(name)
        return json_response(card())

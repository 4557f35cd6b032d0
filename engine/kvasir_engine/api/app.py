"""The OpenAI-compatible HTTP application over an EngineClient."""

import asyncio
import secrets
import time
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import msgspec
from fastapi import FastAPI, Request
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.exceptions import HTTPException
from starlette.responses import Response

from kvasir_engine.api.answer import Answer
from kvasir_engine.api.auth import ApiKeys
from kvasir_engine.api.bodies import BodyBudget
from kvasir_engine.api.chat import chat_body, chat_events
from kvasir_engine.api.completions import completion_body, completion_events
from kvasir_engine.api.detokenizer import Detokenizer
from kvasir_engine.api.errors import ApiError, from_validation
from kvasir_engine.api.generation import Choice, Tally, TokenClock, run_choices
from kvasir_engine.api.lifecycle import Lifecycle
from kvasir_engine.api.limits import Limits
from kvasir_engine.api.meter import RequestMeter
from kvasir_engine.api.metrics import ApiMetrics
from kvasir_engine.api.params import (
    Params,
    chat_messages,
    chat_params,
    choice_seed,
    completion_params,
    completion_prompts,
    room,
)
from kvasir_engine.api.responses import (
    EventResponse,
    JsonResponse,
    as_api_error,
    error_headers,
    while_client_stays,
)
from kvasir_engine.api.schemas import ChatRequest, CommonRequest, CompletionRequest, Model, ModelList
from kvasir_engine.api.template import TemplateError
from kvasir_engine.api.tokenizer import ServedModel
from kvasir_engine.client import EngineClient, GenerateRequest

MOST_BODY_BYTES = 64 * 2**20

R = TypeVar("R")
B = TypeVar("B", bound=CommonRequest)


@dataclass(frozen=True)
class _Service:
    """What the endpoints share."""

    client: EngineClient
    model: ServedModel
    metrics: ApiMetrics
    lifecycle: Lifecycle
    keys: ApiKeys | None
    executor: Executor

    def unready_reason(self) -> str | None:
        return "draining" if self.lifecycle.draining else self.client.unready_reason()

    def salt(self, request: Request) -> str:
        return "" if self.keys is None else self.keys.salt(request.headers.get("authorization"))

    def check_model(self, name: str) -> None:
        if name != self.model.name:
            raise ApiError(
                404,
                f"The model '{name}' does not exist or you do not have access to it.",
                code="model_not_found",
                param="model",
            )

    async def off_loop(self, work: Callable[[], R]) -> R:
        return await asyncio.get_running_loop().run_in_executor(self.executor, work)

    async def check_ready(self, request: Request) -> None:
        """Refuse a request that no engine will take soon. Until one does, the client may leave."""
        reason = await while_client_stays(request, self.client.wait_ready())
        if reason is not None:
            message = f"The model is not ready to serve: {reason}."
            raise ApiError(503, message, code="no_worker", type="server_error")

    def choices(self, id: str, salt: str, params: Params, prompts: list[list[int]], param: str) -> list[Choice]:
        choices: list[Choice] = []
        for place, tokens in enumerate(prompts):
            most = room(len(tokens), params.max_tokens, self.client.max_length, param)
            for n in range(params.n):
                index = len(choices)
                sampling = msgspec.structs.replace(
                    params.sampling, max_tokens=most, seed=choice_seed(params.sampling.seed, n)
                )
                detokenizer = Detokenizer(self.model.tokenizer, params.stop, sampling.min_tokens)
                request = GenerateRequest(f"{id}-{index}", tokens, sampling, salt, params.priority)
                choices.append(Choice(index, place, request, detokenizer))
        return choices

    def answer(self, id: str, prompts: list[list[int]], choices: list[Choice]) -> Answer:
        return Answer(
            id=id,
            created=int(time.time()),
            model=self.model.name,
            choices=len(choices),
            prompt_tokens=sum(map(len, prompts)),
            tally=Tally(len(prompts)),
        )


async def _read(request: Request, kind: type[B]) -> B:
    """The request's body. Raises ApiError."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MOST_BODY_BYTES:
            raise ApiError(
                413, f"The request body is larger than {MOST_BODY_BYTES} bytes.", code="request_too_large"
            )
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.DecodeError as error:
        raise from_validation(error) from None


def _error_response(error: ApiError) -> Response:
    return Response(error.body, error.status, error_headers(error), "application/json")


def _json(value: msgspec.Struct) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")


def create_app(
    client: EngineClient,
    model: ServedModel,
    *,
    registry: CollectorRegistry,
    lifecycle: Lifecycle,
    executor: Executor,
    keys: ApiKeys | None = None,
    body_bytes: int = Limits.body_bytes,
) -> FastAPI:
    """The application. `executor` runs tokenizing and chat templates; the caller shuts it down.

    `registry` gets the request metrics and is what /metrics shows. Without `keys` everyone may use the API, as one
    tenant. /health, /ready and /metrics ask for no key. `body_bytes`: of all requests' bodies together.
    """
    metrics = ApiMetrics(registry)
    service = _Service(client, model, metrics, lifecycle, keys, executor)
    app = FastAPI(title="Kvasir", openapi_url=None)
    app.add_middleware(BodyBudget, most=body_bytes)
    app.add_middleware(RequestMeter, metrics=metrics, lifecycle=lifecycle)

    async def on_http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message = f"Invalid URL ({request.method} {request.url.path})"
        if error.status_code == 405:
            message = f"Not allowed to {request.method} on {request.url.path}."
        return _error_response(ApiError(error.status_code, message))

    async def on_error(_: Request, error: Exception) -> Response:
        return _error_response(as_api_error(error))

    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(ApiError, on_error)
    app.add_exception_handler(Exception, on_error)

    @app.get("/health")
    async def health() -> Response:
        return Response("ok", media_type="text/plain")

    @app.get("/ready")
    async def ready() -> Response:
        reason = service.unready_reason()
        body = msgspec.json.encode({"reason": reason} if reason else {})
        return Response(body, 503 if reason else 200, media_type="application/json")

    @app.get("/metrics")
    async def show_metrics() -> Response:
        return Response(generate_latest(registry), headers={"content-type": CONTENT_TYPE_LATEST})

    def card() -> Model:
        return Model(id=model.name, created=model.created, max_model_len=client.max_length or None)

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        service.salt(request)
        return _json(ModelList(data=[card()]))

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str, request: Request) -> Response:
        service.salt(request)
        service.check_model(name)
        return _json(card())

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        clock = TokenClock(metrics)
        salt = service.salt(request)
        body = await _read(request, ChatRequest)
        service.check_model(body.model)
        params = chat_params(body, model.eos, model.vocab_size)
        messages = chat_messages(body)
        if not model.tokenizer.has_chat_template:
            raise ApiError(
                400, f"The model '{model.name}' has no chat template: use /v1/completions.", param="messages"
            )
        await service.check_ready(request)
        try:
            tokens = await service.off_loop(partial(model.tokenizer.chat, messages))
        except TemplateError as error:
            message = f"The model's chat template refuses the messages: {error}."
            raise ApiError(400, message, code="invalid_value", param="messages") from None
        id = f"chatcmpl-{secrets.token_hex(12)}"
        choices = service.choices(id, salt, params, [tokens], "messages")
        answer = service.answer(id, [tokens], choices)
        pieces = partial(run_choices, client, choices, answer.tally, clock)
        scored = params.sampling.logprobs is not None
        if params.stream:
            return EventResponse(lambda: chat_events(answer, pieces(), scored, params.include_usage))
        return JsonResponse(lambda: chat_body(answer, pieces(), scored))

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        clock = TokenClock(metrics)
        salt = service.salt(request)
        body = await _read(request, CompletionRequest)
        service.check_model(body.model)
        params = completion_params(body, model.eos, model.vocab_size)
        asked = completion_prompts(body, model.vocab_size)
        await service.check_ready(request)
        prompts = [
            each if isinstance(each, list) else await service.off_loop(partial(model.tokenizer.encode, each))
            for each in asked
        ]
        id = f"cmpl-{secrets.token_hex(12)}"
        choices = service.choices(id, salt, params, prompts, "prompt")
        answer = service.answer(id, prompts, choices)
        pieces = partial(run_choices, client, choices, answer.tally, clock)
        scored = params.sampling.logprobs
        if params.stream:
            return EventResponse(lambda: completion_events(answer, pieces(), scored, params.include_usage))
        return JsonResponse(lambda: completion_body(answer, pieces(), scored))

    return app

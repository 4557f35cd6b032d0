"""The HTTP application over an EngineClient: OpenAI's API, Anthropic's Messages API, and vLLM's extras."""

from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from functools import partial

from fastapi import FastAPI, Request
from prometheus_client import CollectorRegistry, generate_latest
from starlette.exceptions import HTTPException
from starlette.responses import Response

from kvasir_engine.api.auth import ApiKeys
from kvasir_engine.api.batch.runner import BatchRunner
from kvasir_engine.api.body_budget import BodyBudget
from kvasir_engine.api.encoding import OffLoop
from kvasir_engine.api.errors import ApiError
from kvasir_engine.api.grammar_check import GrammarCheck
from kvasir_engine.api.http.limits import HttpLimits
from kvasir_engine.api.http_responses import as_api_error, body_of, error_headers
from kvasir_engine.api.lifecycle import Lifecycle
from kvasir_engine.api.metrics import ApiMetrics
from kvasir_engine.api.request_meter import RequestMeter
from kvasir_engine.api.routes import batches as batch_routes
from kvasir_engine.api.routes import (
    chat_completions,
    completions,
    files,
    messages,
    models,
    not_served,
    openapi,
    probes,
    responses,
    tokenize,
)
from kvasir_engine.api.service import Service
from kvasir_engine.api.tokenizer import ServedModel
from kvasir_engine.api.vocabulary import vocabulary_of
from kvasir_engine.engine_client import EngineClient


def _error_response(request: Request, error: ApiError) -> Response:
    body = body_of(error, request.url.path)
    return Response(body, error.status, error_headers(error), "application/json")


def create_app(
    client: EngineClient,
    model: ServedModel,
    *,
    registry: CollectorRegistry,
    lifecycle: Lifecycle,
    executor: Executor,
    long_ones: int = 1,
    keys: ApiKeys | None = None,
    over: Callable[[], str | None] = lambda: None,
    body_bytes: int = HttpLimits.body_bytes,
    batches: BatchRunner | None = None,
    grammars: GrammarCheck | None = None,
    all_metrics: Callable[[], Awaitable[bytes]] | None = None,
) -> FastAPI:
    """The application. `executor` runs tokenizing and chat templates; the caller shuts it down. Long texts get
    `long_ones` of its threads at most.

    `registry` gets the request metrics and is what /metrics shows, unless `all_metrics` has more to show.
    Without `keys` everyone may use the API, as one tenant. /health, /ready, /metrics, /version and /openapi.json
    ask for no key.
    `over` says why the process serves no more, if it does not.
    `body_bytes`: of all requests' bodies together. `batches`: files and batches; the caller runs them.
    `grammars`: who tries them, if not new processes that end with this one.
    """
    metrics = ApiMetrics(registry)

    async def own_metrics() -> bytes:
        return generate_latest(registry)

    grammars = grammars or GrammarCheck(partial(vocabulary_of, model))
    service = Service(client, model, metrics, lifecycle, keys, OffLoop(executor, long_ones), grammars)
    app = FastAPI(title="Kvasir", openapi_url=None)
    app.add_middleware(BodyBudget, most=body_bytes)
    app.add_middleware(RequestMeter, metrics=metrics, lifecycle=lifecycle)

    async def on_http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message = f"Invalid URL ({request.method} {request.url.path})"
        if error.status_code == 405:
            message = f"Not allowed to {request.method} on {request.url.path}."
        return _error_response(request, ApiError(error.status_code, message))

    async def on_error(request: Request, error: Exception) -> Response:
        return _error_response(request, as_api_error(error))

    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(ApiError, on_error)
    app.add_exception_handler(Exception, on_error)

    probes.add(app, service, all_metrics or own_metrics, over)
    models.add(app, service)
    chat_completions.add(app, service)
    completions.add(app, service)
    responses.add(app, service)
    messages.add(app, service)
    tokenize.add(app, service)
    if batches is None:
        not_served.add_without_folder(app, service)
    else:
        files.add(app, service, batches)
        batch_routes.add(app, service, batches)
    not_served.add(app, service)
    openapi.add(app, service)
    return app

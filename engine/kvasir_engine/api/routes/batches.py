"""`/v1/batches`: many requests from a file, at lower priority than all others."""

from fastapi import FastAPI, Request
from starlette.responses import Response

from kvasir_engine.api.batch.paging import check_query, page, page_limit
from kvasir_engine.api.batch.runner import BatchRunner
from kvasir_engine.api.batch.schemas import BatchList, BatchRequest
from kvasir_engine.api.errors import ApiError, unsupported
from kvasir_engine.api.http_responses import json_response
from kvasir_engine.api.params import check_metadata
from kvasir_engine.api.routes.files import store_error
from kvasir_engine.api.service import Service

ENDPOINTS = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/responses"})


def _check_endpoint(endpoint: str) -> None:
    """Raise ApiError for an endpoint that batches cannot use."""
    if endpoint not in ENDPOINTS:
        shown = ", ".join(sorted(ENDPOINTS))
        raise ApiError(
            400,
            f"Invalid value for 'endpoint': expected one of {shown}, but got '{endpoint[:100]}' instead.",
            param="endpoint",
            code="invalid_value",
        )


def add(app: FastAPI, service: Service, batches: BatchRunner) -> None:
    @app.post("/v1/batches")
    async def create(request: Request) -> Response:
        owner = service.caller(request).salt
        body = await service.read(request, BatchRequest)
        _check_endpoint(body.endpoint)
        if body.completion_window != "24h":
            raise unsupported("completion_window", "Unsupported value: 'completion_window' is '24h'.")
        check_metadata(body.metadata)
        try:
            return json_response(await batches.create(owner, body))
        except OSError as error:
            raise store_error(batches, error) from error

    @app.get("/v1/batches")
    async def listed(request: Request) -> Response:
        owner = service.caller(request).salt
        query = request.query_params
        check_query(query, ("limit", "after"))
        limit = page_limit(query, 20, 100)
        try:
            mine = await batches.jobs.of(owner)
        except OSError as error:
            raise store_error(batches, error) from error
        some, more = page(mine, query.get("after"), limit)
        ids = [each.id for each in some]
        return json_response(
            BatchList(data=some, first_id=next(iter(ids), None), last_id=ids[-1] if ids else None, has_more=more)
        )

    @app.get("/v1/batches/{id}")
    async def batch(id: str, request: Request) -> Response:
        try:
            return json_response(await batches.jobs.get(service.caller(request).salt, id))
        except OSError as error:
            raise store_error(batches, error) from error

    @app.post("/v1/batches/{id}/cancel")
    async def cancel(id: str, request: Request) -> Response:
        try:
            return json_response(await batches.cancel(service.caller(request).salt, id))
        except OSError as error:
            raise store_error(batches, error) from error

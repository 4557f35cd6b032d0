"""`/v1/files`: the inputs and outputs of batches."""

import logging

from fastapi import FastAPI, Request
from starlette.responses import Response, StreamingResponse

from kvasir_engine.api.batch.paging import check_query, page, page_limit
from kvasir_engine.api.batch.runner import BatchRunner
from kvasir_engine.api.batch.schemas import FileDeleted, FileList
from kvasir_engine.api.batch.upload import Form, read_upload
from kvasir_engine.api.errors import ApiError, bad_request, unsupported
from kvasir_engine.api.http_responses import json_response
from kvasir_engine.api.service import Service

log = logging.getLogger("api")


def store_error(batches: BatchRunner, error: OSError) -> ApiError:
    """What a client is told of it; the log has more."""
    code, name = batches.store.failing
    log.error("files and batches cannot be kept reason=%r", str(error))
    return ApiError(503, f"The server's {name} fails: {error.strerror}.", code=code, type="server_error")


def _check(form: Form) -> str:
    """The file's purpose. Raises ApiError."""
    for name in form.fields:
        if name != "purpose":
            raise bad_request(f"Unknown parameter: '{name[:100]}'.", name, "unknown_parameter")
    if form.filename is None:
        raise bad_request("Missing required parameter: 'file'.", "file", "missing_required_parameter")
    purpose = form.fields.get("purpose")
    if purpose is None:
        raise bad_request("Missing required parameter: 'purpose'.", "purpose", "missing_required_parameter")
    if purpose != "batch":
        message = f"Unsupported value: 'purpose' does not support '{purpose[:100]}', only 'batch'."
        raise unsupported("purpose", message)
    return purpose


def add(app: FastAPI, service: Service, batches: BatchRunner) -> None:
    store, limits = batches.files, batches.limits
    uploads = 0

    @app.post("/v1/files")
    async def upload(request: Request) -> Response:
        nonlocal uploads
        owner = service.caller(request).salt
        if uploads >= limits.uploads:
            raise ApiError(503, "Too many files are being sent.", code="overloaded", type="server_error")
        uploads += 1
        path = store.new_path()
        try:
            await store.check_room(owner)
            form = await read_upload(request, path, limits.file_bytes)
            purpose = _check(form)
            return json_response(await store.add(owner, path, form.filename or "", purpose))
        except OSError as error:
            raise store_error(batches, error) from error
        finally:
            uploads -= 1
            path.unlink(missing_ok=True)

    @app.get("/v1/files")
    async def files(request: Request) -> Response:
        owner = service.caller(request).salt
        query = request.query_params
        check_query(query, ("limit", "after", "order", "purpose"))
        order = query.get("order", "desc")
        if order not in ("asc", "desc"):
            raise bad_request("Invalid value for 'order': expected 'asc' or 'desc'.", "order")
        limit = page_limit(query, 10_000, 10_000)
        try:
            mine = [each for each in await store.of(owner) if query.get("purpose") in (None, each.purpose)]
        except OSError as error:
            raise store_error(batches, error) from error
        some, more = page(mine if order == "asc" else mine[::-1], query.get("after"), limit)
        ids = [each.id for each in some]
        return json_response(
            FileList(data=some, first_id=next(iter(ids), None), last_id=ids[-1] if ids else None, has_more=more)
        )

    @app.get("/v1/files/{id}")
    async def file(id: str, request: Request) -> Response:
        try:
            return json_response(await store.get(service.caller(request).salt, id))
        except OSError as error:
            raise store_error(batches, error) from error

    @app.get("/v1/files/{id}/content")
    async def content(id: str, request: Request) -> Response:
        owner = service.caller(request).salt
        try:
            found = await store.get(owner, id)
            parts = await store.content(owner, found)
        except OSError as error:
            raise store_error(batches, error) from error
        headers = {"content-length": str(found.bytes)}
        return StreamingResponse(parts, headers=headers, media_type="application/octet-stream")

    @app.delete("/v1/files/{id}")
    async def delete(id: str, request: Request) -> Response:
        owner = service.caller(request).salt
        try:
            found = await store.get(owner, id)
            using = await batches.jobs.using(owner, found.id)
            if using is not None:
                raise bad_request(f"The file is the input of {using.id}, which has not ended.", "id")
            await store.delete(owner, found.id)
        except OSError as error:
            raise store_error(batches, error) from error
        return json_response(FileDeleted(id=found.id))

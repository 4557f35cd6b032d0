"""The process's state: /health, /ready, /metrics and /version."""

from collections.abc import Awaitable, Callable
from importlib.metadata import PackageNotFoundError, version

import msgspec
from fastapi import FastAPI
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from kvasir_engine.api.joint_metrics import MetricsUnknown
from kvasir_engine.api.schemas import Version
from kvasir_engine.api.service import Service


def kvasir_version() -> str:
    try:
        return version("kvasir")
    except PackageNotFoundError:  # run from a folder, not installed
        return "0"


def add(
    app: FastAPI,
    service: Service,
    metrics: Callable[[], Awaitable[bytes]],
    over: Callable[[], str | None],
) -> None:
    """`metrics`: in Prometheus's text format; `over` gives the reason once the process can serve no more."""

    @app.get("/health")
    async def health() -> Response:
        reason = over()
        return Response(reason or "ok", 503 if reason else 200, media_type="text/plain")

    @app.get("/ready")
    async def ready() -> Response:
        reason = over() or service.unready_reason()
        body = msgspec.json.encode({"reason": reason} if reason else {})
        return Response(body, 503 if reason else 200, media_type="application/json")

    @app.get("/metrics")
    async def show_metrics() -> Response:
        try:
            return Response(await metrics(), headers={"content-type": CONTENT_TYPE_LATEST})
        except MetricsUnknown as error:
            return Response(str(error), 503, media_type="text/plain")

    shown = msgspec.json.encode(Version(kvasir_version()))

    @app.get("/version")
    async def show_version() -> Response:
        return Response(shown, media_type="application/json")

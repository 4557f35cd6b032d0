"""A router's `GET /status`, which the operator reads."""

import msgspec
from fastapi import FastAPI, Response

from kvasir_engine.api.lifecycle import Lifecycle
from kvasir_engine.router.canary import PairVerifier
from kvasir_engine.router.client import PooledClient
from kvasir_engine.status_reports import RouterStatus


def show_status(app: FastAPI, verifier: PairVerifier, client: PooledClient, lifecycle: Lifecycle) -> None:
    """Add `GET /status`."""

    @app.get("/status")
    async def status() -> Response:
        reason = client.unready_workers()
        shown = RouterStatus(
            lifecycle.draining, lifecycle.inflight, reason, verifier.report(), client.load.report()
        )
        return Response(msgspec.json.encode(shown), media_type="application/json")

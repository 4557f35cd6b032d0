"""Batches in a serving process: from the flag to the task that runs them."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from starlette.types import ASGIApp

from kvasir_engine.api.batch.folder import BatchFolder
from kvasir_engine.api.batch.runner import BatchRunner
from kvasir_engine.api.lifecycle import Lifecycle
from kvasir_engine.api.request_body import most_body_bytes
from kvasir_engine.engine_client import EngineClient
from kvasir_engine.errors import UserError
from kvasir_engine.supervisor import Supervisor


def batches_of(folder: str, lifecycle: Lifecycle) -> BatchRunner | None:
    """The runner for --batch-dir; None without it. Raises UserError."""
    if "://" in folder:
        raise UserError(
            f"batch-dir {folder}: it has to be a folder of this machine; object stores are not supported"
        )
    return BatchRunner(BatchFolder(Path(folder)), lifecycle) if folder else None


@asynccontextmanager
async def running_batches(
    batches: BatchRunner | None, app: ASGIApp, client: EngineClient, tasks: Supervisor
) -> AsyncIterator[None]:
    """Run batches within this context; the next start resumes unfinished ones."""
    if batches is None:
        yield
        return
    task = tasks.start(batches.run(app, lambda: most_body_bytes(client.max_length)), "batches")
    try:
        yield
    finally:
        await tasks.stop(task)
        batches.close()

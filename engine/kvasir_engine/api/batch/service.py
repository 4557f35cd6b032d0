"""Batches in a serving process: from the flag to the task that runs them."""

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from starlette.types import ASGIApp

from kvasir_engine.api.batch.folder_store import FolderStore
from kvasir_engine.api.batch.runner import BatchRunner
from kvasir_engine.api.lifecycle import Lifecycle
from kvasir_engine.api.request_body import most_body_bytes
from kvasir_engine.engine_client import EngineClient
from kvasir_engine.errors import UserError
from kvasir_engine.supervisor import Supervisor

SCHEMES = ("s3", "gs", "az")
"""Of object stores: those that write on condition of a version."""


async def batches_of(place: str, lifecycle: Lifecycle) -> BatchRunner | None:
    """The runner for --batch-dir, a folder or an address; None without it. Raises UserError."""
    if not place:
        return None
    scheme, separator, rest = place.partition("://")
    if not separator:
        return BatchRunner(FolderStore(Path(place)), lifecycle)
    if scheme not in SCHEMES:
        known = ", ".join(f"{each}://bucket/prefix" for each in SCHEMES)
        raise UserError(f"batch-dir {place}: it has to be a folder of this machine, or one of {known}")
    if not re.fullmatch(r"[^/?#@\s]+(/[^?#\s]*)?", rest):
        raise UserError(f"batch-dir {place}: it has to be {scheme}://bucket or {scheme}://bucket/prefix")
    from kvasir_engine.api.batch.objects.store import open_store

    return BatchRunner(await open_store(place), lifecycle)


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

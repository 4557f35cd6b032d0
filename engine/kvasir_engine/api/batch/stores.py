"""Where files and batches are kept: what a folder of this machine and an object store both do."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Literal, Protocol

from kvasir_engine.api.batch.schemas import Batch, FileObject, OwnedBatch
from kvasir_engine.api.errors import ApiError

Change = Callable[[Batch], Batch]
"""From a batch's present state to the next. It may be called again, with a newer state."""
LinesName = Literal["output", "errors"]


class ClaimLost(Exception):
    """Another process runs the batch now."""


class Gone(Exception):
    """What a batch needs was removed by others: `code` and message are for its errors."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def input_gone() -> Gone:
    return Gone("file_not_found", "The input file is gone.")


class StoreError(OSError):
    """The object store failed. `strerror` is for clients; the text, which is for the log, says more."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(None, reason)
        self._detail = detail

    def __str__(self) -> str:
        return f"{self.strerror}: {self._detail}"


def no_file(id: str) -> ApiError:
    return ApiError(404, f"No such File object: {id[:100]}", param="id", code="not_found")


def no_batch(id: str) -> ApiError:
    return ApiError(404, f"No batch found with id '{id[:100]}'.", param="id", code="not_found")


class Files(Protocol):
    """Files of clients and output of batches, each whole or not there. All methods may raise OSError."""

    async def of(self, owner: str) -> list[FileObject]:
        """A tenant's files, the oldest first."""

    async def get(self, owner: str, id: str) -> FileObject:
        """One file. Raises ApiError, 404, for files of other tenants too."""

    async def check_room(self, owner: str) -> None:
        """Raise ApiError where the tenant has reached its limit of files."""

    def new_path(self) -> Path:
        """A path of this machine for a file that is being sent; the caller removes what is left there."""

    async def add(self, owner: str, written: Path, filename: str, purpose: str) -> FileObject:
        """Add a file that was written to a `new_path`."""

    async def content(self, owner: str, file: FileObject) -> AsyncIterator[bytes]:
        """The file's bytes."""

    async def delete(self, owner: str, id: str) -> None:
        """Remove the file. Idempotent."""


class HeldJob(Protocol):
    """A batch that this process runs. All methods may raise OSError, and ClaimLost where another runs it now."""

    @property
    def owner(self) -> str: ...

    @property
    def stopped(self) -> asyncio.Event:
        """Set when the batch was cancelled, or another process runs it now."""

    @property
    def linger(self) -> float:
        """Seconds in which answers are collected before they are written."""

    @property
    def batch(self) -> Batch:
        """The newest known state."""

    async def keep(self) -> None:
        """Keep the batch this process's until cancelled."""

    async def update(self, change: Change) -> Batch:
        """Write the next state."""

    async def answered(self) -> tuple[set[str], set[str]]:
        """The custom ids of answers and of failures that are written. The counts become theirs. Raises Gone."""

    async def append(self, answers: Sequence[bytes], failures: Sequence[bytes]) -> None:
        """Write lines, durably, and count them."""

    async def written(self, name: LinesName) -> bool:
        """Whether there are such lines."""

    def input(self) -> AbstractAsyncContextManager[Path]:
        """The input file on this machine. Raises Gone."""

    async def publish(self, name: LinesName, id: str) -> None:
        """Make a file of the lines. Idempotent. Raises Gone."""

    async def clear(self) -> None:
        """Remove the lines, which are published."""

    async def release(self) -> None:
        """Leave the batch to any process. Raises nothing."""


class Jobs(Protocol):
    """The states of batches. All methods may raise OSError."""

    @property
    def poll_seconds(self) -> float:
        """How often to look for batches that no process runs."""

    async def of(self, owner: str) -> list[Batch]:
        """A tenant's batches, the newest first."""

    async def get(self, owner: str, id: str) -> Batch:
        """One batch. Raises ApiError, 404, for batches of other tenants too."""

    async def using(self, owner: str, file_id: str) -> Batch | None:
        """A batch that still reads this file, or None."""

    async def check_room(self, owner: str) -> None:
        """At a tenant's limit, forget its oldest ended batch. Raises ApiError where none has ended."""

    async def create(self, owner: str, batch: Batch) -> None:
        """Write a new batch."""

    async def change(self, owner: str, id: str, change: Change) -> Batch:
        """Write the next state. Raises what `change` raises, and ApiError, 404."""

    async def unfinished(self) -> list[OwnedBatch]:
        """The batches that have not ended, the oldest first."""

    async def claim(self, owned: OwnedBatch) -> HeldJob | None:
        """Make the batch this process's; None where another runs it."""


class BatchStore(Protocol):
    """Files and jobs of one place. `failing` is how its errors are told to clients: a code and a name."""

    @property
    def files(self) -> Files: ...

    @property
    def jobs(self) -> Jobs: ...

    @property
    def failing(self) -> tuple[str, str]: ...

    async def tidy(self) -> None:
        """Remove what processes that ended left behind. Raises OSError."""

    def close(self) -> None:
        """Let go of the place."""


def by_age(owned: OwnedBatch) -> tuple[int, str]:
    return owned.batch.created_at, owned.batch.id

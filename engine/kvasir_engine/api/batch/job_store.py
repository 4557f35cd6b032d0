"""The states of batches, on disk. The folder is one process's: all its batches are this process's to run."""

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from kvasir_engine.api.batch.file_store import FileStore
from kvasir_engine.api.batch.folder import BatchFolder, BatchLimits, drop_half_line, write_whole
from kvasir_engine.api.batch.input_lines import answered
from kvasir_engine.api.batch.schemas import ENDED, Batch, OwnedBatch, RequestCounts
from kvasir_engine.api.batch.stores import Change, LinesName, by_age, input_gone, no_batch
from kvasir_engine.api.errors import bad_request

log = logging.getLogger("api")


def oldest_ended(mine: list[Batch], limits: BatchLimits) -> Batch | None:
    """A tenant's batch to forget, of its own, the newest first, at its limit. Raises ApiError where none ended."""
    if len(mine) < limits.batches:
        return None
    ended = [batch for batch in mine if batch.status in ENDED]
    if not ended:
        raise bad_request(f"You have {limits.batches} batches that have not ended.")
    return ended[-1]


def counted(batch: Batch, completed: int, failed: int) -> Batch:
    """The batch with so many requests answered."""
    counts = RequestCounts(batch.request_counts.total, completed, failed)
    return msgspec.structs.replace(batch, request_counts=counts)


class JobStore:
    """A batch is `ID.json`, and while it runs `ID.output` and `ID.errors`, to which lines are added."""

    poll_seconds = 30.0

    def __init__(self, folder: BatchFolder, files: FileStore, limits: BatchLimits) -> None:
        self._path = folder.batches
        self._files = files
        self._limits = limits
        self._jobs: dict[str, OwnedBatch] = {}
        self._held: dict[str, FolderJob] = {}
        for path in sorted(self._path.glob("*.json")):
            try:
                owned = msgspec.json.decode(path.read_bytes(), type=OwnedBatch)
            except (OSError, msgspec.DecodeError) as error:
                log.error("a batch cannot be read path=%s reason=%r", path, str(error))
                continue
            self._jobs[owned.batch.id] = owned
            for name in ("output", "errors"):
                drop_half_line(self._path / f"{owned.batch.id}.{name}")

    async def of(self, owner: str) -> list[Batch]:
        """See Jobs."""
        mine = [each for each in self._jobs.values() if each.owner == owner]
        return [each.batch for each in sorted(mine, key=by_age, reverse=True)]

    async def get(self, owner: str, id: str) -> Batch:
        """See Jobs."""
        return self.known(owner, id)

    def known(self, owner: str, id: str) -> Batch:
        """See Jobs.get."""
        owned = self._jobs.get(id)
        if owned is None or owned.owner != owner:
            raise no_batch(id)
        return owned.batch

    async def unfinished(self) -> list[OwnedBatch]:
        """See Jobs."""
        return sorted((each for each in self._jobs.values() if each.batch.status not in ENDED), key=by_age)

    async def using(self, owner: str, file_id: str) -> Batch | None:
        """See Jobs."""
        found = (each.batch for each in await self.unfinished() if each.batch.input_file_id == file_id)
        return next(found, None)

    async def check_room(self, owner: str) -> None:
        """See Jobs."""
        dropped = oldest_ended(await self.of(owner), self._limits)
        if dropped is not None:
            (self._path / f"{dropped.id}.json").unlink(missing_ok=True)
            self._jobs.pop(dropped.id, None)

    async def create(self, owner: str, batch: Batch) -> None:
        """See Jobs."""
        self._save(owner, batch)

    async def change(self, owner: str, id: str, change: Change) -> Batch:
        """See Jobs."""
        batch = change(self.known(owner, id))
        self._save(owner, batch)
        if batch.status == "cancelling" and id in self._held:
            self._held[id].stopped.set()
        return batch

    async def claim(self, owned: OwnedBatch) -> "FolderJob":
        """See Jobs."""
        id = owned.batch.id
        held = self._held[id] = FolderJob(self, self._files, owned.owner, id, self._path)
        if self.known(owned.owner, id).status == "cancelling":
            held.stopped.set()
        return held

    def let_go(self, id: str) -> None:
        self._held.pop(id, None)

    def _save(self, owner: str, batch: Batch) -> None:
        owned = OwnedBatch(owner, batch)
        write_whole(self._path / f"{batch.id}.json", msgspec.json.encode(owned))
        self._jobs[batch.id] = owned

    def note(self, owner: str, batch: Batch) -> None:
        """Update a batch's state in memory only: the lines on disk have what is new."""
        self._jobs[batch.id] = OwnedBatch(owner, batch)


class FolderJob:
    """See HeldJob."""

    linger = 0.0

    def __init__(self, jobs: JobStore, files: FileStore, owner: str, id: str, folder: Path) -> None:
        self.owner = owner
        self.stopped = asyncio.Event()
        self._jobs = jobs
        self._files = files
        self._id = id
        self._lines: dict[LinesName, Path] = {"output": folder / f"{id}.output", "errors": folder / f"{id}.errors"}

    @property
    def batch(self) -> Batch:
        """See HeldJob."""
        return self._jobs.known(self.owner, self._id)

    async def keep(self) -> None:
        """See HeldJob."""
        await asyncio.Event().wait()

    async def update(self, change: Change) -> Batch:
        """See HeldJob."""
        return await self._jobs.change(self.owner, self._id, change)

    async def answered(self) -> tuple[set[str], set[str]]:
        """See HeldJob."""
        output, errors = self._lines["output"], self._lines["errors"]
        good, bad = await asyncio.to_thread(lambda: (answered(output), answered(errors)))
        self._jobs.note(self.owner, counted(self.batch, len(good), len(bad)))
        return good, bad

    async def append(self, answers: Sequence[bytes], failures: Sequence[bytes]) -> None:
        """See HeldJob."""
        for path, lines in ((self._lines["output"], answers), (self._lines["errors"], failures)):
            if lines:
                await asyncio.to_thread(_append, path, b"".join(lines))
        counts = self.batch.request_counts
        now = counted(self.batch, counts.completed + len(answers), counts.failed + len(failures))
        self._jobs.note(self.owner, now)

    async def written(self, name: LinesName) -> bool:
        """See HeldJob."""
        return self._lines[name].exists()

    @asynccontextmanager
    async def input(self) -> AsyncIterator[Path]:
        """See HeldJob."""
        path = self._files.data(self.batch.input_file_id)
        if not path.exists():
            raise input_gone()
        yield path

    async def publish(self, name: LinesName, id: str) -> None:
        """See HeldJob."""
        await self._files.add(self.owner, self._lines[name], f"{self._id}_{name}.jsonl", "batch_output", id)

    async def clear(self) -> None:
        """See HeldJob: publishing moved them."""

    async def release(self) -> None:
        """See HeldJob."""
        self._jobs.let_go(self._id)


def _append(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())

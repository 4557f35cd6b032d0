"""The states of batches, on disk."""

import logging
from pathlib import Path

import msgspec

from kvasir_engine.api.batch.folder import BatchFolder, BatchLimits, drop_half_line, write_whole
from kvasir_engine.api.batch.schemas import ENDED, Batch, OwnedBatch
from kvasir_engine.api.errors import ApiError, bad_request

log = logging.getLogger("api")


class JobStore:
    """A batch is `ID.json`, and while it runs `ID.output` and `ID.errors`, to which lines are added."""

    def __init__(self, folder: BatchFolder, limits: BatchLimits) -> None:
        self._path = folder.batches
        self._limits = limits
        self._jobs: dict[str, OwnedBatch] = {}
        for path in sorted(self._path.glob("*.json")):
            try:
                owned = msgspec.json.decode(path.read_bytes(), type=OwnedBatch)
            except (OSError, msgspec.DecodeError) as error:
                log.error("a batch cannot be read path=%s reason=%r", path, str(error))
                continue
            self._jobs[owned.batch.id] = owned
            for each in (self.output(owned.batch.id), self.errors(owned.batch.id)):
                drop_half_line(each)

    def output(self, id: str) -> Path:
        return self._path / f"{id}.output"

    def errors(self, id: str) -> Path:
        return self._path / f"{id}.errors"

    def of(self, owner: str) -> list[Batch]:
        """A tenant's batches, the newest first."""
        mine = [each.batch for each in self._jobs.values() if each.owner == owner]
        return sorted(mine, key=lambda batch: (batch.created_at, batch.id), reverse=True)

    def get(self, owner: str, id: str) -> Batch:
        """One batch. Raises ApiError, 404, for batches of other tenants too."""
        owned = self._jobs.get(id)
        if owned is None or owned.owner != owner:
            raise ApiError(404, f"No batch found with id '{id[:100]}'.", param="id", code="not_found")
        return owned.batch

    def unfinished(self) -> list[OwnedBatch]:
        """The batches that have not ended, the oldest first."""
        left = [each for each in self._jobs.values() if each.batch.status not in ENDED]
        return sorted(left, key=lambda each: (each.batch.created_at, each.batch.id))

    def using(self, file_id: str) -> Batch | None:
        """A batch that still reads this file, or None."""
        found = (each.batch for each in self.unfinished() if each.batch.input_file_id == file_id)
        return next(found, None)

    def check_room(self, owner: str) -> None:
        """At a tenant's limit, forget its oldest ended batch. Raises ApiError where none has ended."""
        mine = self.of(owner)
        if len(mine) < self._limits.batches:
            return
        ended = [batch for batch in mine if batch.status in ENDED]
        if not ended:
            raise bad_request(f"You have {self._limits.batches} batches that have not ended.")
        (self._path / f"{ended[-1].id}.json").unlink(missing_ok=True)
        self._jobs.pop(ended[-1].id, None)

    def save(self, owner: str, batch: Batch) -> None:
        """Write a batch's state. Raises OSError."""
        owned = OwnedBatch(owner, batch)
        write_whole(self._path / f"{batch.id}.json", msgspec.json.encode(owned))
        self._jobs[batch.id] = owned

    def note(self, owner: str, batch: Batch) -> None:
        """Update a batch's state in memory only: the lines on disk have what is new."""
        self._jobs[batch.id] = OwnedBatch(owner, batch)

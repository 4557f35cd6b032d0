"""Files of clients, and output of batches, on disk."""

import logging
import secrets
import time
from pathlib import Path

import msgspec

from kvasir_engine.api.batch.folder import BatchFolder, BatchLimits, move_whole, write_whole
from kvasir_engine.api.batch.schemas import FileObject, OwnedFile
from kvasir_engine.api.errors import ApiError, bad_request

log = logging.getLogger("api")


class FileStore:
    """A file is its content, `ID.data`, and then `ID.json`; without the second the file does not exist."""

    def __init__(self, folder: BatchFolder, limits: BatchLimits) -> None:
        self._path = folder.files
        self._limits = limits
        self._files: dict[str, OwnedFile] = {}
        for path in sorted(self._path.glob("*.json")):
            try:
                owned = msgspec.json.decode(path.read_bytes(), type=OwnedFile)
            except (OSError, msgspec.DecodeError) as error:
                log.error("a file cannot be read path=%s reason=%r", path, str(error))
                continue
            self._files[owned.file.id] = owned
        for path in self._path.glob("*.data"):
            if not path.with_suffix(".json").exists():
                path.unlink()

    @property
    def folder(self) -> Path:
        return self._path

    def data(self, id: str) -> Path:
        return self._path / f"{id}.data"

    def of(self, owner: str) -> list[FileObject]:
        """A tenant's files, the oldest first."""
        mine = [each.file for each in self._files.values() if each.owner == owner]
        return sorted(mine, key=lambda file: (file.created_at, file.id))

    def get(self, owner: str, id: str) -> FileObject:
        """One file. Raises ApiError, 404, for files of other tenants too."""
        owned = self._files.get(id)
        if owned is None or owned.owner != owner:
            raise ApiError(404, f"No such File object: {id[:100]}", param="id", code="not_found")
        return owned.file

    def check_room(self, owner: str) -> None:
        """Raise ApiError where the tenant has reached its limit of files."""
        mine = self.of(owner)
        if len(mine) >= self._limits.files:
            raise bad_request(f"You have {self._limits.files} files, which is the limit: delete some.", "file")
        if sum(file.bytes for file in mine) >= self._limits.tenant_bytes:
            raise bad_request("Your files have reached the limit of their total size: delete some.", "file")

    def add(self, owner: str, written: Path, filename: str, purpose: str, id: str = "") -> FileObject:
        """Add a written file, which is in this folder or its neighbour. Idempotent for one `id`. Raises OSError."""
        id = id or f"file-{secrets.token_hex(12)}"
        if written.exists():
            move_whole(written, self.data(id))
        size = self.data(id).stat().st_size
        file = FileObject(id=id, bytes=size, created_at=int(time.time()), filename=filename, purpose=purpose)
        owned = OwnedFile(owner, file)
        write_whole(self._path / f"{id}.json", msgspec.json.encode(owned))
        self._files[id] = owned
        return file

    def delete(self, id: str) -> None:
        """Raises OSError."""
        (self._path / f"{id}.json").unlink(missing_ok=True)
        self.data(id).unlink(missing_ok=True)
        self._files.pop(id, None)

"""Files of clients, and output of batches, on disk."""

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import BinaryIO

import msgspec

from kvasir_engine.api.batch.folder import BatchFolder, BatchLimits, move_whole, partial, write_whole
from kvasir_engine.api.batch.schemas import FileObject, OwnedFile
from kvasir_engine.api.batch.stores import no_file
from kvasir_engine.api.errors import bad_request

log = logging.getLogger("api")


def check_files_room(mine: list[FileObject], limits: BatchLimits) -> None:
    """Raise ApiError where a tenant with these files has reached its limit."""
    if len(mine) >= limits.files:
        raise bad_request(f"You have {limits.files} files, which is the limit: delete some.", "file")
    if sum(file.bytes for file in mine) >= limits.tenant_bytes:
        raise bad_request("Your files have reached the limit of their total size: delete some.", "file")


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

    def new_path(self) -> Path:
        """See Files."""
        return partial(self._path)

    def data(self, id: str) -> Path:
        return self._path / f"{id}.data"

    async def of(self, owner: str) -> list[FileObject]:
        """See Files."""
        mine = [each.file for each in self._files.values() if each.owner == owner]
        return sorted(mine, key=lambda file: (file.created_at, file.id))

    async def get(self, owner: str, id: str) -> FileObject:
        """See Files."""
        owned = self._files.get(id)
        if owned is None or owned.owner != owner:
            raise no_file(id)
        return owned.file

    async def check_room(self, owner: str) -> None:
        """See Files."""
        check_files_room(await self.of(owner), self._limits)

    async def add(self, owner: str, written: Path, filename: str, purpose: str, id: str = "") -> FileObject:
        """See Files. `written` is in this folder or its neighbour. Idempotent for one `id`."""
        return await asyncio.to_thread(
            self._add, owner, written, filename, purpose, id or f"file-{secrets.token_hex(12)}"
        )

    def _add(self, owner: str, written: Path, filename: str, purpose: str, id: str) -> FileObject:
        if written.exists():
            move_whole(written, self.data(id))
        size = self.data(id).stat().st_size
        file = FileObject(id=id, bytes=size, created_at=int(time.time()), filename=filename, purpose=purpose)
        owned = OwnedFile(owner, file)
        write_whole(self._path / f"{id}.json", msgspec.json.encode(owned))
        self._files[id] = owned
        return file

    async def content(self, owner: str, file: FileObject) -> AsyncIterator[bytes]:
        """See Files. The file may be deleted while it is sent."""
        return _parts(self.data(file.id).open("rb"))

    async def delete(self, owner: str, id: str) -> None:
        """See Files."""
        (self._path / f"{id}.json").unlink(missing_ok=True)
        self.data(id).unlink(missing_ok=True)
        self._files.pop(id, None)


async def _parts(opened: BinaryIO) -> AsyncIterator[bytes]:
    with opened:
        while part := await asyncio.to_thread(opened.read, 2**18):
            yield part

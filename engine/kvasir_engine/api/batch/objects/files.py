"""Files of clients, and output of batches, in an object store."""

import asyncio
import logging
import re
import secrets
import time
from collections.abc import AsyncIterator
from datetime import datetime
from pathlib import Path

import msgspec

from kvasir_engine.api.batch.file_store import check_files_room
from kvasir_engine.api.batch.folder import BatchLimits
from kvasir_engine.api.batch.objects.bucket import Bucket
from kvasir_engine.api.batch.objects.records import folder_of, in_turn
from kvasir_engine.api.batch.schemas import FileObject, OwnedFile
from kvasir_engine.api.batch.stores import no_file

log = logging.getLogger("api")

_ID = re.compile(r"file-[0-9a-f]{24}")


class ObjectFiles:
    """See Files. A file is `files/TENANT/ID.data` and then `ID.json`, which never change."""

    def __init__(self, bucket: Bucket, spool: Path, limits: BatchLimits) -> None:
        self._bucket = bucket
        self._spool = spool
        self._limits = limits
        self._known: dict[str, FileObject] = {}

    def new_path(self) -> Path:
        """See Files."""
        return self._spool / secrets.token_hex(8)

    def data(self, owner: str, id: str) -> str:
        """The key of the content."""
        return f"files/{folder_of(owner)}/{id}.data"

    async def of(self, owner: str) -> list[FileObject]:
        """See Files."""
        keys = [each.key for each in await self._bucket.listed(f"files/{folder_of(owner)}/")]
        ids = [key.rpartition("/")[2].removesuffix(".json") for key in keys if key.endswith(".json")]
        found = await in_turn([self._read(owner, id) for id in ids])
        return sorted((file for file in found if file), key=lambda file: (file.created_at, file.id))

    async def _read(self, owner: str, id: str) -> FileObject | None:
        if id not in self._known:
            try:
                data, _ = await self._bucket.read(f"files/{folder_of(owner)}/{id}.json")
            except FileNotFoundError:
                return None
            try:
                self._known[id] = msgspec.json.decode(data, type=OwnedFile).file
            except msgspec.DecodeError as error:
                log.error("a file cannot be read id=%s reason=%r", id, str(error))
                return None
        return self._known[id]

    async def get(self, owner: str, id: str) -> FileObject:
        """See Files."""
        self._known.pop(id, None)  # another process may have deleted it
        file = await self._read(owner, id) if _ID.fullmatch(id) else None
        if file is None:
            raise no_file(id)
        return file

    async def check_room(self, owner: str) -> None:
        """See Files."""
        check_files_room(await self.of(owner), self._limits)

    async def add(self, owner: str, written: Path, filename: str, purpose: str, id: str = "") -> FileObject:
        """See Files. Idempotent for one `id`."""
        id = id or f"file-{secrets.token_hex(12)}"
        size = (await asyncio.to_thread(written.stat)).st_size
        await self._bucket.upload(self.data(owner, id), written)
        file = FileObject(id=id, bytes=size, created_at=int(time.time()), filename=filename, purpose=purpose)
        record = msgspec.json.encode(OwnedFile(owner, file))
        await self._bucket.write(f"files/{folder_of(owner)}/{id}.json", record)
        return file

    async def content(self, owner: str, file: FileObject) -> AsyncIterator[bytes]:
        """See Files."""
        try:
            return await self._bucket.pieces(self.data(owner, file.id))
        except FileNotFoundError:
            raise no_file(file.id) from None

    async def delete(self, owner: str, id: str) -> None:
        """See Files."""
        await self._bucket.delete([f"files/{folder_of(owner)}/{id}.json"])
        await self._bucket.delete([self.data(owner, id)])
        self._known.pop(id, None)

    async def tidy(self, before: datetime) -> None:
        """Remove older contents whose sender never finished."""
        entries = await self._bucket.listed("files/")
        whole = {each.key.removesuffix(".json") for each in entries}
        left = [
            each.key
            for each in entries
            if each.key.endswith(".data") and each.modified < before and each.key.removesuffix(".data") not in whole
        ]
        if left:
            await self._bucket.delete(left)

"""The states of batches in an object store, which several processes share: each batch is run by one of them."""

import logging
import os
import re
import secrets
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime

import msgspec

from kvasir_engine.api.batch.folder import BatchLimits
from kvasir_engine.api.batch.job_store import oldest_ended
from kvasir_engine.api.batch.objects.bucket import Bucket, ObjectVersion, Taken
from kvasir_engine.api.batch.objects.files import ObjectFiles
from kvasir_engine.api.batch.objects.held_job import HeldObjectJob
from kvasir_engine.api.batch.objects.records import BEAT_SECONDS, CLAIM_SECONDS, StoredJob, folder_of, in_turn
from kvasir_engine.api.batch.schemas import ENDED, Batch, OwnedBatch
from kvasir_engine.api.batch.stores import Change, StoreError, by_age, no_batch

log = logging.getLogger("api")

_TRIES = 10
_ID = re.compile(r"batch_[0-9a-f]{24}")


class ObjectJobs:
    """See Jobs. A batch is `jobs/TENANT/ID.json`, which is only replaced by those who know its present version."""

    poll_seconds = BEAT_SECONDS

    def __init__(
        self,
        bucket: Bucket,
        files: ObjectFiles,
        limits: BatchLimits,
        clock: Callable[[], float] = time.monotonic,
        linger: float = 0.5,
    ) -> None:
        self._bucket = bucket
        self._files = files
        self._limits = limits
        self._clock = clock
        self._linger = linger
        self.name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(8)}"
        self._known: dict[str, tuple[str | None, StoredJob | None]] = {}
        self._seen: dict[str, tuple[tuple[str, int], float]] = {}
        self._held: dict[str, HeldObjectJob] = {}

    async def read(self, owner: str, id: str) -> tuple[StoredJob, ObjectVersion]:
        """The record as it is now. Raises FileNotFoundError."""
        key = _key(owner, id)
        data, version = await self._bucket.read(key)
        try:
            return msgspec.json.decode(data, type=StoredJob), version
        except msgspec.DecodeError as error:
            raise StoreError("the batch's record cannot be read", f"{key}: {error}") from error

    async def replace(self, record: StoredJob, version: ObjectVersion) -> ObjectVersion:
        """Write the next record. Raises Taken where that version is no longer the newest."""
        key = _key(record.owner, record.batch.id)
        return await self._bucket.replace(key, msgspec.json.encode(record), version)

    async def _all(self, prefix: str) -> list[StoredJob]:
        """The records below; what has not changed is not read again."""
        entries = await self._bucket.listed(prefix)
        present = {each.key for each in entries}
        for key in [key for key in self._known if key.startswith(prefix) and key not in present]:
            del self._known[key]
        changed = [each.key for each in entries if self._known.get(each.key, (None,))[0] != each.e_tag]
        await in_turn([self._refresh(key) for key in changed])
        found = (self._known.get(each.key, (None, None))[1] for each in entries)
        return [record for record in found if record is not None]

    async def _refresh(self, key: str) -> None:
        try:
            data, version = await self._bucket.read(key)
        except FileNotFoundError:
            self._known.pop(key, None)
            return
        try:
            self._known[key] = version.e_tag, msgspec.json.decode(data, type=StoredJob)
        except msgspec.DecodeError as error:
            log.error("a batch cannot be read key=%s reason=%r", key, str(error))
            self._known[key] = version.e_tag, None

    async def of(self, owner: str) -> list[Batch]:
        """See Jobs."""
        found = [OwnedBatch(each.owner, each.batch) for each in await self._all(f"jobs/{folder_of(owner)}/")]
        return [each.batch for each in sorted(found, key=by_age, reverse=True)]

    async def get(self, owner: str, id: str) -> Batch:
        """See Jobs."""
        return (await self._existing(owner, id))[0].batch

    async def _existing(self, owner: str, id: str) -> tuple[StoredJob, ObjectVersion]:
        if not _ID.fullmatch(id):
            raise no_batch(id)
        try:
            return await self.read(owner, id)
        except FileNotFoundError:
            raise no_batch(id) from None

    async def using(self, owner: str, file_id: str) -> Batch | None:
        """See Jobs."""
        found = (each for each in await self.of(owner) if each.input_file_id == file_id)
        return next((each for each in found if each.status not in ENDED), None)

    async def check_room(self, owner: str) -> None:
        """See Jobs."""
        dropped = oldest_ended(await self.of(owner), self._limits)
        if dropped is not None:
            await self._bucket.delete([_key(owner, dropped.id)])

    async def create(self, owner: str, batch: Batch) -> None:
        """See Jobs."""
        record = msgspec.json.encode(StoredJob(owner, batch))
        with suppress(Taken):  # by this write, whose answer was lost: nobody else knows the id
            await self._bucket.create(_key(owner, batch.id), record)

    async def change(self, owner: str, id: str, change: Change) -> Batch:
        """See Jobs."""
        for _ in range(_TRIES):
            record, version = await self._existing(owner, id)
            batch = change(record.batch)
            if batch == record.batch:
                return batch
            try:
                await self.replace(msgspec.structs.replace(record, batch=batch, beat=record.beat + 1), version)
            except Taken:
                continue
            if batch.status == "cancelling" and id in self._held:
                self._held[id].stopped.set()
            return batch
        raise StoreError("a batch changes too often", id)

    async def unfinished(self) -> list[OwnedBatch]:
        """See Jobs."""
        found = [each for each in await self._all("jobs/") if each.batch.status not in ENDED]
        for each in found:
            self._watch(each)
        left = {each.batch.id for each in found}
        for id in [id for id in self._seen if id not in left]:
            del self._seen[id]
        return sorted((OwnedBatch(each.owner, each.batch) for each in found), key=by_age)

    def _watch(self, record: StoredJob) -> bool:
        """Note who runs the batch. True: its holder has been silent for too long, by this process's own clock."""
        state, now = (record.holder, record.beat), self._clock()
        seen, since = self._seen.get(record.batch.id, (None, now))
        if seen != state:
            since = now
        self._seen[record.batch.id] = state, since
        return now - since >= CLAIM_SECONDS

    async def claim(self, owned: OwnedBatch) -> HeldObjectJob | None:
        """See Jobs."""
        id = owned.batch.id
        try:
            record, version = await self.read(owned.owner, id)
        except FileNotFoundError:
            return None
        free = record.holder in ("", self.name)
        if record.batch.status in ENDED or not (free or self._watch(record)):
            return None
        record = msgspec.structs.replace(record, holder=self.name, beat=record.beat + 1)
        try:
            version = await self.replace(record, version)
        except Taken:
            return None
        held = HeldObjectJob(self, self._bucket, self._files, record, version, self._linger)
        self._held[id] = held
        return held

    def let_go(self, id: str) -> None:
        self._held.pop(id, None)

    async def tidy(self, before: datetime) -> None:
        """Remove older lines of batches that have ended or are forgotten."""
        left = {each.batch.id for each in await self._all("jobs/") if each.batch.status not in ENDED}
        lines = [each for each in await self._bucket.listed("lines/") if each.modified < before]
        if old := [each.key for each in lines if each.key.split("/")[-2] not in left]:
            await self._bucket.delete(old)


def _key(owner: str, id: str) -> str:
    return f"jobs/{folder_of(owner)}/{id}.json"

"""A batch that this process runs, in an object store."""

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Protocol

import msgspec

from kvasir_engine.api.batch.input_lines import custom_ids
from kvasir_engine.api.batch.job_store import counted
from kvasir_engine.api.batch.objects.bucket import Bucket, ObjectVersion, Taken
from kvasir_engine.api.batch.objects.files import ObjectFiles
from kvasir_engine.api.batch.objects.records import BEAT_SECONDS, LinesPart, StoredJob, folder_of
from kvasir_engine.api.batch.schemas import ENDED, Batch
from kvasir_engine.api.batch.stores import Change, ClaimLost, Gone, LinesName, StoreError, input_gone
from kvasir_engine.api.errors import ApiError

log = logging.getLogger("api")

PART_BYTES = 2**20
_TRIES = 10
_RELEASE_SECONDS = 10.0


class JobRecords(Protocol):
    """The records of batches, each in its newest version."""

    async def read(self, owner: str, id: str) -> tuple[StoredJob, ObjectVersion]: ...

    async def replace(self, record: StoredJob, version: ObjectVersion) -> ObjectVersion: ...

    def let_go(self, id: str) -> None: ...


class _Lines:
    """Lines in objects, the last of which grows. A part counts when the batch's record says so."""

    def __init__(self, bucket: Bucket, prefix: str, parts: tuple[LinesPart, ...]) -> None:
        self.parts = parts
        self._bucket = bucket
        self._prefix = prefix
        self._made = 0
        self._growing = b""

    async def add(self, lines: Sequence[bytes]) -> tuple[LinesPart, ...]:
        """Write lines behind the others. The parts are the record's once it has them."""
        whole = not self._growing or len(self._growing) >= PART_BYTES
        data = b"".join(lines) if whole else self._growing + b"".join(lines)
        number = self._made + whole
        part = LinesPart(f"{self._prefix}-{number:05}", len(data))
        await self._bucket.write(part.key, data)
        self._made, self._growing = number, data
        return (*(self.parts if whole else self.parts[:-1]), part)

    async def each(self) -> AsyncIterator[bytes]:
        """The contents of the parts."""
        for part in self.parts:
            try:
                data, _ = await self._bucket.read(part.key)
            except FileNotFoundError as error:
                raise Gone("answers_not_found", "Answers of this batch are gone from the object store.") from error
            yield data[: part.bytes]


class HeldObjectJob:
    """See HeldJob. Whoever lost the batch cannot change its record any more, and what it writes does not count."""

    def __init__(
        self,
        jobs: JobRecords,
        bucket: Bucket,
        files: ObjectFiles,
        record: StoredJob,
        version: ObjectVersion,
        linger: float,
    ) -> None:
        self.owner = record.owner
        self.linger = linger
        self.stopped = asyncio.Event()
        self._jobs = jobs
        self._bucket = bucket
        self._files = files
        self._record = record
        self._version = version
        self._changing = asyncio.Lock()
        self._lost = False
        self._folder = f"lines/{folder_of(record.owner)}/{record.batch.id}/"
        own = secrets.token_hex(8)
        self._lines: dict[LinesName, _Lines] = {
            "output": _Lines(bucket, f"{self._folder}output-{own}", record.output),
            "errors": _Lines(bucket, f"{self._folder}errors-{own}", record.errors),
        }
        self._heed()

    @property
    def batch(self) -> Batch:
        """See HeldJob."""
        return self._record.batch

    def _heed(self) -> None:
        if self._lost or self._record.batch.status == "cancelling":
            self.stopped.set()

    async def _change(self, change: Callable[[StoredJob], StoredJob]) -> None:
        async with self._changing:
            for _ in range(_TRIES):
                if self._lost:
                    raise ClaimLost
                wanted = msgspec.structs.replace(change(self._record), beat=self._record.beat + 1)
                try:
                    self._version = await self._jobs.replace(wanted, self._version)
                except Taken:
                    await self._catch_up()  # by this write, perhaps, whose answer was lost
                    continue
                self._record = wanted
                self._heed()
                return
        raise StoreError("a batch changes too often", self.batch.id)

    async def _catch_up(self) -> None:
        """Read what another process wrote. Raises ClaimLost."""
        try:
            record, version = await self._jobs.read(self.owner, self.batch.id)
        except FileNotFoundError:
            self._lost = True
        else:
            self._lost = record.holder != self._record.holder
            if not self._lost:
                self._record, self._version = record, version
        self._heed()
        if self._lost:
            raise ClaimLost

    async def keep(self) -> None:
        """See HeldJob."""
        while True:
            await asyncio.sleep(BEAT_SECONDS)
            try:
                await self.beat()
            except ClaimLost:
                return
            except OSError as error:
                log.warning("a batch's claim is not renewed id=%s reason=%r", self.batch.id, str(error))
            except Exception:  # a task that ended here would let the claim run out unseen
                log.exception("a batch's claim is not renewed id=%s", self.batch.id)

    async def beat(self) -> None:
        """Say that the batch is still run, and hear whether it was cancelled. Raises OSError, ClaimLost."""
        await self._change(lambda record: record)

    async def update(self, change: Change) -> Batch:
        """See HeldJob."""
        await self._change(lambda record: msgspec.structs.replace(record, batch=change(record.batch)))
        return self.batch

    async def answered(self) -> tuple[set[str], set[str]]:
        """See HeldJob."""
        found: list[set[str]] = []
        for name in ("output", "errors"):
            ids: set[str] = set()
            async for data in self._lines[name].each():
                ids |= await asyncio.to_thread(custom_ids, data)
            found.append(ids)
        return found[0], found[1]

    async def append(self, answers: Sequence[bytes], failures: Sequence[bytes]) -> None:
        """See HeldJob."""
        output, errors = self._lines["output"], self._lines["errors"]
        if answers:
            output.parts = await output.add(answers)
        if failures:
            errors.parts = await errors.add(failures)
        counts = self.batch.request_counts
        completed, failed = counts.completed + len(answers), counts.failed + len(failures)

        def added(record: StoredJob) -> StoredJob:
            batch = counted(record.batch, completed, failed)
            return msgspec.structs.replace(record, batch=batch, output=output.parts, errors=errors.parts)

        await self._change(added)

    async def written(self, name: LinesName) -> bool:
        """See HeldJob."""
        return bool(self._lines[name].parts)

    @asynccontextmanager
    async def input(self) -> AsyncIterator[Path]:
        """See HeldJob."""
        path = self._files.new_path()
        try:
            try:
                await self._bucket.download(self._files.data(self.owner, self.batch.input_file_id), path)
            except FileNotFoundError:
                raise input_gone() from None
            yield path
        finally:
            path.unlink(missing_ok=True)

    async def publish(self, name: LinesName, id: str) -> None:
        """See HeldJob."""
        try:
            await self._files.get(self.owner, id)
            return
        except ApiError:
            path = self._files.new_path()
        try:
            with path.open("xb") as file:
                async for data in self._lines[name].each():
                    await asyncio.to_thread(file.write, data)
            await self._files.add(self.owner, path, f"{self.batch.id}_{name}.jsonl", "batch_output", id)
        finally:
            path.unlink(missing_ok=True)

    async def clear(self) -> None:
        """See HeldJob."""
        if keys := [each.key for each in await self._bucket.listed(self._folder)]:
            await self._bucket.delete(keys)

    async def release(self) -> None:
        """See HeldJob."""
        self._jobs.let_go(self.batch.id)
        if self._lost or self.batch.status in ENDED:
            return
        try:
            async with asyncio.timeout(_RELEASE_SECONDS):
                await self._change(lambda record: msgspec.structs.replace(record, holder=""))
        except (OSError, ClaimLost) as error:
            log.warning(
                "a batch was not let go of: it is free in a while id=%s reason=%r", self.batch.id, str(error)
            )

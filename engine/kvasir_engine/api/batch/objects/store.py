"""Files and batches in an object store, which any number of processes share."""

import secrets
import tempfile
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

from kvasir_engine.api.batch.folder import BatchLimits
from kvasir_engine.api.batch.objects.bucket import Bucket, Taken
from kvasir_engine.api.batch.objects.files import ObjectFiles
from kvasir_engine.api.batch.objects.jobs import ObjectJobs
from kvasir_engine.api.batch.stores import StoreError
from kvasir_engine.errors import UserError

_OLD = timedelta(days=1)


class ObjectStore:
    """See BatchStore. Files on their way are kept in a temporary folder of this machine."""

    failing = "object_store", "object store"

    def __init__(self, bucket: Bucket, limits: BatchLimits | None = None, linger: float = 0.5) -> None:
        limits = limits or BatchLimits()
        self._bucket = bucket
        self._spool = tempfile.TemporaryDirectory(prefix="kvasir-batches-", ignore_cleanup_errors=True)
        self.files = ObjectFiles(bucket, Path(self._spool.name), limits)
        self.jobs = ObjectJobs(bucket, self.files, limits, linger=linger)

    async def tidy(self) -> None:
        """See BatchStore."""
        before = datetime.now(UTC) - _OLD
        await self.files.tidy(before)
        await self.jobs.tidy(before)
        probes = [each.key for each in await self._bucket.listed("probe/") if each.modified < before]
        if probes:
            await self._bucket.delete(probes)

    def close(self) -> None:
        """Remove the temporary folder."""
        self._spool.cleanup()


async def check_bucket(bucket: Bucket) -> None:
    """Raise UserError where the bucket cannot be read, written, listed and deleted from, or takes a write that is
    conditional on a version as any other."""
    key = f"probe/{secrets.token_hex(8)}"
    where = f"batch-dir {bucket.address}"
    try:
        await _try_conditions(bucket, key, where)
        found = [each.key for each in await bucket.listed("probe/")]
        await bucket.read(key)
        await bucket.delete([key])
    except (StoreError, FileNotFoundError) as error:
        reason = str(error) if isinstance(error, StoreError) else "what was written is not there"
        raise UserError(f"{where}: {reason.replace(f': {bucket.address}', '')}") from error
    if key not in found:
        raise UserError(f"{where}: what was written is not listed")


async def _try_conditions(bucket: Bucket, key: str, where: str) -> None:
    lacking = UserError(f"{where}: this object store has no conditional writes (If-Match, If-None-Match)")
    first = await bucket.create(key, b"1")
    second = await bucket.replace(key, b"2", first)
    if not (second.e_tag or second.version):
        raise lacking
    for again in (bucket.create, partial(bucket.replace, version=first)):
        try:
            await again(key, b"3")
        except Taken:
            continue
        raise lacking


async def open_store(address: str) -> ObjectStore:
    """The store at an address such as s3://bucket/prefix, once it has been tried. Raises UserError."""
    try:
        bucket = Bucket(address)
    except ValueError as error:
        raise UserError(f"batch-dir {address}: {error}") from error
    await check_bucket(bucket)
    return ObjectStore(bucket)

"""A bucket of an object store, through obstore: each call is bounded in time and tells its failures alike."""

import asyncio
import errno
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)
from obstore.store import from_url

from kvasir_engine.api.batch.stores import StoreError

PIECE = 2**18
_CLIENT = {"connect_timeout": "5s", "read_timeout": "20s", "timeout": "3600s", "allow_http": True}
_RETRIES = {"max_retries": 3, "retry_timeout": timedelta(seconds=20)}
_CODE = re.compile(r"<Code>([^<]{1,80})</Code>")
_DENIED = ("AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken")
_NO_BUCKET = ("NoSuchBucket", "specified bucket does not exist", "ContainerNotFound")
_NO_CREDENTIALS = ("169.254.169.254", "metadata.google.internal")


class Taken(Exception):
    """The object is there already, or is no longer the version that was to be replaced."""


@dataclass(frozen=True)
class ObjectVersion:
    """What is replaced only if it is still there."""

    e_tag: str | None
    version: str | None

    @property
    def mode(self) -> "obstore.UpdateVersion":
        mode: obstore.UpdateVersion = {}
        if self.e_tag is not None:
            mode["e_tag"] = self.e_tag
        if self.version is not None:
            mode["version"] = self.version
        return mode


@dataclass(frozen=True)
class ListedObject:
    """An object in a list."""

    key: str
    e_tag: str | None
    modified: datetime


def _why(error: Exception) -> str:
    """What failed, in a few words that name no address."""
    text = str(error)
    if any(each in text for each in _NO_BUCKET):
        return "the bucket does not exist"
    code = _CODE.search(text)
    denied = isinstance(error, (PermissionDeniedError, UnauthenticatedError))
    if denied or (code and code[1] in _DENIED):
        return "access is denied" + (f" ({code[1]})" if code else "")
    if any(each in text for each in _NO_CREDENTIALS):
        return "no credentials are found"
    if "error sending request" in text or "HTTP error" in text:
        return "it cannot be reached"
    return f"it answered {code[1]}" if code else "it failed"


class Bucket:
    """The objects under an address such as s3://bucket/prefix. All methods raise StoreError."""

    def __init__(self, address: str, seconds: float = 60.0, long_seconds: float = 3600.0) -> None:
        """`seconds`: of a call; `long_seconds`: of one that moves a file. Raises ValueError."""
        self.address = address
        self._seconds = seconds
        self._long = long_seconds
        try:
            self._store = from_url(address, client_options=_CLIENT, retry_config=_RETRIES)  # type: ignore[call-overload]
        except (BaseError, ValueError) as error:
            raise ValueError(_first_line(error)) from error

    @asynccontextmanager
    async def _told(self, seconds: float, reading: str = "") -> AsyncIterator[None]:
        """`reading`: the key of an object that may be missing."""
        try:
            async with asyncio.timeout(seconds):
                yield
        except (AlreadyExistsError, PreconditionError) as error:
            raise Taken from error
        except TimeoutError as error:
            raise StoreError(f"no answer in {seconds:g} s", self.address) from error
        except FileNotFoundError as error:
            if reading and not any(each in str(error) for each in _NO_BUCKET):
                raise FileNotFoundError(errno.ENOENT, "there is no such object", reading) from error
            raise StoreError(_why(error), f"{self.address}: {_first_line(error)}") from error
        except BaseError as error:
            raise StoreError(_why(error), f"{self.address}: {_first_line(error)}") from error

    async def read(self, key: str) -> tuple[bytes, ObjectVersion]:
        """Raises FileNotFoundError."""
        async with self._told(self._seconds, key):
            found = await obstore.get_async(self._store, key)
            return bytes(await found.bytes_async()), ObjectVersion(found.meta["e_tag"], found.meta["version"])

    async def create(self, key: str, data: bytes) -> ObjectVersion:
        """Raises Taken."""
        async with self._told(self._seconds):
            made = await obstore.put_async(self._store, key, data, mode="create")
            return ObjectVersion(made["e_tag"], made["version"])

    async def replace(self, key: str, data: bytes, version: ObjectVersion) -> ObjectVersion:
        """Raises Taken."""
        async with self._told(self._seconds):
            try:
                made = await obstore.put_async(self._store, key, data, mode=version.mode)
            except FileNotFoundError as error:
                if any(each in str(error) for each in _NO_BUCKET):
                    raise
                raise Taken from error
            return ObjectVersion(made["e_tag"], made["version"])

    async def write(self, key: str, data: bytes) -> None:
        async with self._told(self._seconds):
            await obstore.put_async(self._store, key, data, use_multipart=False)

    async def upload(self, key: str, path: Path) -> None:
        """Make an object of a file."""
        async with self._told(self._long):
            await obstore.put_async(self._store, key, path, max_concurrency=4)

    async def download(self, key: str, path: Path) -> None:
        """Make a file of an object. Raises FileNotFoundError."""
        async with self._told(self._long, key):
            found = await obstore.get_async(self._store, key)
            with path.open("xb") as file:
                async for piece in found.stream(min_chunk_size=PIECE):
                    await asyncio.to_thread(file.write, piece)

    async def pieces(self, key: str) -> AsyncIterator[bytes]:
        """The object's bytes, once it has been found. Raises FileNotFoundError."""
        async with self._told(self._seconds, key):
            found = await obstore.get_async(self._store, key)

        async def parts() -> AsyncIterator[bytes]:
            stream = aiter(found.stream(min_chunk_size=PIECE))
            while True:
                async with self._told(self._seconds):
                    piece = await anext(stream, None)
                if piece is None:
                    return
                yield bytes(piece)

        return parts()

    async def listed(self, prefix: str) -> list[ListedObject]:
        """The objects below, by name."""
        found: list[ListedObject] = []
        stream = aiter(obstore.list(self._store, prefix, chunk_size=1000))
        while True:
            async with self._told(self._seconds):
                some = await anext(stream, None)
            if some is None:
                return found
            found += [ListedObject(each["path"], each["e_tag"], each["last_modified"]) for each in some]

    async def delete(self, keys: Sequence[str]) -> None:
        """Idempotent."""
        async with self._told(self._seconds):
            try:
                await obstore.delete_async(self._store, list(keys))
            except FileNotFoundError as error:
                if any(each in str(error) for each in _NO_BUCKET):
                    raise


def _first_line(error: Exception) -> str:
    return str(error).partition("\n\nDebug source")[0].replace("\n", " ")[:500]

"""What an object store has of a batch: all that changes is in one object, so that each change is atomic."""

import asyncio
import re
from collections.abc import Awaitable, Sequence
from typing import TypeVar

import msgspec

from kvasir_engine.api.batch.schemas import Batch

T = TypeVar("T")
CLAIM_SECONDS = 30.0
"""A batch whose record has not changed for so long is no longer run by its holder."""
BEAT_SECONDS = 10.0
_AT_ONCE = 16
_TENANT = re.compile(r"[0-9a-f]+")


class LinesPart(msgspec.Struct, frozen=True):
    """An object with lines, of which the first `bytes` count."""

    key: str
    bytes: int


class StoredJob(msgspec.Struct, frozen=True):
    """A batch, who runs it, and where its lines are. `beat` grows with each change by whoever runs it."""

    owner: str
    batch: Batch
    holder: str = ""
    beat: int = 0
    output: tuple[LinesPart, ...] = ()
    errors: tuple[LinesPart, ...] = ()


def folder_of(owner: str) -> str:
    """A tenant's folder: its salt, or a name that is no salt where there are no keys."""
    assert not owner or _TENANT.fullmatch(owner)
    return owner or "everyone"


async def in_turn(calls: Sequence[Awaitable[T]]) -> list[T]:
    """The results of all, of which some run at a time."""
    slots = asyncio.Semaphore(_AT_ONCE)

    async def one(call: Awaitable[T]) -> T:
        async with slots:
            return await call

    return list(await asyncio.gather(*map(one, calls)))

"""A stream's deltas on their way to one that reads them: what has come while it was busy is one delta."""

import asyncio
from collections import deque
from typing import Generic, TypeVar

from kvasir_engine.protocol import Delta

S = TypeVar("S")
T = TypeVar("T")


def joined(first: Delta, second: Delta) -> Delta | None:
    """Both as one; None where the second does not just go on. The first token stays alone: it is timed apart."""
    if first.index == 0:
        return None
    goes_on = second.index == first.index + len(first.tokens)
    if first.finish or first.failure or second.failure or not goes_on:
        return None
    if not first.tokens or not second.tokens:
        return None
    logprobs = None
    if first.logprobs is not None or second.logprobs is not None:
        logprobs = [*(first.logprobs or []), *(second.logprobs or [])]
        if len(first.logprobs or []) != len(first.tokens) or len(second.logprobs or []) != len(second.tokens):
            return None
    return Delta(
        first.id,
        first.index,
        [*first.tokens, *second.tokens],
        logprobs,
        second.finish,
        cached=max(first.cached, second.cached),
    )


class DeltaInbox(Generic[S, T]):
    """Items with where each came from. Deltas of one source that follow one another are taken together.

    A client that reads slowly so gets fewer and longer events; one that keeps up gets each as it comes.
    """

    def __init__(self) -> None:
        self._items: deque[tuple[S, T | Delta]] = deque()
        self._some = asyncio.Event()

    def put(self, source: S, item: T | Delta) -> None:
        self._items.append((source, item))
        self._some.set()

    async def get(self) -> tuple[S, T | Delta]:
        """The next item, with those that can be joined to it. For one reader."""
        while not self._items:
            self._some.clear()
            await self._some.wait()
        source, item = self._items.popleft()
        while self._items and isinstance(item, Delta):
            another, following = self._items[0]
            both = joined(item, following) if another is source and isinstance(following, Delta) else None
            if both is None:
                break
            item = both
            self._items.popleft()
        return source, item

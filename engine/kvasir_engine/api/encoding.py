"""Tokenizes a text off the event loop, in bounded pieces, and only as long as its client stays."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import TypeVar

from kvasir_engine.api.special_tokens import Segment
from kvasir_engine.api.text_splitting import PIECE, end_of_piece

R = TypeVar("R")


class Encoding:
    """The tokens of `segments`; each `step` adds more. `divisible`: the texts may be cut."""

    def __init__(self, segments: Sequence[Segment], encode: Callable[[str], list[int]], divisible: bool) -> None:
        self.tokens: list[int] = []
        self._segments = list(reversed(segments))
        self._encode = encode
        self._divisible = divisible
        self._at = 0

    @property
    def done(self) -> bool:
        """Whether `tokens` is complete."""
        return not self._segments

    def step(self) -> None:
        """Encode the next piece, of at most `text_splitting.MOST_PIECE` characters where texts may be cut."""
        characters = 0
        while self._segments and characters < PIECE:
            segment = self._segments[-1]
            if isinstance(segment, int):
                self.tokens.append(segment)
                self._segments.pop()
                characters += 1
                continue
            end = end_of_piece(segment, self._at, self._encode) if self._divisible else len(segment)
            self.tokens += self._encode(segment[self._at : end])
            characters += end - self._at
            self._at = end
            if end < len(segment):
                return
            self._segments.pop()
            self._at = 0

    def run(self) -> list[int]:
        """All tokens."""
        while not self.done:
            self.step()
        return self.tokens


class TooLong(Exception):
    """A text has more tokens than the limit: at least `tokens`."""

    def __init__(self, tokens: int) -> None:
        super().__init__(tokens)
        self.tokens = tokens


class OffLoop:
    """Runs work on `executor`; at most `long_ones` pieces of long texts at once, so that short
    texts do not wait.
    """

    def __init__(self, executor: Executor, long_ones: int = 1) -> None:
        self._executor = executor
        self._long = asyncio.Semaphore(long_ones)

    async def run(self, work: Callable[[], R]) -> R:
        """What `work` returns. If this is cancelled, work that has not begun never does."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)

    async def run_long(self, work: Callable[[], R]) -> R:
        """The same for work that may take tens of milliseconds."""
        async with self._long:
            return await self.run(work)

    async def tokens(self, begin: Callable[[], Encoding], most: int) -> list[int]:
        """The tokens of the encoding that `begin` makes. Raises TooLong once there are more than `most`."""

        def first() -> Encoding:
            encoding = begin()
            encoding.step()
            return encoding

        encoding = await self.run(first)
        while not encoding.done:
            if len(encoding.tokens) > most:
                raise TooLong(len(encoding.tokens))
            await self.run_long(encoding.step)
        return encoding.tokens

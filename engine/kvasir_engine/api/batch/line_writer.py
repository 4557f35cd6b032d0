"""Writes answers in the order of their arrival."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import msgspec

from kvasir_engine.api.batch.schemas import OutputLine

Write = Callable[[Sequence[bytes], Sequence[bytes]], Awaitable[None]]


class LineWriter:
    """Writes a batch's lines, several at a time. What was put is written even if its request is cancelled."""

    def __init__(self, write: Write, linger: float = 0.0) -> None:
        """`write` gets answers and failures. `linger`: seconds in which lines are collected for it."""
        self._write = write
        self._linger = linger
        self._waiting: asyncio.Queue[tuple[OutputLine, bool]] = asyncio.Queue()
        self._closed = asyncio.Event()
        self._news = asyncio.Event()

    def put(self, line: OutputLine, failed: bool) -> None:
        self._waiting.put_nowait((line, failed))
        self._news.set()

    def close(self) -> None:
        """Accept no more lines; `run` returns when all are written."""
        self._closed.set()
        self._news.set()

    async def run(self) -> None:
        """Write until closed. Raises OSError, and what else `write` does."""
        while True:
            await self._news.wait()
            self._news.clear()
            if self._linger and not self._closed.is_set():
                await self._collect()
            closed = self._closed.is_set()
            lines: tuple[list[bytes], list[bytes]] = [], []
            while not self._waiting.empty():
                line, failed = self._waiting.get_nowait()
                lines[failed].append(msgspec.json.encode(line) + b"\n")
            if lines[0] or lines[1]:
                await self._write(*lines)
            if closed:
                return

    async def _collect(self) -> None:
        try:
            async with asyncio.timeout(self._linger):
                await self._closed.wait()
        except TimeoutError:
            return

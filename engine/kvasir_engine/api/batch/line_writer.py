"""Answers on their way to disk, in the order in which they come."""

import asyncio
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from kvasir_engine.api.batch.schemas import OutputLine


class LineWriter:
    """Adds lines to a batch's files. What was put is written though the asking has been cancelled meanwhile."""

    def __init__(self, output: Path, errors: Path, wrote: Callable[[int, int], None]) -> None:
        """`wrote` hears how many lines are on disk now, those of answers and those of failures."""
        self._paths = (output, errors)
        self._wrote = wrote
        self._waiting: asyncio.Queue[tuple[OutputLine, bool] | None] = asyncio.Queue()

    def put(self, line: OutputLine, failed: bool) -> None:
        self._waiting.put_nowait((line, failed))

    def close(self) -> None:
        """No more lines come: `run` returns when all are written."""
        self._waiting.put_nowait(None)

    async def run(self) -> None:
        """Raises OSError."""
        over = False
        while not over:
            items = [await self._waiting.get()]
            while not self._waiting.empty():
                items.append(self._waiting.get_nowait())
            over = None in items
            lines = [each for each in items if each is not None]
            for path, failed in zip(self._paths, (False, True), strict=True):
                some = [line for line, its in lines if its is failed]
                if some:
                    await asyncio.to_thread(_append, path, some)
                    self._wrote(0 if failed else len(some), len(some) if failed else 0)


def _append(path: Path, lines: Sequence[OutputLine]) -> None:
    with path.open("ab") as file:
        file.write(b"".join(msgspec.json.encode(line) + b"\n" for line in lines))
        file.flush()
        os.fsync(file.fileno())

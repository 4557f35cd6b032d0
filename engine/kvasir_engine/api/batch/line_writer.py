"""Writes answers to disk in the order of their arrival."""

import asyncio
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from kvasir_engine.api.batch.schemas import OutputLine


class LineWriter:
    """Appends lines to a batch's files. Lines that were put are written even if their requests are cancelled."""

    def __init__(self, output: Path, errors: Path, wrote: Callable[[int, int], None]) -> None:
        """`wrote` is called with the numbers of lines on disk: answers and failures."""
        self._paths = (output, errors)
        self._wrote = wrote
        self._waiting: asyncio.Queue[tuple[OutputLine, bool] | None] = asyncio.Queue()

    def put(self, line: OutputLine, failed: bool) -> None:
        self._waiting.put_nowait((line, failed))

    def close(self) -> None:
        """Accept no more lines; `run` returns when all are written."""
        self._waiting.put_nowait(None)

    async def run(self) -> None:
        """Write until closed. Raises OSError."""
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

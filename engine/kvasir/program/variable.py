"""A variable that the model writes: its pieces as they come, and its end. For any thread."""

import concurrent.futures
import threading
from dataclasses import dataclass, field

from kvasir.program.errors import ProgramError


@dataclass(frozen=True)
class Generated:
    """A variable's value, and what it cost. `method` and `scores` belong to a `select`. `seconds` and
    `first_token_seconds` count from the call."""

    text: str
    finish_reason: str = ""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    calls: int = 1
    seconds: float = 0.0
    first_token_seconds: float = 0.0
    method: str = ""
    scores: dict[str, float] = field(default_factory=dict)


class Variable:
    """One thread writes it, any thread reads it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.ended: concurrent.futures.Future[Generated] = concurrent.futures.Future()
        self.pieces: list[str] = []
        self._lock = threading.Lock()
        self._waiting: list[concurrent.futures.Future[None]] = []

    def write(self, piece: str) -> None:
        """Add a piece of text."""
        with self._lock:
            self.pieces.append(piece)
            self._wake()

    def end(self, generated: Generated) -> None:
        """Set the value: the variable is complete."""
        with self._lock:
            if not self.ended.done():
                self.ended.set_result(generated)
            self._wake()

    def fail(self, reason: str) -> None:
        """The variable failed: readers get a ProgramError with `reason`."""
        with self._lock:
            if not self.ended.done():
                self.ended.set_exception(ProgramError(reason))
            self._wake()

    def more_than(self, pieces: int) -> "concurrent.futures.Future[None]":
        """A future that is done when there are more than `pieces` pieces, or the variable has ended."""
        waiting: concurrent.futures.Future[None] = concurrent.futures.Future()
        with self._lock:
            if len(self.pieces) > pieces or self.ended.done():
                waiting.set_result(None)
            else:
                self._waiting.append(waiting)
        return waiting

    def _wake(self) -> None:
        for each in self._waiting:
            each.set_result(None)
        self._waiting.clear()

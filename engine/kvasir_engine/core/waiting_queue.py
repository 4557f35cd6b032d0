"""Sequences that wait for admission, in the order of service."""

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass

from kvasir_engine.core.sequence import Sequence

LEVEL = 1000
"""Places in the queue that one level of priority is worth. So priorities never starve: a thousand later requests
of the next level do not overtake one that waits."""

MOST_LEVELS = 1000
"""Levels beyond this, either way, are no different from it."""


@dataclass(frozen=True)
class QueueLimits:
    """`length`: most sequences that wait; `seconds`: longest that one waits for its first step. 0: no limit."""

    length: int = 0
    seconds: float = 0.0


def place_in_queue(arrival: int, priority: int) -> int:
    """The place of the `arrival`-th request in the queue. Lower is earlier, and each place is unique."""
    return ((arrival + LEVEL * max(-MOST_LEVELS, min(priority, MOST_LEVELS))) << 40) + arrival


class WaitingQueue:
    """A queue ordered by `Sequence.arrival`. Preempted sequences return to their place."""

    def __init__(self) -> None:
        self._sequences: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences)

    def __contains__(self, sequence: Sequence) -> bool:
        at = self._at(sequence)
        return at < len(self._sequences) and self._sequences[at] is sequence

    def add(self, sequence: Sequence) -> None:
        """Add a sequence."""
        self._sequences.insert(self._at(sequence), sequence)

    def remove(self, sequence: Sequence) -> None:
        """Remove a sequence. Raises ValueError if it does not wait."""
        at = self._at(sequence)
        if at == len(self._sequences) or self._sequences[at] is not sequence:
            raise ValueError(f"{sequence.id} does not wait")
        del self._sequences[at]

    def _at(self, sequence: Sequence) -> int:
        return bisect_left(self._sequences, sequence.arrival, key=lambda other: other.arrival)

"""PURE: sums over the last seconds. Imports nothing heavy."""

from collections.abc import Callable

import msgspec

PARTS = 15


class Sum(msgspec.Struct, frozen=True):
    """So many values were added, and `total` is their sum."""

    count: int = 0
    total: float = 0.0

    def __add__(self, other: "Sum") -> "Sum":
        return Sum(self.count + other.count, self.total + other.total)

    @property
    def mean(self) -> float | None:
        """`None` where there was nothing."""
        return self.total / self.count if self.count else None


class Window:
    """The sum of what was added within the last `seconds`, in parts of a fifteenth: the oldest goes as a whole.

    `clock` gives seconds that only grow. One thread adds; others may read: each part is replaced, never changed.
    """

    def __init__(self, seconds: float, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._part = seconds / PARTS
        self._began = clock()
        # Which part of time a place holds, and its sum. The one under way makes one more than PARTS.
        self._ring: list[tuple[int, Sum]] = [(-1, Sum())] * (PARTS + 1)

    def add(self, value: float = 1.0, count: int = 1) -> None:
        """`count` values, `value` together."""
        part = int(self._clock() / self._part)
        place = part % len(self._ring)
        held, before = self._ring[place]
        self._ring[place] = (part, (before if held == part else Sum()) + Sum(count, value))

    def sum(self) -> Sum:
        """Of the last `seconds`, and of as much of a part as has passed of the one under way."""
        now = int(self._clock() / self._part)
        total = Sum()
        for part, each in self._ring:
            if now - PARTS <= part <= now:
                total += each
        return total

    @property
    def covers(self) -> float:
        """The seconds that `sum` is of: fewer than the window's in the beginning."""
        now = self._clock()
        return min(now - self._began, now - self._part * (int(now / self._part) - PARTS))

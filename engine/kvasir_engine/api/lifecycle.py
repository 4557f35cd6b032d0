"""Whether this process is draining, and how many requests it has."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Lifecycle:
    """Serving, then draining: unready, while requests in flight are finished.

    `on_change` is called with the number of requests in flight whenever that changes.
    """

    def __init__(self, on_change: Callable[[int], None] = lambda inflight: None) -> None:
        self.draining = False
        self.inflight = 0
        self._on_change = on_change

    def drain(self) -> None:
        """Become unready. Requests that still come are served: the caller may not know yet."""
        self.draining = True

    @contextmanager
    def request(self) -> Iterator[None]:
        self._count(1)
        try:
            yield
        finally:
            self._count(-1)

    def _count(self, change: int) -> None:
        self.inflight += change
        self._on_change(self.inflight)

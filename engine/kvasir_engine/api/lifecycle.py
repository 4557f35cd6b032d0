"""Whether this process takes requests, and how many it has."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Lifecycle:
    """Serving, then draining: not ready any more, while what is in flight is finished.

    `on_change` is called with the number of requests in flight whenever that changes.
    """

    def __init__(self, on_change: Callable[[int], None] = lambda inflight: None) -> None:
        self.draining = False
        self.inflight = 0
        self._on_change = on_change

    def drain(self) -> None:
        """Be unready from now on. Requests that still come are served: the caller may not know yet."""
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

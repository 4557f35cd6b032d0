"""Whether this process takes requests, and how many it has."""

from collections.abc import Iterator
from contextlib import contextmanager


class Lifecycle:
    """Serving, then draining: not ready any more, while what is in flight is finished."""

    def __init__(self) -> None:
        self.draining = False
        self.inflight = 0

    def drain(self) -> None:
        """Be unready from now on. Requests that still come are served: the caller may not know yet."""
        self.draining = True

    @contextmanager
    def request(self) -> Iterator[None]:
        self.inflight += 1
        try:
            yield
        finally:
            self.inflight -= 1

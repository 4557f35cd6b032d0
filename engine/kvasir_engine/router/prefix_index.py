"""Each worker's radix tree as its cache events describe it: an exact index by page hash. Pure."""

from collections.abc import Sequence

from kvasir_engine.protocol import CacheEvents


class PrefixIndex:
    """One worker's cached prefixes. A page's hash covers all tokens before it, so a hash identifies a prefix.

    The index is `degraded` until the first snapshot, and after a gap in the sequence: the router must request a
    snapshot (`Resync`), and keeps the old entries as the best guess until then.
    """

    def __init__(self) -> None:
        self._pages: set[int] = set()
        self._seq: int | None = None
        self.degraded = True

    def __len__(self) -> int:
        return len(self._pages)

    def apply(self, frame: CacheEvents) -> bool:
        """Apply a frame of events. Returns True when a gap begins with it, so that a snapshot must be requested."""
        gap = False
        if frame.snapshot:
            self._pages.clear()
            self.degraded = False
        elif self._seq is None or frame.seq != self._seq + 1:
            gap = not self.degraded
            self.degraded = True
        self._seq = frame.seq
        for event in frame.events:
            self._pages.difference_update(event.evicted)
            self._pages.update(event.stored)
        return gap

    def longest(self, pages: Sequence[int]) -> int:
        """The number of leading pages of a prompt that this worker has. `pages` are the prompt's page hashes."""
        known = self._pages
        for place, page in enumerate(pages):
            if page not in known:
                return place
        return len(pages)

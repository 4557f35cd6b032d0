"""What each worker's radix tree holds, as far as its cache events tell: an exact index by page hash. Pure."""

from collections.abc import Sequence

from kvasir_engine.protocol import CacheEvents


class PrefixIndex:
    """One worker's cached prefixes. A page's hash covers all tokens before it, so hashes stand for prefixes.

    Until the first snapshot, and after a gap in the sequence, the index is `degraded`: it must be asked for again
    (`Resync`), and what it knew before is kept as the best guess.
    """

    def __init__(self) -> None:
        self._pages: set[int] = set()
        self._seq: int | None = None
        self.degraded = True

    def __len__(self) -> int:
        return len(self._pages)

    def apply(self, frame: CacheEvents) -> bool:
        """Take a frame of events. True when this frame opened a gap, so that a snapshot has to be asked for."""
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
        """How many pages of a prompt, from its beginning, this worker has. `pages` are the prompt's page hashes."""
        known = self._pages
        for place, page in enumerate(pages):
            if page not in known:
                return place
        return len(pages)

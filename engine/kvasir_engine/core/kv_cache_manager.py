"""Allocates pages to sequences, and answers the scheduler's queries."""

from collections.abc import Callable

from kvasir_engine.core.sequence import Sequence
from kvasir_engine.kv.pages import OutOfPages, Owner, PagePool
from kvasir_engine.kv.radix import Match, RadixTree


class KVCacheManager:
    """The pool and its tree. `copy(source, target)` copies the bytes of a page."""

    def __init__(self, pages: int, page_size: int, copy: Callable[[int, int], None]) -> None:
        self.page_size = page_size
        self.pool = PagePool(pages)
        self.tree = RadixTree(self.pool, page_size)
        self._copy = copy
        self.copying: list[list[int]] = []
        """Pages held because the device may not have copied from or to them yet, with those before them."""

    # -- the scheduler's questions

    @property
    def available(self) -> int:
        """The number of pages that are free or can be evicted."""
        return self.pool.available

    def cost(self, sequence: Sequence) -> tuple[int, int]:
        """How many available pages the admission of `sequence` takes, and how many of its tokens are cached."""
        usable = len(sequence.tokens) - 1 if sequence.remote else sequence.reusable
        match = self.tree.match(sequence.tokens[:usable], sequence.salt)
        fresh = self.pages_for(len(sequence.tokens)) - len(match.pages)
        idle = sum(self.pool.owner(page) is Owner.CACHED for page in match.pages)
        if sequence.remote:
            return fresh + idle, len(match.pages) * self.page_size
        # A last page that is held while it is copied: without it where there is no room for both.
        tail = match.tail_page is not None and self.pool.owner(match.tail_page) is Owner.CACHED
        if fresh + idle + tail > self.available:
            return fresh + idle, len(match.pages) * self.page_size
        return fresh + idle + tail, match.tokens(self.page_size)

    def releasable(self, sequence: Sequence) -> int:
        """The number of pages that only `sequence` holds."""
        return sum(self.pool.holders(page) == 1 for page in sequence.pages)

    def pages_for(self, tokens: int) -> int:
        """The number of pages for so many tokens."""
        return -(-tokens // self.page_size)

    # -- the engine's moves

    def admit(self, sequence: Sequence) -> None:
        """Allocate pages for all tokens of `sequence`, and reuse cached ones. The last token is always computed."""
        match = self.tree.match(sequence.tokens[: sequence.reusable], sequence.salt)
        self.tree.acquire(match)
        missing = self.pages_for(len(sequence.tokens)) - len(match.pages)
        if match.tail_page is not None and missing > self.available:
            self.tree.release([match.tail_page])  # its room is needed: what it has is computed again
            match = Match(match.pages)
        fresh = self._take(missing)
        sequence.pages = [*match.pages, *fresh]
        if match.tail_page is not None:
            self.pool.hold(match.pages)
            self.copying.append([*match.pages, match.tail_page])
            # The target too: the sequence may leave before a step that would hold it was launched.
            target = [*match.pages, fresh[0]]
            self.pool.hold(target)
            self.copying.append(target)
            self._copy(match.tail_page, fresh[0])
        sequence.computed = match.tokens(self.page_size)
        sequence.done = sequence.computed

    def take_copying(self) -> list[list[int]]:
        """The pages held for copies. The caller releases them when the device has made the copies."""
        copying, self.copying = self.copying, []
        return copying

    def reserve(self, sequence: Sequence, lease: int) -> list[int]:
        """Hold the whole cached pages of `sequence`, and lease pages for the rest of its tokens."""
        match = self.tree.match(sequence.tokens[:-1], sequence.salt)
        self.tree.acquire(Match(match.pages))
        missing = self.pages_for(len(sequence.tokens)) - len(match.pages)
        self._make_room(missing)
        sequence.pages = list(match.pages)
        sequence.computed = sequence.done = len(match.pages) * self.page_size
        return self.pool.lease(missing, lease)

    def prefix(self, tokens: list[int], salt: str) -> list[int]:
        """The whole cached pages of a prompt. They are not held."""
        return self.tree.match(tokens[:-1], salt).pages

    def make_longer(self, pages: list[int], count: int) -> list[int]:
        """Hold the cached `pages` of a prompt, and take `count` new ones behind them. Raises OutOfPages."""
        self.tree.acquire(Match(pages))
        try:
            return [*pages, *self._take(count)]
        except OutOfPages:
            self.tree.release(pages)
            raise

    def extend(self, sequence: Sequence, tokens: int) -> None:
        """Allocate pages for `tokens` further computed tokens. Raises OutOfPages."""
        missing = self.pages_for(sequence.computed + tokens) - len(sequence.pages)
        if missing > 0:
            sequence.pages += self._take(missing)

    def share(self, sequence: Sequence) -> None:
        """Put the whole computed pages into the tree, while the sequence continues."""
        whole = sequence.done // self.page_size
        shared = self.tree.insert(sequence.tokens[: whole * self.page_size], sequence.pages[:whole], sequence.salt)
        sequence.pages[:whole] = shared

    def detach(self, sequence: Sequence, keep: bool) -> list[int]:
        """Take the pages from the sequence; with `keep`, computed ones enter the tree. The caller holds them
        now."""
        pages = sequence.pages
        if keep:
            pages = self.tree.insert(sequence.tokens[: sequence.done], pages, sequence.salt)
        sequence.pages, sequence.computed, sequence.done = [], 0, 0
        return pages

    def _take(self, count: int) -> list[int]:
        self._make_room(count)
        return self.pool.take(count)

    def _make_room(self, count: int) -> None:
        self.tree.evict(count - self.pool.count(Owner.FREE))

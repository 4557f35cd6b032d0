"""Pages for sequences: what the scheduler asks, and what the engine does when a sequence comes, grows and goes."""

from collections.abc import Callable

from kvasir_engine.core.sequence import Sequence
from kvasir_engine.kv.pages import OutOfPages, Owner, PagePool
from kvasir_engine.kv.radix import Match, RadixTree


class KVCacheManager:
    """The pool, its tree and the one operation on bytes: `copy(source, target)` copies a page."""

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
        """Pages that are free or can be evicted."""
        return self.pool.available

    def cost(self, sequence: Sequence) -> tuple[int, int]:
        """Pages that admitting `sequence` takes from the available ones, and tokens it finds cached."""
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
        """Pages that nobody but `sequence` holds."""
        return sum(self.pool.holders(page) == 1 for page in sequence.pages)

    def pages_for(self, tokens: int) -> int:
        """Pages that hold this many tokens."""
        return -(-tokens // self.page_size)

    # -- the engine's moves

    def admit(self, sequence: Sequence) -> None:
        """Give `sequence` pages for all its tokens, reusing what is cached; the last token is always computed."""
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
        """What is held for copies is the caller's to release, when the device has made them."""
        copying, self.copying = self.copying, []
        return copying

    def reserve(self, sequence: Sequence, lease: int) -> list[int]:
        """Hold what is cached of `sequence` in whole pages, and lease pages for the rest of its tokens."""
        match = self.tree.match(sequence.tokens[:-1], sequence.salt)
        self.tree.acquire(Match(match.pages))
        missing = self.pages_for(len(sequence.tokens)) - len(match.pages)
        self._make_room(missing)
        sequence.pages = list(match.pages)
        sequence.computed = sequence.done = len(match.pages) * self.page_size
        return self.pool.lease(missing, lease)

    def prefix(self, tokens: list[int], salt: str) -> list[int]:
        """The whole pages that are cached of a prompt, not held."""
        return self.tree.match(tokens[:-1], salt).pages

    def make_longer(self, pages: list[int], count: int) -> list[int]:
        """Hold cached `pages` of a prompt and `count` fresh ones to follow them. Raises OutOfPages."""
        self.tree.acquire(Match(pages))
        try:
            return [*pages, *self._take(count)]
        except OutOfPages:
            self.tree.release(pages)
            raise

    def extend(self, sequence: Sequence, tokens: int) -> None:
        """Pages for `tokens` more computed tokens. Raises OutOfPages."""
        missing = self.pages_for(sequence.computed + tokens) - len(sequence.pages)
        if missing > 0:
            sequence.pages += self._take(missing)

    def share(self, sequence: Sequence) -> None:
        """Put the whole pages that are computed into the tree, while the sequence goes on."""
        whole = sequence.done // self.page_size
        shared = self.tree.insert(sequence.tokens[: whole * self.page_size], sequence.pages[:whole], sequence.salt)
        sequence.pages[:whole] = shared

    def detach(self, sequence: Sequence, keep: bool) -> list[int]:
        """Take the pages from the sequence, what is computed put into the tree if `keep`. The caller holds them."""
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

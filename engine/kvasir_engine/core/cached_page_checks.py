"""Verifies cached pages by their digests before a request uses them.

Nothing may write a page that is in the tree. If something does (a peer beyond its lease, a memory fault), this
finds it, and the page is computed again. The digests are from the kernels that stored the KV, if these make
digests, and otherwise from the memory when the page entered the tree.
"""

import logging
import random
import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Literal

from kvasir_engine.connector.digester import Digester
from kvasir_engine.core.kv_cache_manager import KVCacheManager
from kvasir_engine.core.sequence import Sequence
from kvasir_engine.kv.digests import KeptDigests

log = logging.getLogger("engine")

SAMPLED = 8
"""Of so many pages that are used again, one is looked at, where pages are sampled."""


@dataclass
class CheckStats:
    """Counters since the start."""

    pages: int = 0
    spoiled: int = 0
    seconds: float = 0.0


class CachedPageChecks:
    """The checks of one rank's pool. `digester` compares pages with the digests `kept`.

    `stored`: the kernels that store KV make the digests; else they are made here when pages enter the tree.
    """

    def __init__(
        self, digester: Digester, kept: KeptDigests, stored: bool, mode: Literal["all", "sampled"] = "all"
    ) -> None:
        self._digester = digester
        self._kept = kept
        self._stored = stored
        self._mode = mode
        self._layers = range(kept.table.shape[1])
        self.stats = CheckStats()

    def note(self, cache: KVCacheManager) -> None:
        """Make the digests of pages that have entered the tree since the last call."""
        began = time.perf_counter()
        in_tree = cache.tree.take_entered()
        if not in_tree:
            return
        if not self._stored:
            self._kept.forget(in_tree)
        self._digester.keep(self._digester.written(in_tree, self._layers), in_tree)
        self.stats.seconds += time.perf_counter() - began

    def spoiled(self, sequence: Sequence, cache: KVCacheManager) -> list[int]:
        """The cached pages that `sequence` would use and that differ from what was stored."""
        began = time.perf_counter()
        match = cache.tree.match(sequence.tokens[:-1], sequence.salt)
        pages = match.pages if match.tail_page is None else [*match.pages, match.tail_page]
        if self._mode == "sampled":
            pages = [page for page in pages if not random.randrange(SAMPLED)]
        wrong = self._digester.differing(pages, self._layers) if pages else []
        self.stats.pages += len(pages)
        self.stats.spoiled += len(wrong)
        self.stats.seconds += time.perf_counter() - began
        return wrong

    def drop(self, pages: Seq[int], cache: KVCacheManager) -> None:
        """Remove these pages, and all that follow them, from the tree."""
        log.error("cached pages are not what was stored pages=%d first=%d", len(pages), pages[0])
        for page in pages:
            cache.tree.drop(page)

"""Readback: a prefill worker reads pages of a prompt that only the decode worker has, instead of computing them.

In the second turn of a conversation the decode worker has the KV of the first answer. It lends these pages: they
are held, so neither evicted nor written, until the reader has acknowledged the read or is proven dead. The prefill
worker reads them into pages of its own, which enter its tree when their digests are right. Then the prompt is
admitted as any other and finds them there. If a read fails, the prompt is computed.
"""

import logging
from dataclasses import dataclass, field

from kvasir_engine.connector.kv_connector import KVConnector
from kvasir_engine.connector.layout import block_numbers, block_tokens
from kvasir_engine.connector.notifications import Stopped
from kvasir_engine.connector.sender import Key, Push
from kvasir_engine.core.kv_cache_manager import KVCacheManager
from kvasir_engine.core.sequence import Sequence
from kvasir_engine.kv.pages import OutOfPages
from kvasir_engine.protocol import Endpoint, Loan

log = logging.getLogger("engine")

READ_BLOCKS = 32
"""Blocks of one read: the digests of some are compared while the next come."""


@dataclass(eq=False)
class Reading:
    """A read from a loan of another worker. `pages`: those of the tree and, from `matched` on, those to read
    into."""

    tokens: list[int]
    salt: str
    pages: list[int]
    sequence: Sequence | None  # that waits for it
    matched: int = 0


@dataclass
class ReadStats:
    """Counters since the start."""

    pages: int = 0
    tokens: int = 0
    outcomes: dict[str, int] = field(default_factory=dict)

    def count(self, outcome: str) -> None:
        """Count a read that ended with this outcome."""
        self.outcomes[outcome] = self.outcomes.get(outcome, 0) + 1


class Readback:
    """The reads of this worker from others."""

    def __init__(self, cache: KVCacheManager, connector: KVConnector | None) -> None:
        self._cache = cache
        self._connector = connector
        self.reads: dict[Key, Reading] = {}
        self.stats = ReadStats()

    def read(self, to: Endpoint, loan: Loan, sequence: Sequence) -> Key | None:
        """Start to read the pages of `loan` that the prompt of `sequence` lacks here. `None` if it lacks none: then
        the loan is returned."""
        connector = self._connector
        assert connector is not None
        if not connector.reads(to) or (to.agent, loan.id) in self.reads:
            return None
        key = connector.read(to, loan)
        reading = self.reads[key] = Reading(sequence.tokens[:], sequence.salt, [], sequence)
        theirs = to.fingerprint.page_size
        if not self._fill(reading, loan, theirs):
            reading.sequence = None
            connector.withdraw(key, "nothing to read")
            return None
        size = self._cache.page_size
        block = block_tokens(size, theirs)
        begin, end = reading.matched * size, len(reading.pages) * size
        local = block_numbers(reading.pages, size // block, begin // block, end // block)
        remote = block_numbers(
            loan.pages, theirs // block, (begin - loan.first) // block, (end - loan.first) // block
        )
        for start in range(0, len(local), READ_BLOCKS):
            some = slice(start, start + READ_BLOCKS)
            connector.push(key, Push(local[some], remote[some]))
        connector.push(key, Push(complete=Stopped(loan.id, loan.epoch, "read", loan.nonce)))
        return key

    def _fill(self, reading: Reading, loan: Loan, theirs: int) -> bool:
        """Allocate the pages to read into: those that the loan, whose pages have `theirs` tokens, fills
        completely."""
        size = self._cache.page_size
        matched, lent = self._cache.prefix(reading.tokens, reading.salt), loan.first + len(loan.pages) * theirs
        wanted = min(len(reading.tokens) - 1, lent) // size - len(matched)
        if loan.first % theirs or len(matched) * size < loan.first or wanted <= 0:
            return False
        try:
            reading.pages = self._cache.make_longer(matched, wanted)
        except OutOfPages:
            return False
        reading.matched = len(matched)
        return True

    def ended(self, key: Key) -> Sequence | None:
        """End a read whose pages are here and correct. Returns the sequence that waits for it, if any."""
        reading = self.reads.pop(key)
        size, count = self._cache.page_size, len(reading.pages) - reading.matched
        pages = self._cache.tree.insert(reading.tokens[: len(reading.pages) * size], reading.pages, reading.salt)
        self._cache.tree.release(pages)
        self.stats.pages += count
        self.stats.tokens += count * size
        self.stats.count("read")
        if reading.sequence is not None:
            reading.sequence.read = count * size
        return reading.sequence

    def failed(self, key: Key, reason: str) -> Sequence | None:
        """End a read that failed and writes no more pages. Returns the sequence that waits for it, if any."""
        reading = self.reads.pop(key)
        self._cache.tree.release(reading.pages)
        self.stats.count("failed" if reading.pages else "declined")
        log.info("read ended early agent=%s lease=%d pages=%d reason=%r", *key, len(reading.pages), reason)
        return reading.sequence

    def give_up(self, key: Key, reason: str) -> None:
        """Stop the read of a request that has ended. Idempotent."""
        reading = self.reads.get(key)
        if reading is not None and self._connector is not None:
            reading.sequence = None
            self._connector.withdraw(key, reason)

    def held(self) -> list[list[int]]:
        """The pages that reads hold."""
        return [reading.pages for reading in self.reads.values()]

"""The decode side of readback (`readback.py`): cached pages that are lent to prefill workers."""

from kvasir_engine import faults
from kvasir_engine.connector.kv_connector import KVConnector
from kvasir_engine.core.kv_cache_manager import KVCacheManager
from kvasir_engine.protocol import Endpoint, Loan

LOAN_SECONDS = 30.0
"""A read takes milliseconds; what has not ended by then is computed."""


class Loans:
    """Cached pages that other workers may read. They are held until there is proof that the readers have
    stopped."""

    def __init__(self, cache: KVCacheManager, connector: KVConnector | None) -> None:
        self.lent: dict[int, list[int]] = {}  # by loan
        self._cache = cache
        self._connector = connector

    def lend(self, to: Endpoint, pages: list[int], first: int, id: int, epoch: int, nonce: int = 0) -> Loan | None:
        """Lend those of `pages`, a prompt's whole cached pages, that hold tokens from `first` on; `None` if there
        are none."""
        assert self._connector is not None
        size = self._cache.page_size
        skip = max(0, first) // size
        if skip >= len(pages) or not self._connector.reads(to):
            return None
        # All of them are held, so that whoever holds a page holds all before it.
        self._cache.pool.hold(pages)
        self.lent[id] = list(pages)
        loan = Loan(id, epoch, pages[skip:], skip * size, LOAN_SECONDS, nonce)
        self._connector.lend(loan, to)
        faults.hit("decode.pages_lent")
        return loan

    def take_back(self, id: int) -> None:
        """Revoke a loan whose request has ended here. Idempotent."""
        if id in self.lent and self._connector is not None:
            self._connector.revoke(id)

    def returned(self, id: int) -> None:
        """Release the pages of a loan on proof that its reader has stopped."""
        self._cache.tree.release(self.lent.pop(id))

"""The thread that digests pages beside the one that copies them."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from kvasir_engine.transfer.digest import Digester
from kvasir_engine.transfer.layout import Cut
from kvasir_engine.transfer.stats import HandoffStats


@dataclass(frozen=True)
class Digests:
    """Of some blocks, and the seconds that they took."""

    values: list[int]
    seconds: float


class DigestThread:
    """Calls `wake`, from the thread, when some digests are done. All are 0 where there is no `digest`."""

    def __init__(self, digest: Digester | None, stats: HandoffStats, wake: Callable[[], None]) -> None:
        self._digest = digest
        self._stats = stats
        self._wake = wake
        self._thread = ThreadPoolExecutor(1, "kvasir-digest")

    def begin(self, blocks: Sequence[int], layers: range, cut: Cut | None) -> "Future[Digests]":
        """Begin to digest on the thread; `take` has the result."""
        if self._digest is None:
            digests: Future[Digests] = Future()
            digests.set_result(Digests([0] * len(blocks), 0.0))
        else:
            digests = self._thread.submit(self._digests, self._digest, blocks, layers, cut)
            digests.add_done_callback(lambda _: self._wake())
        return digests

    def take(self, digests: "Future[Digests]") -> list[int]:
        """Those that were begun and are done, counted."""
        return self._count(digests.result())

    def here(self, blocks: Sequence[int], layers: range, cut: Cut | None) -> list[int]:
        """Digest on the calling thread, at once."""
        assert self._digest is not None
        return self._count(self._digests(self._digest, blocks, layers, cut))

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(cancel_futures=True)

    @staticmethod
    def _digests(digest: Digester, blocks: Sequence[int], layers: range, cut: Cut | None) -> Digests:
        began = time.perf_counter()
        values = digest(blocks, layers, cut)
        return Digests(values, time.perf_counter() - began)

    def _count(self, digests: Digests) -> list[int]:
        if self._digest is not None:
            self._stats.digests += len(digests.values)
            self._stats.digest_seconds += digests.seconds
        return digests.values

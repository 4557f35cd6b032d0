"""The thread that digests pages beside the one that copies them."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass

from kvasir_engine.connector.digester import Digested, Digester
from kvasir_engine.connector.layout import Cut
from kvasir_engine.connector.stats import TransferStats


@dataclass(frozen=True)
class TimedDigests:
    """Of some blocks, and the seconds that they took. `found` is None where digests are off."""

    values: list[int]
    seconds: float
    found: Digested | None = None


class DigestThread:
    """Calls `wake`, from the thread, when some digests are done. All are 0 where there is no `digest`.

    What was found in memory counts for later only when whoever asked for it says so with `keep`: the pages may have
    become others' while it was computed. Without `thread` it makes one.
    """

    def __init__(
        self,
        digest: Digester | None,
        stats: TransferStats,
        wake: Callable[[], None],
        thread: Executor | None = None,
    ) -> None:
        self._digest = digest
        self._stats = stats
        self._wake = wake
        self._thread = thread or ThreadPoolExecutor(1, "kvasir-digest")

    def written(self, blocks: Sequence[int], layers: range, cut: Cut | None) -> "Future[TimedDigests]":
        """The digests of what was written; `take` has the result. What is not known begins on the thread."""
        known = None if self._digest is None else _timed(self._digest.known, blocks, layers, cut)
        if known is not None and known.found is not None:
            done: Future[TimedDigests] = Future()
            done.set_result(known)
            return done
        return self._begin(None if self._digest is None else self._digest.written, blocks, layers, cut)

    def arrived(self, blocks: Sequence[int], layers: range, cut: Cut | None) -> "Future[TimedDigests]":
        """Begin on the thread: the digests of memory as it is; `take` has the result."""
        return self._begin(None if self._digest is None else self._digest.measured, blocks, layers, cut)

    def here(self, blocks: Sequence[int], layers: range, cut: Cut | None) -> TimedDigests:
        """Digest memory as it is on the calling thread, at once."""
        assert self._digest is not None
        return self._count(_timed(self._digest.measured, blocks, layers, cut))

    def take(self, digests: "Future[TimedDigests]") -> TimedDigests:
        """Those that were begun and are done, counted."""
        return self._count(digests.result())

    def keep(self, digests: TimedDigests, blocks: Sequence[int]) -> None:
        """What was found of `blocks` is what they are to hold, and nobody has written there since."""
        if self._digest is not None and digests.found is not None:
            self._digest.keep(digests.found, blocks)

    def forget(self, blocks: Sequence[int], cut: Cut | None) -> None:
        """Somebody else may write these blocks from now on, or we read into them."""
        if self._digest is not None:
            self._digest.forget(blocks, cut)

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(cancel_futures=True)

    def _begin(
        self, digest: "_Digest | None", blocks: Sequence[int], layers: range, cut: Cut | None
    ) -> "Future[TimedDigests]":
        if digest is None:
            digests: Future[TimedDigests] = Future()
            digests.set_result(TimedDigests([0] * len(blocks), 0.0))
        else:
            digests = self._thread.submit(_timed, digest, blocks, layers, cut)
            digests.add_done_callback(lambda _: self._wake())
        return digests

    def _count(self, digests: TimedDigests) -> TimedDigests:
        if self._digest is not None:
            self._stats.digests += len(digests.values)
            self._stats.digest_seconds += digests.seconds
        return digests


_Digest = Callable[[Sequence[int], range, Cut | None], Digested | None]


def _timed(digest: _Digest, blocks: Sequence[int], layers: range, cut: Cut | None) -> TimedDigests:
    began = time.perf_counter()
    found = digest(blocks, layers, cut)
    return TimedDigests([] if found is None else found.values, time.perf_counter() - began, found)

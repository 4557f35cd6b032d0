"""Steps that were launched and not yet accounted for, and the pages that must stay until they have ended."""

import logging
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from kvasir_engine.core.kv_cache_manager import KVCacheManager
from kvasir_engine.core.sequence import Sequence
from kvasir_engine.executor.step import LaunchedStep

log = logging.getLogger("engine")


@dataclass(eq=False)
class InflightStep:
    """One step: new tokens of each sequence, and the `rows` of what it samples that are a sequence's next tokens.

    `scored`: how many of its scores are a sequence's, in order, and the place of the first in the sequence.
    `idle`: seconds without a step before it, while there was work; None when it follows no other.
    """

    chunks: Seq[tuple[Sequence, int]]
    rows: Mapping[Sequence, range]
    step: LaunchedStep
    idle: float | None
    scored: Mapping[Sequence, range] = field(default_factory=dict)
    held: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._members = {sequence for sequence, _ in self.chunks}

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._members


class InflightSteps:
    """The steps in flight, oldest first: at most one, but while a step is launched before the last has ended.

    A step reads and writes pages by numbers that it was given when it was launched. So what its sequences leave, or
    give in exchange for pages of the tree, stays held until it has ended, and is neither leased, lent nor written.
    """

    def __init__(self, cache: KVCacheManager) -> None:
        self._cache = cache
        self._steps: list[InflightStep] = []

    def __len__(self) -> int:
        return len(self._steps)

    def add(self, launched: InflightStep) -> None:
        """It was launched. It holds what is copied on the device before it computes."""
        launched.held += self._cache.take_copying()
        self._steps.append(launched)

    def rows(self, sequence: Sequence) -> range:
        """Where the newest step samples the tokens that `sequence` awaits."""
        return self._steps[-1].rows[sequence]

    @property
    def oldest(self) -> InflightStep:
        """The step that ends next."""
        return self._steps[0]

    def ended(self) -> None:
        """The oldest has ended: it holds nothing any more."""
        for pages in self._steps.pop(0).held:
            self._cache.tree.release(pages)

    def share(self, sequence: Sequence) -> None:
        """As KVCacheManager.share, while steps may read the pages that are given in exchange."""
        launched, before = self._newest(sequence), list(sequence.pages)
        self._hold(launched, before)
        self._cache.share(sequence)
        if sequence.pages != before:  # whoever holds a page holds all before it, and these are others now
            self._hold(launched, sequence.pages)

    def part(self, sequence: Sequence, keep: bool) -> list[int]:
        """As KVCacheManager.part, while steps may read and write the pages."""
        launched, before = self._newest(sequence), list(sequence.pages)
        self._hold(launched, before)
        pages = self._cache.part(sequence, keep)
        if pages != before:
            self._hold(launched, pages)
        return pages

    def _newest(self, sequence: Sequence) -> InflightStep | None:
        return next((each for each in reversed(self._steps) if sequence in each), None)

    def _hold(self, launched: InflightStep | None, pages: list[int]) -> None:
        if launched is not None and pages:
            self._cache.pool.hold(pages)
            launched.held.append(list(pages))

    def drop(self) -> None:
        """Wait for all steps, whatever becomes of them, and let go of what they and copies hold."""
        while self._steps:
            try:
                self._steps[0].step.wait()
            except Exception:  # it is not wanted any more; what failed has been said
                log.debug("a step in flight failed too", exc_info=True)
            self.ended()
        for pages in self._cache.take_copying():
            self._cache.tree.release(pages)

    def holds(self) -> list[list[int]]:
        """The pages that steps and copies hold."""
        return [*(pages for launched in self._steps for pages in launched.held), *self._cache.copying]

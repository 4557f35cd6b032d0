"""Steps that are launched and not yet accounted for, and the pages that they use."""

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
    """One step: the new tokens of each sequence, and the `rows` in which it samples a sequence's next tokens.

    `scored`: for each sequence in order, how many of the step's scores are its own, and its first scored place.
    `idle`: seconds without a step before this one while there was work; `None` for a step that follows no other.
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
    """The steps in flight, oldest first: at most one, except while the next one is launched.

    A launched step reads and writes fixed page numbers. So pages that its sequences release, or exchange for pages
    of the tree, stay held until it has ended, and are neither leased, lent nor written.
    """

    def __init__(self, cache: KVCacheManager) -> None:
        self._cache = cache
        self._steps: list[InflightStep] = []

    def __len__(self) -> int:
        return len(self._steps)

    def add(self, launched: InflightStep) -> None:
        """Add a launched step. It holds the pages that the device copies before it computes."""
        launched.held += self._cache.take_copying()
        self._steps.append(launched)

    def rows(self, sequence: Sequence) -> range:
        """The rows in which the newest step samples the tokens that `sequence` awaits."""
        return self._steps[-1].rows[sequence]

    @property
    def oldest(self) -> InflightStep:
        """The oldest step, which ends next."""
        return self._steps[0]

    def ended(self) -> None:
        """Remove the oldest step, which has ended, and release the pages that it held."""
        for pages in self._steps.pop(0).held:
            self._cache.tree.release(pages)

    def share(self, sequence: Sequence) -> None:
        """KVCacheManager.share, while steps may still read the pages that are exchanged."""
        launched, before = self._newest(sequence), list(sequence.pages)
        self._hold(launched, before)
        self._cache.share(sequence)
        if sequence.pages != before:  # whoever holds a page holds all before it, and these are others now
            self._hold(launched, sequence.pages)

    def detach(self, sequence: Sequence, keep: bool) -> list[int]:
        """KVCacheManager.detach, while steps may still read and write the pages."""
        launched, before = self._newest(sequence), list(sequence.pages)
        self._hold(launched, before)
        pages = self._cache.detach(sequence, keep)
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
        """Wait for all steps, ignoring errors, and release the pages that steps and copies hold."""
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

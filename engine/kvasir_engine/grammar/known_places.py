"""Caches what is known of places in grammars, for sequences that pass the same ones: choices of one prompt, and
sequences with the same beginning.
"""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MOST_BYTES = 32 * 2**20
MOST_TOKENS = 512
"""Before a place: few sequences have as many in common, and each look at them takes time."""
_ENTRY_BYTES = 512
"""About what an entry takes beside its mask and its tokens."""

Key = tuple[int, ...]


@dataclass(frozen=True)
class Place:
    """The forced text from here, and the mask row of the allowed tokens; None where not computed yet."""

    certain: tuple[int, ...]
    mask: NDArray[np.int32] | None = None


class KnownPlaces:
    """The cache for all grammars of a vocabulary; drops the least recently used. Thread-safe."""

    def __init__(self, most: int = MOST_BYTES) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[int, Key], Place] = OrderedDict()
        self.bytes = 0

    def find(self, grammar: int, accepted: Sequence[int]) -> Place | None:
        """The place of the grammar with this number after these tokens."""
        if len(accepted) > MOST_TOKENS:
            return None
        key = grammar, tuple(accepted)
        with self._lock:
            found = self._kept.get(key)
            if found is not None:
                self._kept.move_to_end(key)
            return found

    def keep(self, grammar: int, accepted: Sequence[int], place: Place) -> None:
        """Store what is known of a place, instead of what was stored."""
        if len(accepted) > MOST_TOKENS:
            return
        key = grammar, tuple(accepted)
        with self._lock:
            before = self._kept.pop(key, None)
            if before is not None:
                self.bytes -= _size(key, before)
            self._kept[key] = place
            self.bytes += _size(key, place)
            while self.bytes > self._most:
                dropped, old = self._kept.popitem(last=False)
                self.bytes -= _size(dropped, old)


def _size(key: tuple[int, Key], place: Place) -> int:
    mask = 0 if place.mask is None else place.mask.nbytes
    return _ENTRY_BYTES + mask + 8 * (len(key[1]) + len(place.certain))

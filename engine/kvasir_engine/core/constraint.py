"""What a sequence's grammar lets come next. Of one sequence; the engine's thread and, for a mask, one other use it.

Between the launch of a step and its end a matcher fills its mask, so nothing else touches it then: a sequence with
a constraint is in no step before the token of its last one is known.
"""

import logging
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kvasir_engine.grammar.base import GrammarError, GrammarMatcher

log = logging.getLogger("engine")


class Constraint:
    """A matcher that follows the generated tokens. `jump`: what it forces is appended without a step a token.

    `stops` are the tokens at which the sequence stops, whatever they are in the grammar.
    """

    def __init__(self, matcher: GrammarMatcher, jump: bool, vocab: int, stops: Sequence[int] = ()) -> None:
        self._matcher = matcher
        self.jump = jump
        self.fault: str | None = None
        """Why its mask could not be filled: then nothing is allowed."""
        self._words = -(-vocab // 32)
        self._stops = frozenset(stops)

    def replay(self, tokens: Sequence[int]) -> bool:
        """Follow what was generated elsewhere. False: the grammar has no such text."""
        return all(self._matcher.accept(token) for token in tokens)

    def accept(self, token: int) -> bool:
        """Follow a token that was sampled. False: it is not in the language."""
        return self._matcher.accept(token)

    def forced(self, most: int) -> list[int]:
        """The tokens that have to come now, at most so many, which are followed. They end before one at which a
        sequence stops, which is sampled.
        """
        taken: list[int] = []
        while self.jump and len(taken) < most and not self._matcher.stopped():
            found = self._matcher.forced_tokens()[: most - len(taken)]
            if not found:
                break
            for token in found:
                # What the library forces and does not accept is left to the mask.
                if token in self._stops or not self._matcher.accept(token):
                    return taken
                taken.append(token)
        return taken

    @property
    def complete(self) -> bool:
        """Whether only the end may follow."""
        return self._matcher.stopped()

    def ends(self) -> list[int]:
        """The tokens that may come when it is complete: those that end a sequence."""
        return np.flatnonzero(np.unpackbits(self.fill().view(np.uint8), bitorder="little")).tolist()

    def fill(self) -> NDArray[np.int32]:
        """One row of the mask, as GrammarMatcher has it. Nothing, where the matcher fails; `fault` says why."""
        words = np.zeros(self._words, np.int32)
        try:
            self._matcher.fill_mask(words)
        except Exception as error:
            if not isinstance(error, GrammarError):
                log.exception("a mask failed")
            self.fault = str(error)
            words[:] = 0
        return words

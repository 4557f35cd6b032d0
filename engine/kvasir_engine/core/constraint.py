"""The grammar's state of one sequence. The engine's thread uses it, and one other thread, which fills masks.

A matcher fills its mask between the launch of a step and its end, and nothing else may use it then. So a sequence
with a constraint joins a step only when its last token is known.
"""

import logging
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kvasir_engine.grammar.base import GrammarError, GrammarMatcher

log = logging.getLogger("engine")


class Constraint:
    """A matcher that follows the generated tokens. `jump`: forced tokens are appended without a step for each.

    The sequence stops at the tokens `stops`, whatever the grammar says of them.
    """

    def __init__(self, matcher: GrammarMatcher, jump: bool, vocab: int, stops: Sequence[int] = ()) -> None:
        self._matcher = matcher
        self.jump = jump
        self.fault: str | None = None
        """Why its mask could not be filled: then nothing is allowed."""
        self._words = -(-vocab // 32)
        self._stops = frozenset(stops)

    def replay(self, tokens: Sequence[int]) -> bool:
        """Accept tokens that another worker generated. False if the grammar does not allow them."""
        return all(self._matcher.accept(token) for token in tokens)

    def accept(self, token: int) -> bool:
        """Accept a sampled token. False if the grammar does not allow it."""
        return self._matcher.accept(token)

    def forced(self, most: int) -> list[int]:
        """Accept the tokens that the grammar forces now, at most `most`, and return them. They end before a token
        at which the sequence stops: that one is sampled.
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
        """Whether only the end of the sequence may follow."""
        return self._matcher.stopped()

    def ends(self) -> list[int]:
        """The tokens that end a sequence, which alone are allowed when the constraint is complete."""
        return np.flatnonzero(np.unpackbits(self.fill().view(np.uint8), bitorder="little")).tolist()

    def fill(self) -> NDArray[np.int32]:
        """Fill one row of the mask (see GrammarMatcher). If the matcher fails the row allows nothing, and `fault`
        says why."""
        words = np.zeros(self._words, np.int32)
        try:
            self._matcher.fill_mask(words)
        except Exception as error:
            if not isinstance(error, GrammarError):
                log.exception("a mask failed")
            self.fault = str(error)
            words[:] = 0
        return words

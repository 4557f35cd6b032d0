"""What a sequence's grammar lets come next. Of one sequence; the engine's thread and, for a mask, one other use it.

Between the launch of a step and its end a matcher fills its mask, so nothing else touches it then: a sequence with
a constraint is in no step before the token of its last one is known.
"""

import logging
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kvasir_engine.grammar.base import GrammarError, GrammarMatcher
from kvasir_engine.protocol import Sampling
from kvasir_engine.sampling.token_history import TokenHistory

log = logging.getLogger("engine")


class Constraint:
    """A matcher that follows the generated tokens. `jump`: what it forces is appended without a step a token, as
    far as a step could sample it: by the settings, of which `history` knows the processors.
    """

    def __init__(
        self,
        matcher: GrammarMatcher,
        jump: bool,
        vocab: int,
        sampling: Sampling,
        history: TokenHistory | None = None,
    ) -> None:
        self._matcher = matcher
        self.jump = jump
        self.fault: str | None = None
        """Why its mask could not be filled: then nothing is allowed."""
        self._words = -(-vocab // 32)
        self._stops = frozenset(sampling.stop_token_ids)
        self._min_tokens = sampling.min_tokens
        self._history = history
        self._generated: list[int] = []

    def replay(self, tokens: Sequence[int]) -> bool:
        """Follow what was generated elsewhere. False: the grammar has no such text."""
        return all(self.accept(token) for token in tokens)

    def accept(self, token: int) -> bool:
        """Follow a token that was sampled. False: it is not in the language."""
        if not self._matcher.accept(token):
            return False
        self._generated.append(token)
        return True

    def forced(self, most: int) -> list[int]:
        """The tokens that have to come now, at most so many, which are followed. They end before one at which a
        sequence stops, which is sampled, and before one that a processor bars: the step there finds nothing to
        sample.
        """
        taken: list[int] = []
        while self.jump and len(taken) < most and not self._matcher.stopped():
            found = self._matcher.forced_tokens()[: most - len(taken)]
            if not found:
                break
            for token in found:
                # What the library forces and does not accept is left to the mask.
                if token in self._stops or self._barred(token) or not self.accept(token):
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

    def possible(self, ends: Sequence[int], generated: int) -> list[int]:
        """Those of `ends` that a step could sample behind so many tokens of this worker."""
        early = self._stops if generated < self._min_tokens else frozenset()
        return [token for token in ends if token not in early and not self._barred(token)]

    def _barred(self, token: int) -> bool:
        return self._history is not None and self._history.bars(self._generated, token)

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

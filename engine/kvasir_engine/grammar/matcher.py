"""A grammar compiled by llguidance, and a sequence's position in it."""

import itertools
import threading
from collections.abc import Sequence

import numpy as np
from llguidance import LLMatcher
from numpy.typing import NDArray

from kvasir_engine.grammar.base import GrammarError
from kvasir_engine.grammar.known_places import Place
from kvasir_engine.grammar.tokens import GrammarTokens

MOST_TRIED = 16
"""The number of tokens that are tried singly before a whole mask is computed."""
MOST_FORCED_BYTES = 1024
"""Looked at in one step; what is certain beyond comes in the next."""


_numbers = itertools.count()


class GuidanceGrammar:
    """See CompiledGrammar. `number` is unique."""

    def __init__(self, begin: LLMatcher, tokens: GrammarTokens) -> None:
        self.number = next(_numbers)
        self._begin = begin
        self._tokens = tokens
        self._lock = threading.Lock()

    def matcher(self) -> "GuidanceMatcher":
        """A matcher at the beginning."""
        with self._lock:
            return GuidanceMatcher(self._begin.deep_copy(), self._tokens, self.number)


class GuidanceMatcher:
    """See GrammarMatcher. llguidance does not see the tokens that end a sequence: they are in no text.

    Certain tokens are computed once: they stay certain while they are accepted.
    """

    def __init__(
        self,
        inner: LLMatcher,
        tokens: GrammarTokens,
        grammar: int,
        accepted: Sequence[int] = (),
        ended: bool = False,
    ) -> None:
        self._inner = inner
        self._tokens = tokens
        self._grammar = grammar
        self._accepted = list(accepted)
        self._ended = ended
        self._certain: list[int] | None = None
        """The tokens that must come from here; None where nobody has looked."""

    def accept(self, token: int) -> bool:
        """Advance by `token`, if it may come. Raises GrammarError."""
        if self._ended or not 0 <= token < self._tokens.known:
            return False
        if token in self._tokens.eos:
            if not self._inner.is_accepting():
                return False
            self._ended = True
            return True
        taken = self._inner.try_consume_tokens([token]) == 1
        self._check()
        if taken:
            self._accepted.append(token)
            follows = self._certain[1:] if self._certain and self._certain[0] == token else None
            self._certain = follows or None
        return taken

    def fill_mask(self, words: NDArray[np.int32]) -> None:
        """Set the mask row of the tokens that may come. Raises GrammarError."""
        assert words.shape == (self._tokens.words,)
        words[:] = 0
        if self.stopped():
            words |= self._tokens.eos_mask
            return
        forced = self.forced_tokens()
        if forced:
            words.view(np.uint32)[forced[0] >> 5] = 1 << (forced[0] & 31)
            return
        known = self._tokens.places.find(self._grammar, self._accepted)
        if known is not None and known.mask is not None:
            words[:] = known.mask
            return
        words[:] = self._mask(self._inner)
        self._check()
        if self._inner.is_accepting():
            words |= self._tokens.eos_mask
        if not words.any():
            raise GrammarError("", "no token continues the text within it")
        self._tokens.places.keep(self._grammar, self._accepted, Place((), words.copy()))

    def forced_tokens(self) -> list[int]:
        """The tokens that must come from here and are certain. Raises GrammarError."""
        if self.stopped():
            return []
        if self._certain is None:
            known = self._tokens.places.find(self._grammar, self._accepted)
            if known is None:
                known = Place(tuple(self._look_ahead()))
                self._tokens.places.keep(self._grammar, self._accepted, known)
            self._certain = list(known.certain)
        return self._certain

    def _look_ahead(self) -> list[int]:
        forced = self._inner.compute_ff_bytes()
        self._check()
        if not forced:
            return []
        text, marked, special = forced.partition(b"\xff")  # as llguidance writes a special token: \xff[7]
        if marked and not text:
            return [int(special[1 : special.index(b"]")])]
        some = text[:MOST_FORCED_BYTES]
        ends = len(some) == len(text) and (bool(marked) or self._ends(text))
        found = self._tokens.forced.tokens(self._accepted, some, ends, self._may_come)
        return found if found and self._inner.validate_tokens(found) == len(found) else []

    def stopped(self) -> bool:
        """Whether only the end of the sequence may follow. Raises GrammarError."""
        self._check()
        return self._ended or self._inner.is_stopped()

    def rollback(self, tokens: int) -> None:
        """Undo the last `tokens` that were accepted."""
        if not 0 <= tokens <= len(self._accepted) + self._ended:
            raise ValueError(f"tokens: {tokens} of {len(self._accepted) + self._ended}")
        if tokens:
            self._certain = None
        if tokens and self._ended:
            self._ended = False
            tokens -= 1
        if tokens:
            self._inner.rollback(tokens)
            self._check()
            del self._accepted[-tokens:]

    def copy(self) -> "GuidanceMatcher":
        """Another matcher at the same place."""
        return GuidanceMatcher(self._inner.deep_copy(), self._tokens, self._grammar, self._accepted, self._ended)

    def _after(self, text: bytes) -> LLMatcher | None:
        """The position after `text`; None where the language does not have it."""
        after = self._inner.deep_copy()
        spelled = self._tokens.spelled(text)
        return after if after.try_consume_tokens(spelled) == len(spelled) else None

    def _ends(self, text: bytes) -> bool:
        """Whether nothing may follow `text`."""
        after = self._after(text)
        return after is not None and after.is_stopped() and not after.is_error()

    def _may_come(self, text: bytes, tokens: list[int]) -> bool:
        """Whether one of `tokens` may follow `text`; True where that is unknown."""
        after = self._after(text)
        if after is None:
            return True
        # One that may come is mostly among the first.
        if any(after.validate_tokens([token]) for token in tokens[:MOST_TRIED]):
            return True
        if len(tokens) <= MOST_TRIED:
            return after.is_error()
        mask = self._mask(after)
        chosen = np.array(tokens)
        return after.is_error() or bool(((mask[chosen >> 5] >> (chosen & 31)) & 1).any())

    def _mask(self, matcher: LLMatcher) -> NDArray[np.int32]:
        """The model's row from the library's, which has the tokens that the library knows and one more."""
        row = np.zeros(self._tokens.words, np.int32)
        given = np.frombuffer(matcher.compute_bitmask(), np.int32)[: self._tokens.words]
        np.bitwise_and(given, self._tokens.text_mask[: len(given)], out=row[: len(given)])
        return row

    def _check(self) -> None:
        if self._inner.is_error():
            reason = (self._inner.get_error().strip().splitlines() or ["it failed"])[0]
            raise GrammarError("", f"it is too complex: {reason[:200]}")

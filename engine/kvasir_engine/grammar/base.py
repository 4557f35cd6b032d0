"""The grammar interface of the engine: compiled once for a tokenizer, matched token by token in each sequence."""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kvasir_engine.protocol import Grammar


class GrammarError(Exception):
    """A grammar that cannot be served: `part` is the place in its source ("" for the whole), `reason` the cause.

    The reason is one sentence for the client, without a full stop.
    """

    def __init__(self, part: str, reason: str) -> None:
        super().__init__(f"{part}: {reason}" if part else reason)
        self.part = part
        self.reason = reason


class GrammarBusy(Exception):
    """Too many grammars are being compiled; the client may retry."""


class GrammarMatcher(Protocol):
    """A sequence's position in the language. Not thread-safe, but two matchers may run at once.

    A step that exceeds the limits raises GrammarError; the sequence cannot continue then.
    """

    def accept(self, token: int) -> bool:
        """Advance by `token`. Returns False, and changes nothing, if the language does not have it here."""
        ...

    def fill_mask(self, words: NDArray[np.int32]) -> None:
        """Set one row, `ceil(vocabulary / 32)` words: bit `token % 32` of word `token // 32` says whether `token`
        may come next.

        The vocabulary is the model's; its padding beyond the tokenizer's is never allowed. Where tokens are forced,
        only the first of them is set, though others that spell the same text would be accepted: so appending
        `forced_tokens` and sampling by the masks give the same tokens.
        """
        ...

    def forced_tokens(self) -> list[int]:
        """The tokens that the tokenizer gives for the text that must come from here; empty if none.

        Leaves out the last ones, whose text could still join with what follows into another token.
        """
        ...

    def stopped(self) -> bool:
        """Whether only the end of the sequence may follow."""
        ...

    def rollback(self, tokens: int) -> None:
        """Undo the last `tokens` accepted tokens."""
        ...

    def copy(self) -> "GrammarMatcher":
        """Another matcher at the same position."""
        ...


class CompiledGrammar(Protocol):
    """A grammar in a tokenizer's tokens. Thread-safe."""

    def matcher(self) -> GrammarMatcher:
        """A matcher at the beginning."""
        ...


class GrammarCompiler(Protocol):
    """Compiles for one tokenizer, and caches compiled grammars within a bound. Thread-safe."""

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        """Compile the grammar; takes a bounded time. Raises GrammarError and GrammarBusy."""
        ...

"""What the engine needs of a grammar: compiled once for a tokenizer, matched token by token for each sequence."""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kvasir_engine.protocol import Grammar


class GrammarError(Exception):
    """A grammar that cannot be served: `part` is the place in its source ("" for the whole), `reason` why.

    The reason is one sentence for the client, without a full stop.
    """

    def __init__(self, part: str, reason: str) -> None:
        super().__init__(f"{part}: {reason}" if part else reason)
        self.part = part
        self.reason = reason


class GrammarBusy(Exception):
    """Too many grammars are being compiled; the request may come again."""


class GrammarMatcher(Protocol):
    """Where one sequence is in the language. Not for use by two threads at once; two matchers may be.

    What takes more than one step may raises GrammarError; the sequence cannot go on then.
    """

    def accept(self, token: int) -> bool:
        """Go on by `token`. False: it is not in the language here, and nothing has changed."""
        ...

    def fill_mask(self, words: NDArray[np.int32]) -> None:
        """Set one row, `ceil(vocabulary / 32)` words: bit `token % 32` of word `token // 32` is whether `token` may
        come next. The vocabulary is the model's; what pads it beyond the tokenizer's is never allowed. Where tokens
        are forced, only the first of them is, though others that spell the same text would be accepted: so whoever
        appends `forced_tokens` gets what whoever follows the masks gets.
        """
        ...

    def forced_tokens(self) -> list[int]:
        """The tokens that the tokenizer would give for the text that must come from here.

        Without the last of them whose text could still be one token with what comes after; empty if none.
        """
        ...

    def stopped(self) -> bool:
        """Whether only the end of the sequence may follow."""
        ...

    def rollback(self, tokens: int) -> None:
        """Undo the last `tokens` that were accepted."""
        ...

    def copy(self) -> "GrammarMatcher":
        """Another matcher at the same place."""
        ...


class CompiledGrammar(Protocol):
    """A grammar in a tokenizer's tokens. For use in threads."""

    def matcher(self) -> GrammarMatcher:
        """A matcher at the beginning."""
        ...


class GrammarCompiler(Protocol):
    """Compiles for one tokenizer, and keeps what it compiled within a bound. For use in threads."""

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        """Blocks for as long as compiling may take, never longer. Raises GrammarError and GrammarBusy."""
        ...

"""Grammars for the toy model: at each place a set of tokens may come, one of two by the token before."""

from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
import numpy as np
from numpy.typing import NDArray
from toy import VOCAB

from kvasir_engine.core.grammar_service import GrammarService
from kvasir_engine.grammar.base import GrammarError
from kvasir_engine.protocol import Grammar

END = VOCAB - 1
Places = list[tuple[list[int], list[int]]]
"""What may come at each place after an even token, and after an odd one; the end after the last."""


def grammar_of(places: Places) -> Grammar:
    return Grammar("regex", msgspec.json.encode(places).decode())


class ToyMatcher:
    """A GrammarMatcher."""

    def __init__(self, places: Places) -> None:
        self.places = places
        self.tokens: list[int] = []

    def allowed(self) -> list[int]:
        """What may come next, in order."""
        at = len(self.tokens)
        if END in self.tokens or at >= len(self.places):
            return [END]
        return sorted(self.places[at][self.tokens[-1] % 2 if at else 0])

    def accept(self, token: int) -> bool:
        if token not in self.allowed():
            return False
        self.tokens.append(token)
        return True

    def fill_mask(self, words: NDArray[np.int32]) -> None:
        bits = np.zeros(len(words) * 32, np.uint8)
        bits[self.allowed()] = 1
        words[:] = np.packbits(bits, bitorder="little").view(np.int32)

    def forced_tokens(self) -> list[int]:
        ahead = self.copy()
        while len(only := ahead.allowed()) == 1 and only != [END]:
            ahead.accept(only[0])
        return ahead.tokens[len(self.tokens) :]

    def stopped(self) -> bool:
        return self.allowed() == [END]

    def rollback(self, tokens: int) -> None:
        del self.tokens[len(self.tokens) - tokens :]

    def copy(self) -> "ToyMatcher":
        copied = ToyMatcher(self.places)
        copied.tokens = self.tokens[:]
        return copied


class ToyGrammar:
    """A CompiledGrammar."""

    def __init__(self, places: Places) -> None:
        self.places = places

    def matcher(self) -> ToyMatcher:
        return ToyMatcher(self.places)


class ToyCompiler:
    """A GrammarCompiler."""

    def compile(self, grammar: Grammar) -> ToyGrammar:
        try:
            return ToyGrammar(msgspec.json.decode(grammar.source, type=Places))
        except msgspec.MsgspecError as error:
            raise GrammarError("places[0]", "it is no list of sets") from error


@contextmanager
def service(jump: bool = True) -> Iterator[GrammarService]:
    """A service whose threads end with the block."""
    made = GrammarService(ToyCompiler(), VOCAB, jump)
    try:
        yield made
    finally:
        made.close()

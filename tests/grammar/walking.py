"""Walks through a grammar: by its masks, as a model would, or token by token of a given text."""

import random
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from vocabularies import vocabulary

from kvasir_engine.grammar.compiler import GuidanceCompiler
from kvasir_engine.grammar.matcher import GuidanceMatcher
from kvasir_engine.grammar.vocabulary import Vocabulary
from kvasir_engine.protocol import Grammar


@lru_cache
def compiler(kind: str) -> GuidanceCompiler:
    return GuidanceCompiler(vocabulary(kind))


def matcher(kind: str, grammar: Grammar) -> GuidanceMatcher:
    return compiler(kind).compile(grammar).matcher()


def allowed(matcher: GuidanceMatcher, vocabulary: Vocabulary) -> NDArray[np.int64]:
    row = np.zeros(-(-vocabulary.size // 32), np.int32)
    matcher.fill_mask(row)
    return np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little"))


def text_of(tokens: list[int], vocabulary: Vocabulary) -> bytes:
    return b"".join(vocabulary.tokens[token] for token in tokens)


def walk(
    matcher: GuidanceMatcher, vocabulary: Vocabulary, rng: random.Random, *, jump: bool, most: int = 400
) -> list[int]:
    """Random tokens from the matcher's place, with a bias to what closes, to the end or until there are `most`; by
    masks, or with `jump` what is forced at once.
    """
    matcher = matcher.copy()
    tokens: list[int] = []
    while not matcher.stopped() and len(tokens) < most:
        if jump and (forced := matcher.forced_tokens()):
            for token in forced:
                assert matcher.accept(token)
            tokens += forced
            continue
        choices = allowed(matcher, vocabulary)
        ending = [token for token in choices if token in vocabulary.eos]
        closing = [token for token in choices if vocabulary.tokens[token] in CLOSING]
        hurry = rng.random() < 0.3 + len(tokens) / most
        token = int(rng.choice(ending if ending and hurry else closing if closing and hurry else choices))
        assert matcher.accept(token)
        if token in vocabulary.eos:
            break
        tokens.append(token)
    return tokens


CLOSING = frozenset({b'"', b"}", b"]", b'"}', b'"]', b"}}", b"]}", b'",', b'":', b"0", b"1"})


def accepts(matcher: GuidanceMatcher, vocabulary: Vocabulary, text: str) -> bool:
    """Whether the tokenizer's tokens of `text` are the grammar's, up to an end."""
    matcher = matcher.copy()
    return all(matcher.accept(token) for token in vocabulary.encode(text)) and matcher.accept(vocabulary.eos[0])

"""What is known of a place in a grammar is what would be found there, and is kept within a bound."""

import json
import random

import numpy as np
import pytest
from schema_families import schemas
from vocabularies import vocabulary
from walking import walk

from kvasir_engine.grammar.compiler import GuidanceCompiler
from kvasir_engine.grammar.known_places import MOST_TOKENS, KnownPlaces, Place
from kvasir_engine.protocol import Grammar

MASK = np.ones(64, np.int32)


@pytest.mark.parametrize("kind", ["gpt2", "sentencepiece"])
def test_a_second_walk_finds_the_rows_of_the_first(kind: str) -> None:
    tokens = vocabulary(kind)
    known, fresh = GuidanceCompiler(tokens), GuidanceCompiler(tokens)
    for name, schema in list(schemas())[::30]:
        grammar = Grammar("json_schema", json.dumps(schema), "")
        compiled, other = known.compile(grammar), fresh.compile(grammar)
        walked = walk(compiled.matcher(), tokens, random.Random(name), jump=False, most=80)
        again, right = compiled.matcher(), other.matcher()
        for token in walked:
            rows = [np.zeros(-(-tokens.size // 32), np.int32) for _ in range(2)]
            again.fill_mask(rows[0])
            fresh._tokens.places = KnownPlaces(0)
            right.fill_mask(rows[1])
            assert np.array_equal(*rows)
            assert again.accept(token)
            assert right.accept(token)


def test_places_of_one_grammar_are_no_others() -> None:
    places = KnownPlaces()
    places.keep(1, [5, 6], Place((7,)))
    assert places.find(1, [5, 6]) == Place((7,))
    assert places.find(2, [5, 6]) is None
    assert places.find(1, [5]) is None


def test_the_least_recently_used_go_when_there_are_too_many_bytes() -> None:
    places = KnownPlaces(3000)
    for token in range(100):
        places.keep(0, [token], Place((), MASK))
        places.find(0, [0])
        assert places.bytes <= 3000
    assert places.find(0, [0]) is not None
    assert places.find(0, [99]) is not None
    assert places.find(0, [1]) is None
    for _ in range(10):
        places.keep(0, [99], Place((), MASK))
    assert places.find(0, [0]) is not None
    places.keep(0, list(range(MOST_TOKENS + 1)), Place(()))
    assert places.find(0, list(range(MOST_TOKENS + 1))) is None

"""What grammars cost by themselves: compiling, masks, forced tokens. No model is run.

    python bench/grammar.py FOLDER                 # a model's folder: its tokenizer
    python bench/grammar.py FOLDER --size 128000   # its vocabulary made as large as that
    python bench/grammar.py FOLDER --xgrammar      # xgrammar beside llguidance, where it is installed

Prints one line a measurement: the median of several runs, in milliseconds.
"""

import argparse
import json
import platform
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from kvasir_engine.api.tokenizer import load_served_model
from kvasir_engine.api.vocabulary import vocabulary_of
from kvasir_engine.grammar.compiler import GuidanceCompiler
from kvasir_engine.grammar.matcher import GuidanceMatcher
from kvasir_engine.grammar.vocabulary import Vocabulary
from kvasir_engine.protocol import Grammar

Schema = dict[str, Any]
TEXT = {"type": "string"}


def closed(properties: dict[str, Schema]) -> Schema:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


ADDRESS = closed({"street": TEXT, "city": TEXT, "postal_code": {"type": "string", "pattern": "^[0-9]{5}$"}})
ITEM = closed({"sku": TEXT, "quantity": {"type": "integer", "minimum": 1}, "price": {"type": "number"}})
SCHEMAS: dict[str, Schema] = {
    "nested": closed(
        {
            "order": TEXT,
            "created": {"type": "string", "format": "date-time"},
            "customer": closed({"name": TEXT, "email": {"type": "string", "format": "email"}, "address": ADDRESS}),
            "items": {"type": "array", "items": ITEM, "minItems": 1},
            "status": {"enum": ["new", "paid", "sent", "closed"]},
        }
    ),
    "recursive": {
        "$ref": "#/$defs/node",
        "$defs": {"node": closed({"name": TEXT, "children": {"type": "array", "items": {"$ref": "#/$defs/node"}}})},
    },
    "500 values": closed({"country": {"enum": [f"value number {n}" for n in range(500)]}}),
}


def widened(vocabulary: Vocabulary, size: int) -> Vocabulary:
    """The same with pairs of its tokens for more tokens, up to `size`: as many and as long as large ones have."""
    texts = [token for token in vocabulary.tokens if token.isascii() and 2 < len(token) < 9]
    known, rng = set(vocabulary.tokens), random.Random(0)
    more: list[bytes] = []
    while len(vocabulary.tokens) + len(more) < size:
        pair = rng.choice(texts) + rng.choice(texts).lstrip()
        if pair not in known:
            known.add(pair)
            more.append(pair)
    return replace(vocabulary, tokens=(*vocabulary.tokens, *more), size=size)


def median(work: Callable[[], object], runs: int) -> float:
    taken = []
    for _ in range(runs):
        begun = time.perf_counter()
        work()
        taken.append(time.perf_counter() - begun)
    return statistics.median(taken) * 1000


def show(name: str, value: float | str) -> None:
    print(f"{name:58}{value:>12.3f}" if isinstance(value, float) else f"{name:58}{value:>12}")


def allowed(row: np.ndarray) -> np.ndarray:
    return np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little"))


PLACES = 16
"""At which the rows of a batch are."""
CLOSING = frozenset({b'"', b"}", b"]", b'"}', b'",', b"0", b"1"})


def go(matcher: GuidanceMatcher, vocabulary: Vocabulary, rng: random.Random, most: int) -> tuple[int, int, int]:
    """Random tokens, which close soon: tokens in all, those that were forced, and steps that need the model."""
    row = np.zeros(-(-vocabulary.size // 32), np.int32)
    tokens = forced = steps = 0
    closing = np.array([token in CLOSING for token in vocabulary.tokens])
    while tokens < most and not matcher.stopped():
        jump = matcher.forced_tokens()
        if jump:
            for token in jump:
                matcher.accept(token)
            tokens, forced = tokens + len(jump), forced + len(jump)
            continue
        matcher.fill_mask(row)
        choices = allowed(row)
        soon = choices[closing[choices]]
        chosen = soon if len(soon) and rng.random() < 0.4 else choices
        matcher.accept(int(chosen[rng.randrange(len(chosen))]))
        tokens, steps = tokens + 1, steps + 1
    return tokens, forced, steps


def measure(vocabulary: Vocabulary) -> None:
    show("tokenizer made ready", median(lambda: GuidanceCompiler(vocabulary), 3))
    for name, schema in SCHEMAS.items():
        for kind, whitespace in (("flexible", None), ("compact", "")):
            grammar = Grammar("json_schema", json.dumps(schema), whitespace)
            compiler = GuidanceCompiler(vocabulary, kept=0)
            compiler.compile(Grammar("regex", "a"))
            show(f"compile, {name}, {kind}", median(partial(compiler.compile, grammar), 5))
    compiler = GuidanceCompiler(vocabulary)
    for name, schema in SCHEMAS.items():
        begin = compiler.compile(Grammar("json_schema", json.dumps(schema), "")).matcher()
        rng = random.Random(0)
        for rows in (1, 64, 256):
            places = [begin.copy() for _ in range(min(rows, PLACES))]
            for matcher in places:
                go(matcher, vocabulary, rng, rng.randrange(5, 40))
            matchers = [places[row % PLACES].copy() for row in range(rows)]
            words = np.zeros((rows, -(-vocabulary.size // 32)), np.int32)

            def fill(matchers: list[GuidanceMatcher] = matchers, words: np.ndarray = words) -> None:
                for matcher, row in zip(matchers, words, strict=True):
                    matcher.fill_mask(row)

            fill()
            show(f"masks of {rows} rows, {name}, one thread", median(fill, 5))
        totals = [go(begin.copy(), vocabulary, random.Random(seed), 120) for seed in range(10)]
        tokens, forced, _ = (sum(column) for column in zip(*totals, strict=True))
        show(f"tokens that are forced, {name}, compact", f"{100 * forced / tokens:.0f}%")


def measure_xgrammar(vocabulary: Vocabulary) -> None:
    import xgrammar  # type: ignore[import-not-found]

    tokens = [token or b"<special>" for token in vocabulary.tokens]
    info = xgrammar.TokenizerInfo(
        tokens, vocab_type=xgrammar.VocabType.RAW, vocab_size=vocabulary.size, stop_token_ids=list(vocabulary.eos)
    )
    bitmask = xgrammar.allocate_token_bitmask(256, vocabulary.size)
    for name, schema in SCHEMAS.items():
        source = json.dumps(schema)

        def compile_it(source: str = source) -> object:
            compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
            return compiler.compile_json_schema(source, any_whitespace=False)

        show(f"xgrammar: compile, {name}, compact", median(compile_it, 3))
        compiled = compile_it()
        for rows in (1, 64, 256):
            places = [xgrammar.GrammarMatcher(compiled) for _ in range(min(rows, PLACES))]
            rng = random.Random(0)
            for matcher in places:
                for _ in range(rng.randrange(5, 40)):
                    matcher.fill_next_token_bitmask(bitmask, 0)
                    choices = allowed(bitmask[0].numpy())
                    if (
                        not matcher.accept_token(int(choices[rng.randrange(len(choices))]))
                        or matcher.is_terminated()
                    ):
                        break

            matchers = [places[row % PLACES] for row in range(rows)]

            def fill(matchers: list[Any] = matchers) -> None:
                for place, matcher in enumerate(matchers):
                    if not matcher.is_terminated():
                        matcher.fill_next_token_bitmask(bitmask, place)

            fill()
            show(f"xgrammar: masks of {rows} rows, {name}, one thread", median(fill, 5))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", type=int, default=0)
    parser.add_argument("--xgrammar", action="store_true")
    asked = parser.parse_args()
    vocabulary = vocabulary_of(load_served_model(asked.folder, "model"))
    if asked.size:
        vocabulary = widened(vocabulary, asked.size)
    print(f"llguidance {version('llguidance')}, {vocabulary.size} tokens, {platform.machine()}")
    measure(vocabulary)
    if asked.xgrammar:
        print(f"xgrammar {version('xgrammar')}")
        measure_xgrammar(vocabulary)


if __name__ == "__main__":
    main()

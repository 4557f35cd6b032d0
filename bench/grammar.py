"""What grammars cost by themselves: compiling, masks, forced tokens. No model is run.

    python bench/grammar.py                       # a vocabulary of 128,000, trained on Python's own library
    python bench/grammar.py --model FOLDER        # a model's tokenizer
    python bench/grammar.py --xgrammar            # xgrammar beside llguidance, where it is installed

Prints one line a measurement: the median of several runs, in milliseconds.
"""

import argparse
import json
import platform
import random
import statistics
import sysconfig
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from kvasir_engine.api.tokenizer import ServedModel, Tokenizer, load_served_model
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


def trained(size: int) -> ServedModel:
    """A byte-level BPE that splits words as Llama 3's does."""
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as RustTokenizer
    from transformers import PreTrainedTokenizerFast

    split = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    rust = RustTokenizer(models.BPE())
    rust.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    rust.decoder = decoders.ByteLevel()
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("**/*.py"))[:4000]
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=1,
        show_progress=False,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    rust.train_from_iterator((file.read_text(errors="replace") for file in files), trainer)
    tokenizer = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=rust, eos_token="<|end|>"))
    return ServedModel("trained", tokenizer, tokenizer.size, (0,), 0)


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


def go(matcher: GuidanceMatcher, vocabulary: Vocabulary, rng: random.Random, most: int) -> tuple[int, int, int]:
    """Random tokens, which close soon: tokens in all, those that were forced, and steps that need the model."""
    row = np.zeros(-(-vocabulary.size // 32), np.int32)
    tokens = forced = steps = 0
    closing = {b'"', b"}", b"]", b'"}', b'",', b"0", b"1"}
    while tokens < most and not matcher.stopped():
        jump = matcher.forced_tokens()
        if jump:
            for token in jump:
                matcher.accept(token)
            tokens, forced = tokens + len(jump), forced + len(jump)
            continue
        matcher.fill_mask(row)
        choices = allowed(row)
        soon = [token for token in choices if vocabulary.tokens[token] in closing]
        matcher.accept(int(rng.choice(soon if soon and rng.random() < 0.4 else list(choices))))
        tokens, steps = tokens + 1, steps + 1
    return tokens, forced, steps


def measure(vocabulary: Vocabulary) -> None:
    show("tokenizer made ready", median(lambda: GuidanceCompiler(vocabulary), 3))
    for name, schema in SCHEMAS.items():
        for kind, whitespace in (("flexible", None), ("compact", "")):
            grammar = Grammar("json_schema", json.dumps(schema), whitespace)
            compiler = GuidanceCompiler(vocabulary, kept=0)
            compiler.compile(Grammar("regex", "a"))
            show(f"compile, {name}, {kind}", median(lambda c=compiler, g=grammar: c.compile(g), 5))
    compiler = GuidanceCompiler(vocabulary)
    for name, schema in SCHEMAS.items():
        begin = compiler.compile(Grammar("json_schema", json.dumps(schema), "")).matcher()
        rng = random.Random(0)
        for rows in (1, 64, 256):
            matchers = [begin.copy() for _ in range(rows)]
            for matcher in matchers:
                go(matcher, vocabulary, rng, rng.randrange(40))
            words = np.zeros((rows, -(-vocabulary.size // 32)), np.int32)

            def fill(matchers: list[GuidanceMatcher] = matchers, words: np.ndarray = words) -> None:
                for matcher, row in zip(matchers, words, strict=True):
                    matcher.fill_mask(row)

            fill()
            show(f"masks of {rows} rows, {name}, one thread", median(fill, 5))
        totals = [go(begin.copy(), vocabulary, random.Random(seed), 200) for seed in range(20)]
        tokens, forced, _ = (sum(column) for column in zip(*totals, strict=True))
        show(f"tokens that are forced, {name}, compact", f"{100 * forced / tokens:.0f}%")


def measure_xgrammar(vocabulary: Vocabulary) -> None:
    import xgrammar

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
            matchers = [xgrammar.GrammarMatcher(compiled) for _ in range(rows)]
            rng = random.Random(0)
            for matcher in matchers:
                for _ in range(rng.randrange(40)):
                    matcher.fill_next_token_bitmask(bitmask, 0)
                    choices = allowed(bitmask[0].numpy())
                    if not matcher.accept_token(int(rng.choice(list(choices)))) or matcher.is_terminated():
                        break

            def fill(matchers: list[Any] = matchers) -> None:
                for place, matcher in enumerate(matchers):
                    if not matcher.is_terminated():
                        matcher.fill_next_token_bitmask(bitmask, place)

            fill()
            show(f"xgrammar: masks of {rows} rows, {name}, one thread", median(fill, 5))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--vocabulary", type=int, default=128_000)
    parser.add_argument("--xgrammar", action="store_true")
    asked = parser.parse_args()
    model = load_served_model(asked.model, "model") if asked.model else trained(asked.vocabulary)
    vocabulary = vocabulary_of(model)
    print(
        f"llguidance {version('llguidance')}, {vocabulary.size} tokens, {platform.processor() or platform.machine()}"
    )
    measure(vocabulary)
    if asked.xgrammar:
        print(f"xgrammar {version('xgrammar')}")
        measure_xgrammar(vocabulary)


if __name__ == "__main__":
    main()

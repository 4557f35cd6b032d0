"""What structured output costs and saves: SmolLM2 on this machine's CPUs, one engine, no HTTP.

    python -m bench.structured

Prints, of a set of nested-object schemas, the forward passes of sequences with jump-forward and by the masks alone,
both one request at a time and 16 at once, in turn, with their times; the rate of 16 requests with a schema against
16 without one, of the same numbers of tokens; and the time to the first token of a grammar that was not compiled
yet and of one that was. Each text is parsed and validated.
"""

import itertools
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import jsonschema
from bench.systems import MODEL
from rich.console import Console
from rich.table import Table

from kvasir_engine.api.plain_tokenizer import load_plain_model
from kvasir_engine.api.vocabulary import vocabulary_of
from kvasir_engine.core.engine import Engine
from kvasir_engine.core.grammar_service import GrammarService
from kvasir_engine.core.scheduler import Limits
from kvasir_engine.executor.model_runner import ModelRunner
from kvasir_engine.grammar.compiler import GuidanceCompiler
from kvasir_engine.model.loading.resolver import resolve
from kvasir_engine.protocol import Delta, Grammar, Sampling, Submit

ROUNDS, BATCH, MOST_TOKENS, PAGE, PAGES = 2, 16, 256, 16, 640
IDS = itertools.count()


def objects(**properties: Any) -> dict[str, Any]:
    """A schema of an object that has these and no other properties."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


TEXT = {"type": "string", "maxLength": 16}
NUMBER = {"type": "integer", "minimum": 0, "maximum": 9999}
FLAG = {"type": "boolean"}


def one_of(*names: str) -> dict[str, Any]:
    """A string that is one of these."""
    return {"enum": list(names)}


ADDRESS = objects(
    street=TEXT, house_number=NUMBER, postal_code=NUMBER, country=one_of("Norway", "Sweden", "Iceland")
)
SCHEMAS: dict[str, dict[str, Any]] = {
    "person": objects(first_name=TEXT, last_name=TEXT, age_in_years=NUMBER, home_address=ADDRESS, is_employed=FLAG),
    "order": objects(
        order_number=NUMBER,
        customer=objects(customer_name=TEXT, loyalty_level=one_of("bronze", "silver", "gold"), subscribed=FLAG),
        shipping=objects(method=one_of("standard", "express"), destination=ADDRESS, insured=FLAG),
        payment_status=one_of("pending", "authorized", "captured", "refunded"),
    ),
    "machine": objects(
        hostname=TEXT,
        hardware=objects(processor_count=NUMBER, memory_in_gibibytes=NUMBER, has_accelerator=FLAG),
        network=objects(interface_name=TEXT, maximum_transfer_unit=NUMBER, is_virtual=FLAG),
        operating_system=objects(distribution=one_of("debian", "fedora", "alpine"), kernel_version=TEXT),
    ),
    "review": objects(
        product=objects(product_name=TEXT, category=one_of("book", "film", "record"), price_in_cents=NUMBER),
        rating=objects(overall=NUMBER, would_recommend=FLAG, verified_purchase=FLAG),
        summary=TEXT,
    ),
}


def grammar_of(schema: dict[str, Any]) -> Grammar:
    """Compact JSON of it."""
    return Grammar("json_schema", json.dumps(schema), whitespace="")


@dataclass
class Reported:
    """What requests were told, by id: tokens, and the seconds to the first."""

    seconds: float = 0.0
    steps: int = 0
    sampled: int = 0
    forced: int = 0
    tokens: dict[str, list[int]] = field(default_factory=dict)
    first: dict[str, float] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """All tokens."""
        return sum(map(len, self.tokens.values()))


class Bench:
    """One model, and engines over it that do not run at the same time."""

    def __init__(self) -> None:
        self.folder = resolve(MODEL)
        self.model = load_plain_model(self.folder)
        self.vocabulary = vocabulary_of(self.model)
        self.runner = ModelRunner(self.folder, device="cpu", pages=PAGES, page_size=PAGE)
        self.compiler = GuidanceCompiler(self.vocabulary)

    def prompt(self, about: str, number: int = 0) -> list[int]:
        """A prompt that asks for an object; the number makes prompts that share little."""
        text = f"<|im_start|>user\n{number}: Describe some {about} as JSON.<|im_end|>\n<|im_start|>assistant\n"
        return self.model.tokenizer.encode(text)

    def run(self, requests: Sequence[tuple[list[int], Sampling]], jump: bool, together: int) -> Reported:
        """The requests, so many at a time, in an engine without a cached prefix."""
        service = GrammarService(self.compiler, self.runner.vocab, jump)
        engine = Engine(self.runner, "both", Limits(576, 64, PAGE), 2048, 1, None, grammars=service)
        told = Reported()
        began = time.perf_counter()
        for start in range(0, len(requests), together):
            submitted = time.perf_counter()
            for prompt, sampling in requests[start : start + together]:
                engine.submit(1, Submit(f"r{next(IDS)}", prompt, sampling))
            while engine.jobs:
                engine.step()
                for delta in engine.drain().get(1, []):
                    assert isinstance(delta, Delta)
                    assert delta.failure is None, delta.failure
                    told.tokens.setdefault(delta.id, []).extend(delta.tokens)
                    told.first.setdefault(delta.id, time.perf_counter() - submitted)
        told.seconds = time.perf_counter() - began
        service.close()
        told.steps = engine.stats.eager_steps
        told.sampled, told.forced = engine.stats.requests.generated, engine.stats.requests.forced
        return told

    def text(self, tokens: list[int]) -> str:
        """The text of an answer, without the token that ends it."""
        return b"".join(map(self.model.tokenizer.token_bytes, tokens)).decode()

    def check(self, told: Reported, schemas: Sequence[dict[str, Any]]) -> None:
        """Raise unless each answer that is whole validates."""
        for tokens, schema in zip(told.tokens.values(), schemas, strict=True):
            jsonschema.validate(json.loads(self.text(tokens)), schema)

    def set_of(self, count: int) -> tuple[list[tuple[list[int], Sampling]], list[dict[str, Any]]]:
        """So many requests over the schemas, with the schema of each."""
        names = list(itertools.islice(itertools.cycle(SCHEMAS), count))
        eos = list(self.model.eos)
        requests = [
            (
                self.prompt(name, number),
                Sampling(MOST_TOKENS, grammar=grammar_of(SCHEMAS[name]), stop_token_ids=eos),
            )
            for number, name in enumerate(names)
        ]
        return requests, [SCHEMAS[name] for name in names]


@cache
def bench() -> Bench:
    """Loaded once."""
    return Bench()


def nested(together: int, count: int) -> Table:
    """Jump-forward against the masks alone, in turn."""
    table = Table(title=f"{count} answers of nested objects, {together} at a time")
    for name in ("", "sampled tokens", "forced", "steps", "seconds", "tokens/s"):
        table.add_column(name)
    requests, schemas = bench().set_of(count)
    found: dict[bool, list[Reported]] = {False: [], True: []}
    for _ in range(ROUNDS):
        for jump in found:
            told = bench().run(requests, jump, together)
            bench().check(told, schemas)
            found[jump].append(told)
    best = {jump: min(some, key=lambda each: each.seconds) for jump, some in found.items()}
    for jump, told in best.items():
        row = told.sampled, told.forced, told.steps, f"{told.seconds:.2f}", f"{told.count / told.seconds:.0f}"
        table.add_row("jump-forward" if jump else "masks alone", *map(str, row))
    saved = 1 - best[True].sampled / best[False].sampled
    same = list(best[True].tokens.values()) == list(best[False].tokens.values())
    table.caption = (
        f"{saved:.0%} of the sequences' forward passes saved, {best[False].seconds / best[True].seconds:.2f} times "
        f"as fast; the tokens are {'the same' if same else 'not all the same'}"
    )
    return table


def against_free() -> Table:
    """16 at once with a schema, against 16 without one that generate as many tokens each, in turn."""
    table = Table(title=f"{BATCH} at once, masks alone, against {BATCH} without a schema")
    for name in ("", "tokens", "steps", "ms a step", "tokens/s"):
        table.add_column(name)
    requests, _ = bench().set_of(BATCH)
    lengths = [len(tokens) for tokens in bench().run(requests, False, BATCH).tokens.values()]
    free = [(prompt, Sampling(length)) for (prompt, _), length in zip(requests, lengths, strict=True)]
    found: dict[str, list[Reported]] = {"with a schema": [], "without": [], "with a schema, jump-forward": []}
    for _ in range(ROUNDS):
        found["with a schema"].append(bench().run(requests, False, BATCH))
        found["without"].append(bench().run(free, False, BATCH))
        found["with a schema, jump-forward"].append(bench().run(requests, True, BATCH))
    rates = {}
    for name, some in found.items():
        told = min(some, key=lambda each: each.seconds)
        rates[name] = told.count / told.seconds
        milliseconds = told.seconds / told.steps * 1e3
        table.add_row(name, str(told.count), str(told.steps), f"{milliseconds:.1f}", f"{rates[name]:.0f}")
    share, jumped = (
        rates["with a schema"] / rates["without"],
        rates["with a schema, jump-forward"] / rates["without"],
    )
    table.caption = f"{share:.3f} of the rate without a schema by the masks alone, {jumped:.2f} with jump-forward"
    return table


def first_token() -> Table:
    """The time to the first token, of grammars that are new and of the same again."""
    table = Table(title="seconds to the first token, one request at a time: the median")
    for name in ("", "seconds"):
        table.add_column(name)
    cold, warm, free = [], [], []
    for number in range(12):
        schema = objects(**{f"field_{number}": TEXT, **SCHEMAS["order"]["properties"]})
        how = Sampling(2, grammar=grammar_of(schema))
        for found, sampling in ((cold, how), (warm, how), (free, Sampling(2))):
            told = bench().run([(bench().prompt("order", next(IDS)), sampling)], True, 1)
            found.extend(told.first.values())
    for name, some in (("cold grammar", cold), ("warm grammar", warm), ("no grammar", free)):
        table.add_row(name, f"{statistics.median(some):.4f}")
    return table


def main() -> None:
    """See the module's docstring."""
    console = Console()
    measures = (lambda: nested(1, 4), lambda: nested(BATCH, BATCH), against_free, first_token)
    for measure in measures:
        console.print(measure())


if __name__ == "__main__":
    main()

"""What cannot be served is refused with the part that is wrong, or what takes too much, in bounded time."""

import asyncio
import dataclasses
import json
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from vocabularies import vocabulary
from walking import compiler

from kvasir_engine.api.grammar_check import CheckLimits, GrammarCheck
from kvasir_engine.grammar.base import GrammarBusy, GrammarError
from kvasir_engine.protocol import Grammar


def schema(value: Any) -> Grammar:
    return Grammar("json_schema", value if isinstance(value, str) else json.dumps(value))


def regex(source: str) -> Grammar:
    return Grammar("regex", source)


def tags(**fields: Any) -> Grammar:
    return Grammar("structural_tag", json.dumps({"type": "structural_tag", **fields}))


def endless(**more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": {"x": {"$ref": "#/$defs/a"}}, "required": ["x"], **more}


CIRCLE = {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}
ENDLESS_LIST = {"properties": {"l": {"type": "array", "items": {"$ref": "#/properties/l"}, "minItems": 1}}}
NEITHER = {"allOf": [{"type": "string"}, {"type": "integer"}]}
CONTRADICTION = {"type": "object", "properties": {"a": NEITHER}, "required": ["a"]}
OTHER_TAG = [{"begin": "<g>", "schema": {}, "end": "</g>"}]
WRONG_SCHEMA = {"type": "json_schema", "json_schema": {"items": {"type": "x"}}}

REFUSED: dict[str, tuple[Grammar, str, str]] = {
    "no JSON": (schema("{"), "", "not JSON"),
    "a list": (schema([1]), "", "object or a boolean"),
    "a type that is none": (schema({"properties": {"a": {"type": "int"}}}), "/properties/a/type", "'int'"),
    "an unknown keyword": (schema({"items": {"minLenght": 2}}), "/items/minLenght", "not supported"),
    "a keyword that is not enforced": (schema({"not": {"type": "string"}}), "/not", "not supported"),
    "unique items": (schema({"type": "array", "uniqueItems": True}), "/uniqueItems", "not supported"),
    "conditions": (schema({"if": {}, "then": {}}), "/if", "not supported"),
    "names of properties": (schema({"propertyNames": {"pattern": "a"}}), "/propertyNames", "not supported"),
    "the library's own options": (schema({"x-guidance": {"lenient": True}}), "/x-guidance", "not supported"),
    "draft 4's bounds": (schema({"exclusiveMinimum": True}), "/exclusiveMinimum", "a number"),
    "many names that may be one": (schema({"minProperties": 2}), "/minProperties", "number of required properties"),
    "a negative length": (schema({"minLength": -1}), "/minLength", "0 or more"),
    "half a length": (schema({"minLength": 1.5}), "/minLength", "0 or more"),
    "a keyword of odd characters": (schema({"a~/b": 1}), "/a~0~1b", "not supported"),
    "names that are none": (schema({"required": ["a", 1]}), "/required", "list of names"),
    "an empty enum": (schema({"enum": []}), "/enum", "not empty"),
    "an empty anyOf": (schema({"anyOf": []}), "/anyOf", "not empty"),
    "an unknown format": (schema({"properties": {"p": {"format": "phone"}}}), "/properties/p/format", "'phone'"),
    "a remote reference": (schema({"$ref": "https://example.com/s.json"}), "/$ref", "not within"),
    "a reference to nothing": (schema({"items": {"$ref": "#/$defs/b"}}), "/items/$ref", "no '#/[$]defs/b'"),
    "a reference to no schema": (schema({"title": "t", "$ref": "#/title"}), "/$ref", "not a schema"),
    "an id inside": (schema({"items": {"$id": "https://example.com"}}), "/items/$id", "at the top"),
    "references in a circle": (schema(CIRCLE), "", "never ends"),
    "an endless object": (schema(endless(**{"$defs": {"a": endless()}})), "", "never ends"),
    "an endless list": (schema(ENDLESS_LIST), "/properties/l", "never ends"),
    "types that contradict": (schema(CONTRADICTION), "/properties/a", "[Uu]nsatisfiable"),
    "nothing at all": (schema("false"), "", "no value"),
    "bounds that cross": (schema({"type": "integer", "minimum": 5, "maximum": 3}), "", "Unsatisfiable"),
    "a pattern that is none": (
        schema({"properties": {"p": {"type": "string", "pattern": "(a"}}}),
        "/properties/p",
        "unclosed group",
    ),
    "a look ahead": (
        schema({"type": "array", "items": {"anyOf": [{"type": "string", "pattern": "^(?=a)b"}]}}),
        "/items/anyOf/0",
        "look-around",
    ),
    "a deep schema": (schema('{"items":' * 10_000 + "{}" + "}" * 10_000), "", "levels deep"),
    "a schema somewhat too deep": (schema('{"items":' * 70 + "{}" + "}" * 70), "", "levels deep"),
    "a wide schema": (schema({"enum": list(range(60_000))}), "", "more than 50000 values"),
    "many properties": (
        schema({"properties": {f"p{n}": {} for n in range(2001)}}),
        "/properties",
        "more than 2000",
    ),
    "many items": (schema({"minItems": 10**6}), "/minItems", "more than"),
    "a great factor": (schema({"type": "integer", "multipleOf": 1_000_003}), "/multipleOf", "at most"),
    "a factor of 0": (schema({"multipleOf": 0}), "/multipleOf", "above 0"),
    "an endless number": (schema('{"const": 1e999}'), "", "out of range"),
    "half a character": (schema('{"const": "\\ud800"}'), "", "surrogate"),
    "repetitions of repetitions": (regex("(a{1000}){1000}"), "", "more than 10000 times"),
    "repetitions in a pattern": (schema({"pattern": "^(a{1000}){1000}$"}), "/pattern", "more than 10000 times"),
    "a regex that is none": (regex("(a"), "", "unclosed group"),
    "a backreference": (regex(r"(a)\1"), "", "backreferences"),
    "a regex of bytes": (regex(r"(?-u:\xff)"), "", "invalid UTF-8"),
    "a regex of nothing": (regex(r"[^\s\S]"), "", "no text"),
    "no choices": (Grammar("choice", "[]"), "", "not empty"),
    "an empty choice": (Grammar("choice", '["a", ""]'), "", "cannot be empty"),
    "choices that are numbers": (Grammar("choice", "[1]"), "", "list of texts"),
    "a grammar that is none": (Grammar("lark", "start: b\nb: ((("), "line 2, column", "Expected"),
    "an unknown rule": (Grammar("lark", 'start: "a"\n  | x'), "line 1, column", "unknown name"),
    "rules in a circle": (Grammar("lark", "start: a\na: b\nb: a"), "", "no text"),
    "a rule's temperature": (Grammar("lark", "start: a\na[temperature=0.5]: /x/"), "", "'temperature'"),
    "a library's option": (
        Grammar("lark", '%llguidance {"allow_invalid_utf8": true}\nstart: "a"'),
        "%llguidance",
        "not supported",
    ),
    "an EBNF without a root": (Grammar("ebnf", 'a ::= "x"'), "", "root"),
    "an EBNF that is none": (Grammar("ebnf", "root ::= ("), "", "Expected"),
    "an EBNF with an unknown escape": (Grammar("ebnf", r'root ::= "\q"'), "", "escape"),
    "white space that is none": (Grammar("json_object", "", "x*"), "whitespace", "spaces"),
    "white space of a regex": (Grammar("regex", "a", " "), "whitespace", "only JSON"),
    "tags of an unknown kind": (tags(format={"type": "xml"}), "/format/type", "one of"),
    "tags of no kind": (tags(format=[1]), "/format/type", "one of"),
    "no tags": (tags(), "/structures", "missing"),
    "a tag without its trigger": (tags(triggers=["<f"], structures=OTHER_TAG), "/tags/0/begin", "triggers"),
    "a tag with a wrong schema": (
        tags(format={"type": "tag", "begin": "<f>", "content": WRONG_SCHEMA, "end": "</f>"}),
        "/format/content/json_schema/items/type",
        "'x'",
    ),
}

SERVED: dict[str, Grammar] = {
    "an exponential regex": regex("(a|aa|b)*c(a|b){40}"),
    "another": regex("(.*a.*b.*c){20}x"),
    "a long text": regex("a{10000}"),
    "a long list": schema({"type": "array", "items": {"type": "integer"}, "maxItems": 10_000}),
    "a long string": schema({"type": "string", "maxLength": 1_000_000}),
    "500 values": schema({"enum": [f"value number {n}" for n in range(500)]}),
    "10,000 values": schema({"enum": [f"{n}" for n in range(10_000)]}),
    "a deep schema": schema('{"items":' * 60 + "{}" + "}" * 60),
    "a recursive schema": schema({"type": "object", "properties": {"next": {"$ref": "#"}}}),
    "labels": schema({"$id": "https://example.com/x", "title": "T", "x-order": 1, "$comment": "c", "type": "null"}),
    "what restricts nothing": schema({"uniqueItems": False, "unevaluatedProperties": True}),
    "anything": schema("true"),
    "many references": schema(
        {
            "$defs": {f"d{n}": {"allOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(25)}
            | {"d25": {"type": "object"}},
            "$ref": "#/$defs/d0",
        }
    ),
    "left recursion": Grammar("lark", 'start: start "a" | "b"'),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_served_is_refused_with_its_part(name: str) -> None:
    grammar, part, reason = REFUSED[name]
    with pytest.raises(GrammarError, match=reason) as raised:
        compiler("bytes").compile(grammar)
    assert raised.value.part.startswith(part)
    assert (raised.value.part == "") == (part == "")
    assert "\n" not in raised.value.reason
    assert not raised.value.reason.endswith(".")


@pytest.mark.parametrize("name", SERVED)
def test_what_looks_costly_and_is_not_is_served(name: str) -> None:
    compiler("gpt2").compile(SERVED[name])


@pytest.fixture
def checks() -> Iterator[Callable[..., GrammarCheck]]:
    made: list[GrammarCheck] = []

    def make(limits: CheckLimits | None = None) -> GrammarCheck:
        made.append(GrammarCheck(lambda: vocabulary("gpt2"), limits))
        return made[-1]

    yield make
    for each in made:
        each.close()


async def test_a_grammar_is_tried_in_a_process_and_its_answer_kept(checks: Callable[..., GrammarCheck]) -> None:
    check = checks()
    good, bad = schema({"type": "object"}), schema({"items": {"type": "x"}})
    assert not check.known(good)
    await check.checked(good)
    assert check.known(good)
    for _ in range(2):
        with pytest.raises(GrammarError) as raised:
            await check.checked(bad)
        assert raised.value.part == "/items/type"


async def test_what_takes_too_long_is_refused_and_what_comes_next_is_tried(
    checks: Callable[..., GrammarCheck],
) -> None:
    check = checks(CheckLimits(seconds=0.01, patience=600))
    costly = schema({"properties": {f"p{n}": {"type": "string", "pattern": f"^(a|b)*c{n}$"} for n in range(1500)}})
    for more in (0, 1):
        with pytest.raises(GrammarError, match=r"more than 0\.01 s of CPU time"):
            await check.checked(Grammar("json_schema", costly.source + " " * more))
    await checks().checked(schema({"type": "object"}))


async def test_a_process_that_gets_no_time_says_nothing_of_the_grammar(checks: Callable[..., GrammarCheck]) -> None:
    check = checks(CheckLimits(patience=600))
    await check.checked(schema({"title": "warm"}))
    check._limits = CheckLimits(seconds=600, patience=0.1)
    stopped = [each for each in check._free.queue if each is not None]
    for each in stopped:
        each._process.send_signal(signal.SIGSTOP)
    good = schema({"type": "object"})
    with pytest.raises(GrammarBusy, match=r"not tried within 0\.1 s"):
        await check.checked(good)
    assert not check.known(good)
    check._limits = CheckLimits(patience=600)
    await check.checked(good)


async def test_what_takes_too_much_memory_is_refused(checks: Callable[..., GrammarCheck]) -> None:
    check = checks(CheckLimits(memory=1))
    with pytest.raises(GrammarError, match="memory"):
        await check.checked(SERVED["10,000 values"])


def under_way(check: GrammarCheck) -> None:
    """Wait until a process tries a grammar."""
    until = time.monotonic() + 60
    while not check._used:
        assert time.monotonic() < until
        time.sleep(0.01)


async def test_closing_ends_the_process_that_tries_a_grammar_and_the_one_that_waits(
    checks: Callable[..., GrammarCheck],
) -> None:
    check = checks(CheckLimits(patience=600))
    first = await asyncio.gather(*(check.checked(schema({"title": str(n)})) for n in range(8)))
    assert first == [None] * 8
    processes = [each for each in check._free.queue if each is not None]
    for each in processes:
        each._process.send_signal(signal.SIGSTOP)
    asked = asyncio.ensure_future(check.checked(schema({"type": "object"})))
    await asyncio.to_thread(under_way, check)
    await asyncio.to_thread(check.close)
    with pytest.raises(GrammarBusy):
        await asked
    assert [each._process.returncode for each in processes] == [-signal.SIGKILL] * len(processes)
    with pytest.raises(GrammarBusy):
        check.check(schema({"type": "array"}))


async def test_a_model_without_an_end_takes_no_grammars() -> None:
    check = GrammarCheck(lambda: dataclasses.replace(vocabulary("bytes"), eos=()))
    with pytest.raises(GrammarError, match="no token that ends"):
        await check.checked(SERVED["anything"])
    check.close()

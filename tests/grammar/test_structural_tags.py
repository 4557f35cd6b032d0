"""Free text with constrained parts, and EBNF: what is and is not of the language."""

import json
import random
from typing import Any

import pytest
from vocabularies import vocabulary
from walking import accepts, allowed, matcher, text_of, walk

from kvasir_engine.protocol import Grammar

CITY = {"type": "object", "properties": {"city": {"enum": ["Oslo", "Bern"]}}, "required": ["city"]}
CALL = {"begin": "<fn=weather>", "schema": CITY | {"additionalProperties": False}, "end": "</fn>"}
TIME = {"begin": "<fn=time>", "schema": {"type": "null"}, "end": "</fn>"}
KINDS = ["gpt2", "llama3", "sentencepiece"]


def tags(**fields: Any) -> Grammar:
    return Grammar("structural_tag", json.dumps({"type": "structural_tag", **fields}))


def tag(content: dict[str, Any], begin: str = "<a>", end: str = "</a>") -> dict[str, Any]:
    return {"type": "tag", "begin": begin, "content": content, "end": end}


CALLS = tags(structures=[CALL, TIME], triggers=["<fn="])
ANY = {"type": "any_text"}
NUMBER = {"type": "regex", "pattern": "[0-9]+"}
END = {"type": "const_string", "value": ";"}
JSON = {"type": "json_schema", "json_schema": CITY}
TRIGGERED = {"type": "triggered_tags", "triggers": ["<a"], "tags": [tag(NUMBER)]}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("grammar", "text", "holds"),
    [
        (CALLS, "no call at all < fn", True),
        (CALLS, "", True),
        (CALLS, 'It is <fn=weather>{"city": "Oslo"}</fn> and <fn=time>null</fn>.', True),
        (CALLS, '<fn=weather>{"city": "Rome"}</fn>', False),
        (CALLS, "<fn=other>", False),
        (CALLS, "<fn=time>null", False),
        (tags(format={"type": "const_string", "value": "yes\n"}), "yes\n", True),
        (tags(format={"type": "const_string", "value": "yes"}), "yes!", False),
        (
            tags(format={"type": "sequence", "elements": [NUMBER, {"type": "const_string", "value": ";"}]}),
            "12;",
            True,
        ),
        (tags(format={"type": "or", "elements": [NUMBER, JSON]}), '{"city": "Bern"}', True),
        (tags(format={"type": "or", "elements": [NUMBER, JSON]}), "x", False),
        (tags(format=tag(ANY)), "<a>any\nthing < </a>", True),
        (tags(format=tag(ANY)), "<a>one</a>two</a>", False),
        (tags(format=TRIGGERED), "free <a>7</a> free <a>8</a>", True),
        (tags(format={**TRIGGERED, "at_least_one": True}), "free", False),
        (tags(format={**TRIGGERED, "at_least_one": True}), "free <a>1</a>", True),
        (tags(format={**TRIGGERED, "stop_after_first": True}), "free <a>1</a>", True),
        (tags(format={**TRIGGERED, "stop_after_first": True}), "free <a>1</a> more", False),
        (tags(format={"type": "tags_with_separator", "separator": ", ", "tags": [tag(NUMBER)]}), "", True),
        (
            tags(format={"type": "tags_with_separator", "separator": ", ", "tags": [tag(NUMBER)]}),
            "<a>1</a>, <a>2</a>",
            True,
        ),
        (
            tags(format={"type": "tags_with_separator", "separator": ", ", "tags": [tag(NUMBER)]}),
            "<a>1</a><a>2</a>",
            False,
        ),
    ],
)
def test_a_text_is_of_the_tags_or_not(kind: str, grammar: Grammar, text: str, holds: bool) -> None:
    tokens = vocabulary(kind)
    assert accepts(matcher(kind, grammar), tokens, text) == holds


@pytest.mark.parametrize("kind", KINDS)
def test_the_names_of_special_tokens_are_these_tokens(kind: str) -> None:
    tokens = vocabulary(kind)
    call = tokens.special["<|call|>"]
    begin = matcher(
        kind,
        tags(
            format={
                "type": "triggered_tags",
                "triggers": ["<|call|>"],
                "tags": [
                    tag(NUMBER, "<|call|>n=", "<|call|>"),
                ],
            }
        ),
    )
    current = begin.copy()
    for token in [*tokens.encode("hello "), call]:
        assert current.accept(token)
    assert text_of(current.forced_tokens(), tokens) in (b"n", b"n=")
    for token in [*tokens.encode("n=12"), call, *tokens.encode("done")]:
        assert current.accept(token)
    assert current.accept(tokens.eos[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("source", "yes", "no"),
    [
        ('root ::= "a" item{2,3}\nitem ::= [b-d] | "\\u00e9"', ["abc", "aébd"], ["ab", "abcde", "axx"]),
        (
            'root ::= pair ("," pair)*  # a list\n\npair ::= key "=" value\nkey ::= [a-z]+\nvalue ::= [0-9]\n  | "-"',
            ["a=1", "ab=-,c=2"],
            ["a", "a=1,", "a=12"],
        ),
        ('root ::= "(" root ")" | "x"', ["x", "((x))"], ["((x)", ""]),
        ('root ::= [^\\x41-\\x43"\\n]+', ["xyz", "é"], ["A", '"', "\n"]),
        ('root ::= "say \\"#\\"" # a comment "not text"', ['say "#"'], ["say"]),
        ('start: /[a-c]+/ "!"', ["ab!"], ["ab", "d!"]),
    ],
)
def test_ebnf_is_what_it_says(kind: str, source: str, yes: list[str], no: list[str]) -> None:
    tokens, begin = vocabulary(kind), matcher(kind, Grammar("ebnf", source))
    assert [accepts(begin, tokens, text) for text in yes] == [True] * len(yes)
    assert [accepts(begin, tokens, text) for text in no] == [False] * len(no)


def test_white_space_between_parts_of_json_is_bounded() -> None:
    tokens, begin = vocabulary("bytes"), matcher("bytes", Grammar("json_object"))
    assert accepts(begin, tokens, "{" + " " * 64 + '"a" : 1}')
    assert not accepts(begin, tokens, "{" + " " * 65 + '"a":1}')


def test_a_walk_through_tags_calls_what_there_is() -> None:
    tokens = vocabulary("gpt2")
    begin = matcher(
        "gpt2",
        tags(
            format={
                "type": "triggered_tags",
                "triggers": ["<fn="],
                "at_least_one": True,
                "tags": [tag(JSON, "<fn=w>", "</fn>")],
                "stop_after_first": True,
            }
        ),
    )
    current = begin.copy()
    for token in tokens.encode("so <fn="):
        assert current.accept(token)
    text = text_of(walk(current, tokens, random.Random(3), jump=True, most=80), tokens)
    assert text.startswith(b"w>{")
    assert allowed(current, tokens).size

"""Calls in forms of XML, whose values have no quotes: each value is read with the type that its schema gives it."""

import itertools
import json
import random
import re
from typing import Any

import numpy as np
import pytest
import test_call_grammars as grammars
from api_support import ScriptedEngine, running, saying
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from tool_models import family_model, tokens_of

from kvasir_engine.api.tools.call_grammar import CallSchema, expressible, forced_calls
from kvasir_engine.api.tools.types import joined
from kvasir_engine.api.tools.value_types import ANY, as_json, types_of
from kvasir_engine.grammar.regexes import text_without

FAMILIES = ["qwen3_coder", "glm45"]
families = pytest.mark.parametrize("family", FAMILIES)


def an_object(required: list[str] | None = None, **properties: Any) -> dict[str, Any]:
    needed = list(properties) if required is None else required
    return {"type": "object", "properties": properties, "required": needed, "additionalProperties": False}


EXPRESSIBLE: dict[str, dict[str, Any]] = {
    "texts": an_object(a={"type": "string", "description": "free"}, b={"type": "string", "maxLength": 3}),
    "bounds": an_object(a={"type": "string", "minLength": 2, "maxLength": 4}),
    "enum": an_object(unit={"type": "string", "enum": ["C", "F", "", "no\nne"]}, one={"const": "x y"}),
    "mixed enum": an_object(a={"enum": [1, "one", None, True]}),
    "numbers": an_object(n={"type": "integer", "minimum": 3, "maximum": 40}, x={"type": "number", "maximum": 1}),
    "flags": an_object(a={"type": "boolean"}, b={"type": "null"}),
    "nullable": an_object(a={"anyOf": [{"type": "string"}, {"type": "null"}], "default": None}),
    "types": an_object(a={"type": ["string", "integer"]}),
    "anything": an_object(a=True),
    "list": an_object(a={"type": "array", "items": {"enum": ["</parameter>", "</arg_value>", "x"]}, "maxItems": 2}),
    "references": {
        **an_object(a={"$ref": "#/$defs/p"}, s={"$ref": "#/$defs/s"}),
        "$defs": {
            "p": an_object(q={"type": "array", "items": {"$ref": "#/$defs/s"}, "maxItems": 1}),
            "s": {"enum": ["u", "v"]},
        },
    },
    "optional": an_object(
        ["b"], a={"type": "integer", "maximum": 9, "minimum": 0}, b={"type": "boolean"}, c={"type": "boolean"}
    ),
    "open": {"type": "object", "properties": {"a": {"type": "boolean"}}},
    "nothing": an_object(),
}
NOT_EXPRESSIBLE: dict[str, dict[str, Any]] = {
    "a pattern": an_object(a={"type": "string", "pattern": "^a+$"}),
    "a format": an_object(a={"type": "string", "format": "date"}),
    "a bounded text or null": an_object(a={"anyOf": [{"type": "string", "maxLength": 3}, {"type": "null"}]}),
    "a text that is like a number": an_object(a={"enum": ["1", 1]}),
    "a text with the marker": an_object(a={"enum": ["</parameter></arg_value>"]}),
    "a reference to the whole": an_object([], a={"type": "array", "items": {"$ref": "#"}}),
    "other properties": {"type": "object", "additionalProperties": {"type": "integer"}},
    "a name with a bracket": {"type": "object", "properties": {"a>b": True}},
    "a required one without a schema": {"type": "object", "required": ["a"]},
    "alternatives at the top": {"type": "object", "anyOf": [an_object(a=True), an_object(b=True)]},
}


def arguments(family: str, text: str, schema: dict[str, Any]) -> list[str]:
    """The arguments of the calls of an answer, which has nothing else, read in one piece and by characters."""
    found = []
    for pieces in ([text], list(text)):
        ids = map(str, itertools.count())
        parser = family_model(family).output.parser(ids.__next__, frozenset({"f"}), None, {"f": schema})
        deltas = [delta for piece in pieces for delta in parser.push(piece)]
        message = joined([*deltas, *parser.end()])
        assert message.content is None, text
        found.append([call.arguments for call in message.tool_calls])
    assert found[0] == found[1]
    return found[0]


def walk(family: str, grammar: Any, seed: int, most: int = 400) -> str | None:
    """A text under the grammar by random bytes, and now and then an attempt at a marker, a quoted one too; None if
    it comes to no end.
    """
    model, rng = family_model(family), random.Random(seed)
    matcher = grammars.matcher_of(family, grammar)
    words = np.zeros(-(-model.vocab_size // 32), np.int32)
    attempts = [
        tokens_of(model, each) for each in ("</parameter>", "\n</parameter>", "</arg_value>", "</function>")
    ]
    attempts += [[token for each in "</arg_value>" for token in tokens_of(model, each)], tokens_of(model, "null")]
    text = b""
    for _ in range(most):
        for token in rng.choice(attempts) if rng.random() < 0.3 else []:
            if not matcher.accept(token):
                break
            text += model.tokenizer.token_bytes(token) or (model.tokenizer.token_name(token) or "").encode()
        matcher.fill_mask(words)
        allowed = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))
        if model.eos[0] in allowed:
            return text.decode("utf-8", "replace")
        token = int(rng.choice(allowed))
        assert matcher.accept(token)
        text += model.tokenizer.token_bytes(token) or (model.tokenizer.token_name(token) or "").encode()
    return None


@families
@pytest.mark.parametrize("case", EXPRESSIBLE)
def test_what_the_grammar_lets_through_is_read_as_its_schema_has_it(family: str, case: str) -> None:
    schema, format = EXPRESSIBLE[case], family_model(family).output
    assert expressible([CallSchema("f", schema)], format)
    grammar = forced_calls([CallSchema("f", schema)], format, False, None)
    ended = 0
    for seed in range(10):
        text = walk(family, grammar, seed)
        if text is not None:
            ended += 1
            (written,) = arguments(family, text, schema)
            Draft202012Validator(schema).validate(json.loads(written))
    assert ended >= 5


@families
@pytest.mark.parametrize("case", NOT_EXPRESSIBLE)
def test_what_the_form_cannot_be_constrained_to_is_said(family: str, case: str) -> None:
    assert not expressible([CallSchema("f", NOT_EXPRESSIBLE[case])], family_model(family).output)


@families
async def test_a_forced_call_of_another_schema_is_one_of_json(family: str) -> None:
    """`required` cannot fail: what its own form cannot say the model says as Hermes' does."""
    model, schema = family_model(family), NOT_EXPRESSIBLE["a pattern"]
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    text = '<tool_call>\n{"name": "f", "arguments": {"a": "aa"}}\n</tool_call>'
    engine = ScriptedEngine(saying(tokens_of(model, text)), max_length=4096)
    async with running(engine, model) as api:
        asked: Any = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "tools": [tool]}
        answer: Any = await api.client().chat.completions.create(**asked, tool_choice="required")
    (call,) = answer.choices[0].message.tool_calls or []
    assert call.function.arguments == '{"a": "aa"}'
    grammar = engine.requests[-1].sampling.grammar
    assert grammar is not None
    assert grammars.accepts(family, grammar, text)


CODER = "<tool_call>\n<function=f>\n{}</function>\n</tool_call>"
GLM = "<tool_call>f\n{}</tool_call>"


@pytest.mark.parametrize(
    ("schema", "written", "value"),
    [
        ({"type": "string"}, "12", "12"),
        ({"type": "string"}, "null", "null"),
        ({"type": "string"}, '{"a": 1}', '{"a": 1}'),
        ({"type": "string"}, "  two\n\nlines ", "  two\n\nlines "),
        ({"type": "string"}, '"quoted" \\ \t', '"quoted" \\ \t'),
        ({"enum": ["1", "2"]}, "1", "1"),
        ({"$ref": "#/$defs/s"}, "7", "7"),
        ({"type": "integer"}, "12", 12),
        ({"type": "integer"}, "twelve", "twelve"),
        ({"type": "number"}, "1e3", 1000.0),
        ({"type": "boolean"}, "True", True),
        ({"type": "boolean"}, "false", False),
        ({"type": ["string", "null"]}, "None", None),
        ({"type": ["string", "null"]}, "12", "12"),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, "null", None),
        ({"type": "array"}, '["a\nb", "</parameter>", "</arg_value>"]', ["a\nb", "</parameter>", "</arg_value>"]),
        ({"type": "object"}, '{\n  "a": [1]\n}', {"a": [1]}),
        (True, "12", 12),
        (True, "12 apples", "12 apples"),
        (True, "NaN", "NaN"),
        (True, "[1, 2", "[1, 2"),
    ],
)
def test_a_value_has_the_type_of_its_schema(schema: Any, written: str, value: Any) -> None:
    function = {"type": "object", "properties": {"k": schema}, "$defs": {"s": {"type": "string"}}}
    coder = CODER.format(f"<parameter=k>\n{written}\n</parameter>\n")
    glm = GLM.format(f"<arg_key>k</arg_key>\n<arg_value>{written}</arg_value>\n")
    for family, text in (("qwen3_coder", coder), ("glm45", glm)):
        (read,) = arguments(family, text, function)
        assert json.loads(read) == {"k": value}


def test_types_of_what_a_schema_allows() -> None:
    assert types_of({"type": "number"}, {}) == {"number", "integer"}
    assert types_of({"allOf": [{"type": ["string", "null"]}, {"enum": [None, "a", 1]}]}, {}) == {"string", "null"}
    assert types_of({"$ref": "#/$defs/a"}, {"$defs": {"a": {"$ref": "#/$defs/a"}}}) == ANY
    assert types_of({"$ref": "http://elsewhere"}, {}) == ANY
    assert as_json("1" * 5000, ANY) == '"' + "1" * 5000 + '"'
    assert json.loads(as_json("[" * 100_000, ANY)) == "[" * 100_000


@given(
    st.sampled_from(["</p>", "<|e|>", "ab", "a", "abcab"]),
    st.lists(st.sampled_from([*"</p>|eabc", "</p>", "<|e|>", "</p", "ab", "\n"]), max_size=14).map("".join),
)
def test_a_text_without_a_marker_is_told_by_a_regex(marker: str, text: str) -> None:
    once = marker[0] not in marker[1:]
    assert bool(re.fullmatch(text_without(marker), text)) == (not once or marker not in text)


def test_a_marker_that_is_spelled_is_in_no_free_text() -> None:
    """GLM's are tokens: free text has neither the token nor its spelling, which the parser would take for it."""
    format, model = family_model("glm45").output, family_model("glm45")
    grammar = forced_calls([CallSchema("f", an_object(a={"type": "string"}))], format, False, None)
    matcher = grammars.matcher_of("glm45", grammar)
    assert all(map(matcher.accept, tokens_of(model, "<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>x </p <")))
    spelled = [tokens_of(model, character)[0] for character in "/arg_value>"]
    assert [matcher.accept(token) for token in spelled] == [True] * (len(spelled) - 1) + [False]
    assert all(map(matcher.accept, tokens_of(model, "</arg_value>\n</tool_call>")))

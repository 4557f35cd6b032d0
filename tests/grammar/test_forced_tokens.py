"""What is forced comes in the tokens that the tokenizer gives the whole text, whatever follows."""

import json
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vocabularies import KINDS, vocabulary
from walking import compiler, matcher, text_of, walk

from kvasir_engine.protocol import Grammar

NAMES = st.text(st.sampled_from("abcnmet_ -.é日\"\\\n'1"), min_size=1, max_size=9)
VALUES = st.sampled_from(
    [{"type": "string"}, {"type": "integer"}, {"type": "boolean"}, {"enum": ["red", "grey"]}, {"const": "a b"}]
)
SCHEMAS = st.dictionaries(NAMES, VALUES, min_size=1, max_size=4).map(
    lambda properties: {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
)
EVERY_CASE = list(HealthCheck)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None, suppress_health_check=EVERY_CASE)
@given(before=st.text(max_size=6), forced=st.text(max_size=12), after=st.text(max_size=6))
def test_certain_tokens_of_a_text_stay_whatever_text_follows(
    kind: str, before: str, forced: str, after: str
) -> None:
    tokens = vocabulary(kind)
    certain = _certain(kind, before, forced)
    whole = tokens.encode(before + forced + after)
    begun = tokens.encode(before)
    if whole[: len(begun)] == begun:  # else the text before would have been other tokens
        assert whole[len(begun) : len(begun) + len(certain)] == certain


def _certain(kind: str, before: str, forced: str) -> list[int]:

    text = compiler(kind)._tokens.forced
    return text.tokens(vocabulary(kind).encode(before), forced.encode(), False, lambda *_: True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("words", [["a", " b", "\n", "  ", "c", "1", "'s", '": "', '",', "_"]])
def test_certain_tokens_stay_in_texts_of_many_spaces_quotes_and_digits(kind: str, words: list[str]) -> None:
    tokens = vocabulary(kind)
    rng = random.Random(0)
    for _ in range(1500):
        before, forced, after = ("".join(rng.choices(words, k=rng.randrange(5))) for _ in range(3))
        begun, whole = tokens.encode(before), tokens.encode(before + forced + after)
        if whole[: len(begun)] == begun:
            certain = _certain(kind, before, forced)
            assert whole[len(begun) : len(begun) + len(certain)] == certain, (before, forced, after)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("whitespace", [None, "", " ?"])
@settings(max_examples=25, deadline=None, suppress_health_check=EVERY_CASE)
@given(schema=SCHEMAS, seed=st.integers(0, 3))
def test_a_text_of_the_tokenizer_s_own_tokens_is_forced_in_them(
    kind: str, whitespace: str | None, schema: dict[str, object], seed: int
) -> None:
    tokens = vocabulary(kind)
    begin = matcher(kind, Grammar("json_schema", json.dumps(schema), whitespace))
    text = text_of(walk(begin, tokens, random.Random(seed), jump=True, most=150), tokens).decode("utf-8", "ignore")
    own = tokens.encode(text)
    current, at = begin.copy(), 0
    while at < len(own):
        forced = current.forced_tokens()
        if forced and at + len(forced) <= len(own):
            assert own[at : at + len(forced)] == forced
        if not current.accept(own[at]):
            break  # the walk was cut within a character
        at += 1


@pytest.mark.parametrize("kind", ["gpt2", "llama3", "sentencepiece"])
def test_a_name_between_quotes_is_forced_but_for_what_may_go_on(kind: str) -> None:
    tokens = vocabulary(kind)
    schema = {"type": "object", "properties": {"name": {"type": "integer"}}, "required": ["name"]}
    current = matcher(kind, Grammar("json_schema", json.dumps(schema | {"additionalProperties": False}), ""))
    forced = current.forced_tokens()
    text = text_of(forced, tokens).decode()
    assert text
    assert '{"name":'.startswith(text)
    assert tokens.encode('{"name":17}')[: len(forced)] == forced


@pytest.mark.parametrize("kind", KINDS)
def test_what_ends_the_text_is_forced_to_its_last_token(kind: str) -> None:
    tokens = vocabulary(kind)
    text = "naïve and 日本, the end"
    current = matcher(kind, Grammar("choice", json.dumps([text])))
    assert current.forced_tokens() == tokens.encode(text)


@pytest.mark.parametrize("kind", KINDS)
def test_half_a_character_is_never_forced(kind: str) -> None:
    tokens = vocabulary(kind)
    current = matcher(kind, Grammar("choice", json.dumps(["xé", "xè"])))
    text_of(current.forced_tokens(), tokens).decode()
    for token in current.forced_tokens() or tokens.encode("x"):
        assert current.accept(token)
    assert current.forced_tokens() == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_text_is_forced_in_bounded_parts_that_make_the_tokenizer_s_own_tokens(kind: str) -> None:
    tokens = vocabulary(kind)
    text = "".join(f"line {n}: é 日本, and more\n" for n in range(300))
    current = matcher(kind, Grammar("choice", json.dumps([text])))
    found: list[int] = []
    while not current.stopped():
        forced = current.forced_tokens()
        assert 0 < len(text_of(forced, tokens)) <= 1024
        found += forced
        assert all(current.accept(token) for token in forced)
    assert found == tokens.encode(text)

"""A matcher's masks, its rollback and copies, for vocabularies of all kinds."""

import json
import random
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vocabularies import KINDS, SPECIAL, vocabulary
from walking import accepts, allowed, matcher, text_of, walk

from kvasir_engine.grammar.base import GrammarError
from kvasir_engine.protocol import Grammar

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "grey", "naïve"]}, "maxItems": 4},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
GRAMMARS = [
    Grammar("json_schema", json.dumps(PERSON)),
    Grammar("json_schema", json.dumps(PERSON), ""),
    Grammar("json_schema", json.dumps(PERSON), " ?"),
    Grammar("regex", r"(ab|a)*c[0-9]{2,4}(é|è|日本)?"),
    Grammar("choice", '["yes", "no", "not now", "ÿ", "日"]'),
    Grammar("lark", 'start: "{" item ("," item)* "}"\nitem: /[a-z]{1,3}/ "=" /[0-9]/'),
    Grammar("ebnf", 'root ::= "x" item{1,3}  # some\n  | "\\u00e9"\nitem ::= [a-c] | "(" item ")"'),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grammar", GRAMMARS, ids=lambda each: f"{each.kind}-{each.whitespace}")
def test_the_mask_is_what_would_be_accepted_or_the_first_of_what_is_forced(kind: str, grammar: Grammar) -> None:
    tokens = vocabulary(kind)
    rng = random.Random(grammar.source)
    current = matcher(kind, grammar)
    for _ in range(12):
        shown = set(allowed(current, tokens).tolist())
        forced = current.forced_tokens()
        tried = {-1, tokens.size, *rng.sample(range(tokens.size), 150), *sorted(shown)[:150], *forced}
        taken = {token for token in tried if current.copy().accept(token)}
        assert shown & tried == ({forced[0]} if forced else taken)
        assert set(forced[:1]) <= taken
        if current.stopped():
            break
        assert current.accept(rng.choice(sorted(shown - set(tokens.eos)) or sorted(shown)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grammar", GRAMMARS, ids=lambda each: f"{each.kind}-{each.whitespace}")
def test_following_the_masks_and_jumping_over_what_is_forced_are_one(kind: str, grammar: Grammar) -> None:
    tokens = vocabulary(kind)
    begin = matcher(kind, grammar)
    for seed in range(6):
        jumped = walk(begin.copy(), tokens, random.Random(seed), jump=True)
        slow = begin.copy()
        for token in jumped:
            assert token in allowed(slow, tokens)
            assert slow.accept(token)
        if slow.stopped():
            text_of(jumped, tokens).decode()


@pytest.mark.parametrize("kind", KINDS)
def test_rollback_and_copies_are_at_the_place_that_was(kind: str) -> None:
    tokens = vocabulary(kind)
    current = matcher(kind, GRAMMARS[0])
    rng = random.Random(1)
    masks, steps = [allowed(current, tokens).tolist()], 0
    while steps < 10 and not current.stopped():
        assert current.accept(int(rng.choice(masks[-1])))
        masks.append(allowed(current, tokens).tolist())
        steps += 1
    other = current.copy()
    for back in (1, 2, steps - 3):
        current.rollback(back)
        steps -= back
        assert allowed(current, tokens).tolist() == masks[steps]
    assert allowed(other, tokens).tolist() == masks[-1]
    with pytest.raises(ValueError, match="tokens"):
        current.rollback(steps + 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("regex", ["ab", "ab*"])
def test_the_end_comes_only_where_it_may_and_can_be_taken_back(kind: str, regex: str) -> None:
    tokens = vocabulary(kind)
    end = tokens.eos[0]
    current = matcher(kind, Grammar("regex", regex))
    assert not current.accept(end)
    for token in tokens.encode("ab"):
        assert current.accept(token)
    assert current.stopped() == (regex == "ab")
    assert end in allowed(current, tokens)
    assert current.accept(end)
    assert current.stopped()
    assert not current.accept(end)
    assert not current.accept(tokens.encode("b")[0])
    assert allowed(current, tokens).tolist() == [end]
    current.rollback(1)
    assert current.stopped() == (regex == "ab")
    assert current.accept(end)


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_and_padding_are_in_no_text(kind: str) -> None:
    tokens = vocabulary(kind)
    shown = set(allowed(matcher(kind, Grammar("regex", r"(.|\n)*")), tokens).tolist())
    assert not shown & {tokens.special[name] for name in SPECIAL if name != "<|end|>"}
    assert max(shown) < len(tokens.tokens) < tokens.size
    assert tokens.special["<|end|>"] in shown
    spelled = matcher(kind, Grammar("choice", json.dumps(["<|call|>!"])))
    assert not spelled.copy().accept(tokens.special["<|call|>"])
    assert accepts(spelled, tokens, "<|call|>!")


@pytest.mark.parametrize("kind", KINDS)
def test_a_grammar_may_name_a_special_token(kind: str) -> None:
    tokens = vocabulary(kind)
    current = matcher(kind, Grammar("lark", 'start: <|call|> "x"'))
    assert allowed(current, tokens).tolist() == [tokens.special["<|call|>"]]
    assert current.accept(tokens.special["<|call|>"])
    assert all(current.accept(token) for token in tokens.encode("x"))
    assert current.stopped()


PIECES = ["a", "b", "ab", "é", "日本", "[a-c]", "[^a]", "(?:a|bc)", ".", r"\d", "x{2}", r"\.", "/", '"']
REGEXES = st.lists(
    st.tuples(st.sampled_from(PIECES), st.sampled_from(["", "*", "+", "?", "{1,2}"])), min_size=1, max_size=4
).map(lambda parts: "".join(f"(?:{piece}){often}" for piece, often in parts))
TEXTS = st.text(st.sampled_from('abcx.é日本1/" '), max_size=8)


@pytest.mark.parametrize("kind", ["gpt2", "sentencepiece"])
@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(regex=REGEXES, text=TEXTS, seed=st.integers(0, 5))
def test_a_regex_s_language_is_the_one_that_python_has(kind: str, regex: str, text: str, seed: int) -> None:
    tokens = vocabulary(kind)
    begin = matcher(kind, Grammar("regex", regex))
    assert accepts(begin, tokens, text) == bool(re.fullmatch(regex, text))
    walked = walk(begin, tokens, random.Random(seed), jump=True, most=60)
    after = begin.copy()
    assert all(after.accept(token) for token in walked)
    if after.accept(tokens.eos[0]):
        assert re.fullmatch(regex, text_of(walked, tokens).decode())


def test_a_step_that_takes_too_much_ends_the_sequence_with_a_reason() -> None:
    tokens = vocabulary("gpt2")
    source = "start: a+\na: " + " | ".join(f"/(.*x.*){{{n}}}y/" for n in range(1, 60))
    current = matcher("gpt2", Grammar("lark", source))

    def go_on() -> None:
        for _ in range(500):
            allowed(current, tokens)
            current.accept(tokens.encode("x")[0])

    with pytest.raises(GrammarError, match="too complex"):
        go_on()

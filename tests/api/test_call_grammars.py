"""Grammars of forced and strict calls: what they let through is read as calls, and nothing else is let through."""

import itertools
import json
import random
from typing import Any

import numpy as np
import pytest
from conversations import ARGUMENTS
from jsonschema import Draft202012Validator
from tool_models import family_model, tokens_of

from kvasir_engine.api.tools.call_grammar import (
    CallSchema,
    calls_or,
    forced_calls,
    grammar_after_reasoning,
    triggered_calls,
)
from kvasir_engine.api.tools.formats import OutputFormat
from kvasir_engine.api.tools.types import ParsedMessage, joined
from kvasir_engine.api.vocabulary import vocabulary_of
from kvasir_engine.grammar.compiler import GuidanceCompiler
from kvasir_engine.protocol import Grammar

SCHEMAS: dict[str, dict[str, Any]] = {
    "get_weather": {
        "type": "object",
        "properties": {"city": {"$ref": "#/$defs/city"}, "unit": {"enum": ["C", "F"]}},
        "required": ["city", "unit"],
        "additionalProperties": False,
        "$defs": {"city": {"type": "string", "maxLength": 4}},
    },
    "run-it_2": {
        "type": "object",
        "properties": {"n": {"type": "integer"}},
        "required": ["n"],
        "additionalProperties": False,
    },
    "search": {"type": "object", "properties": {}, "additionalProperties": False},
}
CALLS = [CallSchema(name, schema) for name, schema in SCHEMAS.items()]
FAMILIES = ["hermes", "llama3_json", "mistral", "mistral array", "deepseek_v3", "deepseek_v31", "openai", "json"]
FAMILIES += ["qwen3_coder", "glm45"]


def matcher_of(family: str, grammar: Grammar) -> Any:
    return GuidanceCompiler(vocabulary_of(family_model(family))).compile(grammar).matcher()


def accepts(family: str, grammar: Grammar, text: str) -> bool:
    """Whether the grammar lets this whole answer through."""
    matcher = matcher_of(family, grammar)
    model = family_model(family)
    return all(map(matcher.accept, tokens_of(model, text))) and matcher.accept(model.eos[0])


def walk(family: str, grammar: Grammar, seed: int, most: int = 3000) -> str | None:
    """A text that a model without any idea writes under the grammar; None if it comes to no end."""
    model, rng = family_model(family), random.Random(seed)
    matcher = matcher_of(family, grammar)
    words = np.zeros(-(-model.vocab_size // 32), np.int32)
    text = b""
    for _ in range(most):
        matcher.fill_mask(words)
        allowed = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))
        if model.eos[0] in allowed and (len(allowed) == 1 or rng.random() < 0.5):
            return text.decode("utf-8", "replace")
        token = int(rng.choice([each for each in allowed if each != model.eos[0]]))
        assert matcher.accept(token)
        text += model.tokenizer.token_bytes(token) or (model.tokenizer.token_name(token) or "").encode()
    return None


def read(format: OutputFormat, text: str, begun: bool | None = None) -> ParsedMessage:
    counter = itertools.count()
    parser = format.parser(lambda: f"call_{next(counter)}", frozenset(SCHEMAS), begun, SCHEMAS)
    return joined([*parser.push(text), *parser.end()])


def check_calls(message: ParsedMessage) -> None:
    for call in message.tool_calls:
        Draft202012Validator(SCHEMAS[call.name]).validate(json.loads(call.arguments))


@pytest.mark.parametrize("many", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_forced_call_cannot_fail(family: str, many: bool) -> None:
    format = family_model(family).output
    grammar = forced_calls(CALLS, format, many, None)
    ended = 0
    for seed in range(12):
        text = walk(family, grammar, seed)
        if text is None:
            continue
        ended += 1
        message = read(format, text)
        assert message.content is None, text
        assert len(message.tool_calls) == 1 or (many and message.tool_calls), text
        check_calls(message)
    assert ended >= 6


def bare(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def qwen3_coder(arguments: dict[str, Any]) -> str:
    lines = "".join(f"<parameter={key}>\n{bare(value)}\n</parameter>\n" for key, value in arguments.items())
    return f"<tool_call>\n<function=search>\n{lines}</function>\n</tool_call>"


def glm45(arguments: dict[str, Any]) -> str:
    lines = "".join(
        f"<arg_key>{key}</arg_key>\n<arg_value>{bare(value)}</arg_value>\n" for key, value in arguments.items()
    )
    return f"<tool_call>search\n{lines}</tool_call>"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_forced_call_is_what_the_family_writes(family: str) -> None:
    format = family_model(family).output
    one = CallSchema("search", {"type": "object"})
    grammar = forced_calls([one], format, False, None)
    for arguments in ARGUMENTS:
        written = json.dumps(arguments, ensure_ascii=False)
        text = {
            "hermes": f'<tool_call>\n{{"name": "search", "arguments": {written}}}\n</tool_call>',
            "llama3_json": f'{{"name": "search", "parameters": {written}}}',
            "mistral": f"[TOOL_CALLS]search[ARGS]{written}",
            "mistral array": f'[TOOL_CALLS][{{"name": "search", "arguments": {written}}}]',
            "deepseek_v3": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>search\n```json\n"
            f"{written}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
            "deepseek_v31": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>search<｜tool▁sep｜>"
            f"{written}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
            "openai": f"<|channel|>commentary to=functions.search <|constrain|>json<|message|>{written}",
            "json": f'{{"name": "search", "arguments": {written}}}',
            "qwen3_coder": qwen3_coder(arguments),
            "glm45": glm45(arguments),
        }[family]
        if ("[TOOL_CALLS]" in written and "mistral" in family) or ("tool_call>" in written and family == "glm45"):
            continue  # the helper would make a token of it
        assert accepts(family, grammar, text), text
        assert not accepts(family, grammar, "x" + text)
        assert [call.arguments for call in read(format, text).tool_calls] == [written]


@pytest.mark.parametrize(
    "family",
    ["hermes", "mistral", "mistral array", "deepseek_v3", "deepseek_v31", "qwen3_coder", "glm45"],
)
def test_a_strict_tool_constrains_only_what_begins_as_a_call(family: str) -> None:
    format = family_model(family).output
    grammar = triggered_calls(CALLS, format, True, None)
    assert accepts(family, grammar, "No call, { nor } any.")
    call = forced_calls(CALLS, format, False, None)
    for seed in range(8):
        text = walk(family, call, seed)
        if text is not None:
            assert accepts(family, grammar, f"So: {text}"), text
            broken = text.replace("search", "serach").replace("run-it", "walk-it").replace("get_", "got_")
            assert not accepts(family, grammar, f"So: {broken}"), broken


@pytest.mark.parametrize(
    ("family", "begun", "before"),
    [
        ("qwen3", None, "<think>a\nb</think>\n\n"),
        ("qwen3", None, ""),
        ("r1", True, "a b</think>\n"),
        ("qwen3", False, ""),
    ],
)
def test_reasoning_may_come_before_what_is_constrained(family: str, begun: bool | None, before: str) -> None:
    format = family_model(family).output
    forced = forced_calls(CALLS, format, False, begun)
    call = '<tool_call>\n{"name": "search", "arguments": {}}\n</tool_call>'
    assert accepts(family, forced, before + call)
    assert read(format, before + call, begun).content is None
    schema = Grammar("json_schema", '{"type": "object", "properties": {}, "additionalProperties": false}')
    after = grammar_after_reasoning(schema, format, begun)
    assert after is not None
    assert accepts(family, after, before + "{}")
    assert not accepts(family, after, before + "[]")
    either = calls_or(schema, CALLS, format, False, begun)
    assert either is not None
    assert accepts(family, either, before + "{}")
    assert accepts(family, either, before + call)
    assert not accepts(family, either, before + "hi")


def test_analysis_may_come_before_a_call() -> None:
    format = family_model("openai").output
    thought = "<|channel|>analysis<|message|>a b<|end|><|start|>assistant"
    call = "<|channel|>commentary to=functions.search <|constrain|>json<|message|>{}"
    forced, free = forced_calls(CALLS, format, True, None), triggered_calls(CALLS, format, True, None)
    for before in ("", thought):
        assert accepts("openai", forced, before + call)
        assert accepts("openai", free, before + call)
        assert accepts("openai", free, f"{before}<|channel|>final<|message|>hi")
        assert not accepts("openai", forced, f"{before}<|channel|>final<|message|>hi")


@pytest.mark.parametrize(
    ("grammar", "right", "wrong"),
    [
        (Grammar("json_object"), '{"a": 1}', "[]"),
        (Grammar("regex", "[ab]+"), "abba", "abc"),
        (Grammar("choice", '["yes", "no"]'), "no", "maybe"),
    ],
)
def test_any_grammar_may_come_after_reasoning(grammar: Grammar, right: str, wrong: str) -> None:
    format = family_model("qwen3").output
    after = grammar_after_reasoning(grammar, format, True)
    assert after is not None
    assert accepts("qwen3", after, "hm </think>\n\n" + right)
    assert not accepts("qwen3", after, "hm </think>\n\n" + wrong)
    assert grammar_after_reasoning(grammar, format, False) == grammar


def test_a_users_own_grammar_cannot_be_put_after_reasoning() -> None:
    format = family_model("qwen3").output
    lark = Grammar("lark", 'start: "a"')
    assert grammar_after_reasoning(lark, format, True) is None
    assert grammar_after_reasoning(lark, family_model("hermes").output, None) == lark

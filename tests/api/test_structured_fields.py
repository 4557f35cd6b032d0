"""response_format, structured_outputs and the guided_ fields: one grammar for the engine, or a clear refusal."""

import dataclasses
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import msgspec
import pytest
import pytest_asyncio
from api_support import ScriptedEngine, running, saying, tiny_model
from openai import AsyncOpenAI
from pydantic import BaseModel

from kvasir_engine.api.json_whitespace import json_whitespace
from kvasir_engine.api.params import chat_params
from kvasir_engine.api.schemas import ChatRequest
from kvasir_engine.api.tokenizer import ServedModel
from kvasir_engine.errors import UserError
from kvasir_engine.protocol import Grammar

pytestmark = pytest.mark.asyncio(loop_scope="module")

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}
PLAIN = {"model": "tiny", "prompt": "x"}
BOTH = pytest.mark.parametrize(("path", "base"), [("/v1/chat/completions", CHAT), ("/v1/completions", PLAIN)])
SCHEMA = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"type": "string"}}}
TEXT = json.dumps(SCHEMA, separators=(",", ":"))
TAGS = {
    "type": "structural_tag",
    "structures": [{"begin": "<f>", "schema": SCHEMA, "end": "</f>"}],
    "triggers": ["<f"],
}
ENGINE = ScriptedEngine(saying(tiny_model().tokenizer.bare('{"b":1}')), max_length=4096)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def http(model: ServedModel) -> AsyncIterator[httpx.AsyncClient]:
    async with running(ENGINE, model) as api, httpx.AsyncClient(base_url=api.url, timeout=60) as client:
        yield client


def outputs(**fields: Any) -> dict[str, Any]:
    return {"structured_outputs": fields}


def formatted(**fields: Any) -> dict[str, Any]:
    return {"response_format": fields}


@BOTH
@pytest.mark.parametrize(
    ("change", "kind", "source", "whitespace"),
    [
        (formatted(type="json_object"), "json_object", "", None),
        (formatted(type="json_schema", json_schema={"name": "n", "schema": SCHEMA}), "json_schema", TEXT, None),
        (
            formatted(type="json_schema", json_schema={"name": "n", "schema": SCHEMA, "strict": True}),
            "json_schema",
            TEXT,
            None,
        ),
        (formatted(**TAGS), "structural_tag", json.dumps(TAGS, separators=(",", ":")), None),
        (outputs(json=SCHEMA), "json_schema", TEXT, None),
        (outputs(json=json.dumps(SCHEMA)), "json_schema", json.dumps(SCHEMA), None),
        (outputs(json=SCHEMA, disable_any_whitespace=True), "json_schema", TEXT, ""),
        (outputs(json=SCHEMA, whitespace_pattern="[ \n]?"), "json_schema", TEXT, "[ \n]?"),
        (outputs(json_object=True, disable_fallback=True), "json_object", "", None),
        (outputs(regex="a+"), "regex", "a+", None),
        (outputs(choice=["yes", "né"]), "choice", '["yes", "né"]', None),
        (outputs(grammar='root ::= "a"'), "ebnf", 'root ::= "a"', None),
        (outputs(structural_tag=json.dumps(TAGS)), "structural_tag", json.dumps(TAGS), None),
        ({"guided_json": SCHEMA}, "json_schema", TEXT, None),
        ({"guided_json": SCHEMA, "guided_whitespace_pattern": " ?"}, "json_schema", TEXT, " ?"),
        ({"guided_json_object": True}, "json_object", "", None),
        ({"guided_regex": "a+", "guided_decoding_backend": "guidance"}, "regex", "a+", None),
        ({"guided_choice": ["a"]}, "choice", '["a"]', None),
        ({"guided_grammar": 'start: "a"'}, "ebnf", 'start: "a"', None),
    ],
)
async def test_each_field_asks_the_engine_for_its_grammar(
    http: httpx.AsyncClient,
    path: str,
    base: dict[str, Any],
    change: dict[str, Any],
    kind: Any,
    source: str,
    whitespace: str | None,
) -> None:
    body = json.dumps(base | change, separators=(",", ":"))
    response = await http.post(path, content=body)
    assert response.status_code == 200, response.text
    assert ENGINE.requests[-1].sampling.grammar == Grammar(kind, source, whitespace)


@pytest.mark.parametrize(
    ("change", "whitespace"),
    [
        (formatted(type="json_object"), ""),
        (formatted(type="json_schema", json_schema={"name": "n", "schema": SCHEMA}), ""),
        (formatted(**TAGS), ""),
        ({"guided_json": SCHEMA}, ""),
        (outputs(json=SCHEMA), ""),
        (outputs(json=SCHEMA, disable_any_whitespace=False), None),
        (outputs(json=SCHEMA, whitespace_pattern=" ?"), " ?"),
        ({"guided_json": SCHEMA, "guided_whitespace_pattern": " ?"}, " ?"),
        (outputs(regex="a+"), None),
        (outputs(regex="a+", disable_any_whitespace=False), None),
        (outputs(choice=["yes"]), None),
    ],
)
async def test_json_has_the_servers_white_space_where_the_request_does_not_say(
    model: ServedModel, change: dict[str, Any], whitespace: str | None
) -> None:
    compact = dataclasses.replace(model, json_whitespace=json_whitespace("none"))
    asked = chat_params(msgspec.convert(CHAT | change, ChatRequest), compact)
    assert asked.sampling.grammar is not None
    assert asked.sampling.grammar.whitespace == whitespace


async def test_the_servers_white_space_is_any_or_none() -> None:
    assert (json_whitespace("any"), json_whitespace("none")) == (None, "")
    with pytest.raises(UserError, match="json-whitespace is any or none, not 'compact'"):
        json_whitespace("compact")


@BOTH
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"response_format": None, "structured_outputs": None, "guided_json": None},
        {"response_format": {"type": "text"}},
        {"guided_json_object": False},
    ],
)
async def test_without_one_the_text_is_free(
    http: httpx.AsyncClient, path: str, base: dict[str, Any], change: dict[str, Any]
) -> None:
    response = await http.post(path, json=base | change)
    assert response.status_code == 200, response.text
    assert ENGINE.requests[-1].sampling.grammar is None


@BOTH
@pytest.mark.parametrize(
    ("change", "param", "code", "words"),
    [
        (
            outputs(json=SCHEMA) | formatted(type="json_object"),
            "structured_outputs.json",
            "invalid_value",
            "one of",
        ),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice", "invalid_value", "guided_regex"),
        (outputs(json=SCHEMA, regex="a"), "structured_outputs", "invalid_value", "exactly one"),
        (outputs(), "structured_outputs", "invalid_value", "exactly one"),
        (outputs(regexp="a"), "structured_outputs.regexp", "unknown_parameter", "regexp"),
        (outputs(regex=5), "structured_outputs.regex", "invalid_type", "str"),
        (outputs(choice=["a"] * 10_001), "structured_outputs.choice", "invalid_grammar", "10000"),
        (
            outputs(json=SCHEMA, disable_additional_properties=True),
            "structured_outputs.disable_additional_properties",
            "unsupported_value",
            "",
        ),
        (
            outputs(json=SCHEMA, disable_any_whitespace=True, whitespace_pattern=" "),
            "structured_outputs.whitespace_pattern",
            "invalid_value",
            "",
        ),
        (
            outputs(regex="a", disable_any_whitespace=True),
            "structured_outputs.disable_any_whitespace",
            "invalid_value",
            "JSON",
        ),
        (
            outputs(json=SCHEMA, whitespace_pattern="x"),
            "structured_outputs.whitespace_pattern",
            "invalid_grammar",
            "spaces",
        ),
        ({"guided_whitespace_pattern": " "}, "guided_whitespace_pattern", "invalid_value", "guided_json"),
        (
            {"guided_regex": "a", "guided_whitespace_pattern": " "},
            "guided_whitespace_pattern",
            "invalid_value",
            "guided_json",
        ),
        ({"guided_decoding_backend": "outlines"}, "guided_decoding_backend", "unsupported_value", ""),
        (formatted(type="xml"), "response_format.type", "unsupported_value", ""),
        (formatted(type="json_schema"), "response_format.json_schema", "missing_required_parameter", ""),
        (
            formatted(type="json_schema", json_schema={"name": "n"}),
            "response_format.json_schema.schema",
            "missing_required_parameter",
            "",
        ),
        (
            formatted(type="json_object", json_schema={"name": "n", "schema": {}}),
            "response_format.json_schema",
            "invalid_value",
            "json_schema",
        ),
        (formatted(type="text", triggers=["<"]), "response_format.triggers", "invalid_value", "structural_tag"),
        (
            formatted(type="json_schema", json_schema={"name": "n", "schema": {"items": {"type": "x"}}}),
            "response_format.json_schema.schema",
            "invalid_grammar",
            "/items/type",
        ),
        (outputs(json="{"), "structured_outputs.json", "invalid_grammar", "not JSON"),
        (outputs(regex="(a"), "structured_outputs.regex", "invalid_grammar", "unclosed group"),
        ({"guided_regex": "a" * 300_000}, "guided_regex", "string_above_max_length", ""),
        ({"guided_grammar": "start: ("}, "guided_grammar", "invalid_grammar", ""),
        ({"guided_json": {"$ref": "#"}}, "guided_json", "invalid_grammar", "never ends"),
        (outputs(structural_tag="{}"), "structured_outputs.structural_tag", "invalid_grammar", "/type"),
    ],
)
async def test_what_cannot_be_honoured_is_refused_by_its_name(
    http: httpx.AsyncClient,
    path: str,
    base: dict[str, Any],
    change: dict[str, Any],
    param: str,
    code: str,
    words: str,
) -> None:
    asked = len(ENGINE.requests)
    response = await http.post(path, json=base | change)
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (400, param, code), error
    assert words in error["message"]
    assert len(ENGINE.requests) == asked


class Answer(BaseModel):
    b: int


async def test_the_official_client_s_own_types_are_taken(http: httpx.AsyncClient) -> None:
    async with AsyncOpenAI(base_url=f"{http.base_url}/v1", api_key="x") as client:
        answer = await client.chat.completions.parse(
            model="tiny", messages=[{"role": "user", "content": "Hi"}], response_format=Answer
        )
    assert answer.choices[0].message.parsed == Answer(b=1)
    grammar = ENGINE.requests[-1].sampling.grammar
    assert grammar is not None
    assert list(json.loads(grammar.source)["properties"]) == ["b"]

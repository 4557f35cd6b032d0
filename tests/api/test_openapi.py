"""/openapi.json says what is really taken: no more, and no less."""

import copy
import json
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
from api_support import ScriptedEngine, running, saying, tiny_model
from fastapi.routing import APIRoute
from prometheus_client import CollectorRegistry

from kvasir_engine.api.app import create_app
from kvasir_engine.api.batch.folder_store import FolderStore
from kvasir_engine.api.batch.runner import BatchRunner
from kvasir_engine.api.lifecycle import Lifecycle
from kvasir_engine.api.openapi_document import document
from kvasir_engine.api.routes.openapi import LIMITED, OPERATIONS, UNDESCRIBED
from kvasir_engine.api.tokenizer import ServedModel

Body = dict[str, Any]
DOCUMENT = document(OPERATIONS, LIMITED, "0", "tiny", 258)
SCHEMAS = DOCUMENT["components"]["schemas"]

HELLO = [{"role": "user", "content": "a"}]
# What each body has in any case, and what else makes a field's value sensible.
BODIES: dict[str, tuple[str, Body]] = {
    "ChatRequest": ("/v1/chat/completions", {"model": "tiny", "messages": HELLO}),
    "CompletionRequest": ("/v1/completions", {"model": "tiny", "prompt": "a"}),
    "ResponsesRequest": ("/v1/responses", {"model": "tiny", "input": "a"}),
    "MessagesRequest": (
        "/v1/messages",
        {"model": "tiny", "max_tokens": 5, "messages": [{"role": "user", "content": "a"}]},
    ),
    "CountTokensRequest": (
        "/v1/messages/count_tokens",
        {"model": "tiny", "messages": HELLO},
    ),
    "BatchRequest": (
        "/v1/batches",
        {"input_file_id": "file-x", "endpoint": "/v1/completions", "completion_window": "24h"},
    ),
    "TokenizeRequest": ("/tokenize", {"prompt": "a"}),
    "DetokenizeRequest": ("/detokenize", {"tokens": [1]}),
}
WITH: dict[str, Body] = {
    "stream_options": {"stream": True},
    "ResponsesRequest.top_logprobs": {"include": ["message.output_text.logprobs"]},
    "top_logprobs": {"logprobs": True},
    "best_of": {"n": 1},
    "logprob_start_len": {"prompt_logprobs": 0},
    "CompletionRequest.max_tokens": {"echo": True},
    "min_tokens": {"max_tokens": 2**31 - 1},
}
# As much as may be asked for by itself, but not in a context of 4,096 tokens or beside the other defaults.
BY_CONTEXT = {"max_tokens", "max_completion_tokens", "max_output_tokens", "min_tokens", "truncate_prompt_tokens"}


def branches(schema: Body) -> Iterator[Body]:
    yield from schema.get("anyOf", [schema])


def fields(name: str) -> Iterator[tuple[str, Body]]:
    yield from SCHEMAS[name]["properties"].items()


def cases() -> Iterator[tuple[str, str, Any, bool]]:
    """Struct, field, a value, and whether the document lets it through: at each limit and one step beyond."""
    for name in BODIES:
        for field, schema in fields(name):
            if field == "model":
                continue
            if "enum" in schema:
                for value in schema["enum"]:
                    yield name, field, value, True
                yield name, field, "neither" if "enum" in schema else None, False
            for each in branches(schema):
                for key, step in (("minimum", -1), ("maximum", 1)):
                    if key in each:
                        yield name, field, each[key], True
                        yield name, field, each[key] + step, False
                if "maxLength" in each:
                    yield name, field, "x" * each["maxLength"], True
                    yield name, field, "x" * (each["maxLength"] + 1), False
                if "minLength" in each:
                    yield name, field, "x" * (each["minLength"] - 1), False
                if "not" in each:
                    yield name, field, each["not"]["const"], False
                if "minItems" in each:
                    yield name, field, [], False
                items = each.get("items", {})
                for key, step in (("minimum", -1), ("maximum", 1)):
                    if key in items:
                        yield name, field, [items[key]], True
                        yield name, field, [items[key] + step], False
                if "maxItems" in each and "type" in items:
                    one = "x" if items["type"] == "string" else 1
                    if each["maxItems"] > 1:
                        yield name, field, [one] * each["maxItems"], True
                    yield name, field, [one] * (each["maxItems"] + 1), False


@pytest.fixture
async def http(tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    engine = ScriptedEngine(saying([65, 66]))
    async with (
        running(engine, tiny_model(), batch_dir=tmp_path) as api,
        httpx.AsyncClient(base_url=api.url, timeout=60) as client,
    ):
        yield client


def test_every_path_is_described(tmp_path: Path) -> None:
    with ThreadPoolExecutor(1) as executor:
        app = create_app(
            ScriptedEngine(saying([1])),
            tiny_model(),
            registry=CollectorRegistry(),
            lifecycle=Lifecycle(),
            executor=executor,
            batches=BatchRunner(FolderStore(tmp_path), Lifecycle()),
        )
    served = {
        (method.lower(), route.path.replace(":path}", "}"))
        for route in app.routes
        if isinstance(route, APIRoute) and route.path not in UNDESCRIBED
        for method in route.methods or ()
    }
    described = {(method, path) for path, methods in DOCUMENT["paths"].items() for method in methods}
    assert served == described


def test_every_number_of_a_body_has_its_range() -> None:
    lacking = [
        (name, field)
        for name in BODIES
        for field, schema in fields(name)
        for each in branches(schema)
        if each.get("type") in ("integer", "number") and "minimum" not in each
    ]
    assert lacking == []


async def test_the_document_is_served_and_is_one_of_openapi(http: httpx.AsyncClient) -> None:
    shown = (await http.get("/openapi.json")).json()
    assert shown["paths"] == json.loads(json.dumps(DOCUMENT["paths"]))
    assert shown["openapi"].startswith("3.1")
    for schema in SCHEMAS.values():
        jsonschema.Draft202012Validator.check_schema(schema)


def named(error: Body, field: str) -> bool:
    """Whether an error is about the field. Anthropic's have no param."""
    if "param" in error:
        return (error["param"] or "").split(".")[0].split("[")[0] == field
    return field in error["message"]


@pytest.mark.parametrize("name", list(BODIES))
async def test_what_the_document_lets_through_is_taken_and_nothing_else(name: str, http: httpx.AsyncClient) -> None:
    path, plain = BODIES[name]
    walked = 0
    for _, field, value, allowed in (case for case in cases() if case[0] == name):
        body = {**copy.deepcopy(plain), **WITH.get(f"{name}.{field}", WITH.get(field, {})), field: value}
        if name == "TokenizeRequest" and field == "messages":
            del body["prompt"]
        answer = await http.post(path, json=body)
        said = (field, str(value)[:60], answer.text[:300])
        walked += 1
        if name == "BatchRequest" and answer.status_code == 404:  # there is no such file
            continue
        assert answer.status_code in (200, 400), said
        if not allowed:
            assert answer.status_code == 400, said
            assert named(answer.json()["error"], field), said
        elif answer.status_code != 200:
            assert field in BY_CONTEXT, said
            assert "maximum context length" in answer.text, said
    assert walked


def test_unknown_fields_are_in_no_body() -> None:
    assert all(SCHEMAS[name]["additionalProperties"] is False for name in BODIES)


def test_the_document_names_every_field_that_the_structs_have(model: ServedModel) -> None:
    kinds = {kind.__name__: kind for each in OPERATIONS if isinstance(kind := each.request, type)}
    assert set(kinds) == set(BODIES)
    for name, kind in kinds.items():
        assert set(SCHEMAS[name]["properties"]) == set(kind.__struct_fields__)

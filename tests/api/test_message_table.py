"""Every row of the tables of Anthropic's API in docs/api.md is what happens."""

import json
import re
from typing import Any

import httpx
import pytest
from api_support import ScriptedEngine, running, saying
from message_table import (
    BASES,
    BESIDE,
    BLOCK_TYPES,
    ENDPOINTS,
    PATHS,
    ROLES,
    TOOL_TYPES,
    VALUES,
    conversation_of,
    fields_of,
    table,
)
from tool_models import family_model, tokens_of

FIELDS = table("| field | messages | count_tokens |")
BLOCKS = table("| block | user | assistant |")


def test_every_field_and_block_of_anthropics_has_a_row_and_no_row_is_of_nothing() -> None:
    assert set(FIELDS) == set().union(*(fields_of(endpoint) for endpoint in ENDPOINTS))
    for field, cells in FIELDS.items():
        for endpoint, cell in zip(ENDPOINTS, cells, strict=True):
            assert (cell != "-") == (field in fields_of(endpoint)), (field, endpoint)
    assert set(BLOCKS) == BLOCK_TYPES


def refused(answer: httpx.Response, name: str) -> None:
    body = answer.json()
    assert answer.status_code == 400, (name, answer.text)
    assert (body["type"], body["error"]["type"]) == ("error", "invalid_request_error"), (name, body)
    assert name in body["error"]["message"], (name, body)


@pytest.mark.parametrize("endpoint", ENDPOINTS)
async def test_each_field_is_walked(endpoint: str) -> None:
    model = family_model("qwen3")
    engine = ScriptedEngine(saying(tokens_of(model, "ok")), max_length=100_000)
    async with running(engine, model) as api, httpx.AsyncClient(base_url=api.url, timeout=60) as http:

        async def sent(field: str, value: Any) -> httpx.Response:
            body = BASES[endpoint] | BESIDE.get(field, {}) | {field: value}
            return await http.post(PATHS[endpoint], json=body)

        for field, cells in FIELDS.items():
            cell = cells[ENDPOINTS.index(endpoint)]
            if cell == "yes":
                answer = await sent(field, VALUES[field])
                assert answer.status_code == 200, (field, answer.text)
            elif cell.startswith("only "):
                for value in re.findall(r"`([^`]+)`", cell):
                    answer = await sent(field, json.loads(value))
                    assert answer.status_code == 200, (field, value, answer.text)
                refused(await sent(field, "some value"), field)
                refused(await sent(field, ["some value"]), field)
            elif cell == "refused":
                assert (await sent(field, None)).status_code == 200, field
                for value in ("some value", {}, [], 1):
                    refused(await sent(field, value), field)
            else:
                assert cell == "-", (field, cell)
                refused(await sent(field, VALUES.get(field, "some value")), field)


async def test_each_block_is_walked_and_anthropics_own_tools_are_refused_by_name() -> None:
    model = family_model("qwen3")
    engine = ScriptedEngine(saying(tokens_of(model, "ok")), max_length=100_000)
    async with running(engine, model) as api, httpx.AsyncClient(base_url=api.url, timeout=60) as http:
        for endpoint in ENDPOINTS:
            for block, cells in BLOCKS.items():
                for role, cell in zip(ROLES, cells, strict=True):
                    body = BASES[endpoint] | {"messages": conversation_of(role, block)}
                    answer = await http.post(PATHS[endpoint], json=body)
                    if cell == "yes":
                        assert answer.status_code == 200, (block, role, answer.text)
                    else:
                        assert cell == "refused", (block, role, cell)
                        refused(answer, f"'messages[1].content[0]' of type '{block}'")
            assert len(TOOL_TYPES) > 20
            for kind in TOOL_TYPES - {"custom"}:
                tool = {"type": kind, "name": "x"}
                refused(await http.post(PATHS[endpoint], json=BASES[endpoint] | {"tools": [tool]}), kind)

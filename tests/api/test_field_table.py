"""Every row of the table in docs/api.md is what happens."""

import json
import re
from typing import Any

import httpx
import pytest
from api_support import ScriptedEngine, running, saying
from field_table import BASES, BESIDE, ENDPOINTS, PATHS, fields_of, rows, value_of

from kvasir_engine.api.tokenizer import ServedModel

ROWS = rows()


def test_every_field_of_openai_and_vllm_has_a_row_and_no_row_is_of_nothing() -> None:
    every = set().union(*(fields_of(endpoint) for endpoint in ENDPOINTS))
    assert set(ROWS) == every
    for field, cells in ROWS.items():
        for endpoint in ENDPOINTS:
            if field in fields_of(endpoint):
                assert cells[endpoint] != "-", (field, endpoint)


@pytest.mark.parametrize("endpoint", ENDPOINTS)
async def test_each_row_is_walked(model: ServedModel, endpoint: str) -> None:
    engine = ScriptedEngine(saying(model.tokenizer.encode("ok")))
    async with running(engine, model) as api, httpx.AsyncClient(base_url=api.url, timeout=60) as http:

        async def sent(field: str, value: Any) -> httpx.Response:
            body = BASES[endpoint] | BESIDE.get(f"{endpoint}.{field}", {}) | {field: value}
            return await http.post(PATHS[endpoint], json=body)

        def refused(answer: httpx.Response, field: str) -> None:
            error = answer.json()["error"]
            assert answer.status_code == 400, (field, answer.text)
            assert error["param"].split("[")[0].split(".")[0] == field, (field, error)
            assert field in error["message"], (field, error)

        for field, cells in ROWS.items():
            cell = cells[endpoint]
            if cell == "yes":
                answer = await sent(field, value_of(endpoint, field))
                assert answer.status_code == 200, (field, answer.text)
            elif cell.startswith("only "):
                for value in re.findall(r"`([^`]+)`", cell):
                    answer = await sent(field, json.loads(value))
                    assert answer.status_code == 200, (field, value, answer.text)
                refused(await sent(field, "some value"), field)
            else:
                assert cell in ("refused", "-"), (field, cell)
                refused(await sent(field, value_of(endpoint, field)), field)

"""Numbers at the edges of every type: refused by the API, which names the field, or carried by the wire."""

from collections.abc import AsyncIterator

import httpx
import pytest
import pytest_asyncio
from api_support import ScriptedEngine, running, saying

from kvasir_engine.api.tokenizer import ServedModel
from kvasir_engine.protocol import Submit, decode_to_worker, encode

pytestmark = pytest.mark.asyncio(loop_scope="module")

EDGES = (2**31, 2**53, 2**63, 2**64 - 1, 2**64, 2**128, 10**400)
FIELDS = ("priority", "top_k", "max_tokens", "min_tokens", "n", "logprobs", "prompt_logprobs", "logprob_start_len")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(model: ServedModel) -> AsyncIterator[tuple[ScriptedEngine, httpx.AsyncClient]]:
    scripted = ScriptedEngine(saying([1, 2]), max_length=100)
    async with running(scripted, model) as api, httpx.AsyncClient(base_url=api.url, timeout=60) as client:
        yield scripted, client


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("value", EDGES, ids=lambda value: f"{len(str(value))}-digits")
@pytest.mark.parametrize("field", FIELDS)
async def test_an_integer_is_refused_by_name_or_fits_the_wire(
    engine: tuple[ScriptedEngine, httpx.AsyncClient], field: str, value: int, sign: int
) -> None:
    scripted, http = engine
    before = len(scripted.requests)
    body = f'{{"model": "tiny", "prompt": "x", "{field}": {sign * value}}}'
    answer = await http.post("/v1/completions", content=body)
    if answer.status_code == 200:
        asked = scripted.requests[before]
        frame = Submit("a", asked.tokens, asked.sampling, asked.salt, priority=asked.priority)
        assert decode_to_worker(encode(frame)) == frame
    else:
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert error["param"] == field or error["code"] == "context_length_exceeded"
        assert len(answer.content) < 1000


@pytest.mark.parametrize("value", ["1e999", "-1e999", "NaN", "Infinity", "1" + "0" * 400])
@pytest.mark.parametrize(
    "field", ["temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"]
)
async def test_a_number_that_is_none_is_refused(
    engine: tuple[ScriptedEngine, httpx.AsyncClient], field: str, value: str
) -> None:
    answer = await engine[1].post(
        "/v1/completions", content=f'{{"model": "tiny", "prompt": "x", "{field}": {value}}}'
    )
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


async def test_ids_beyond_the_vocabulary_are_refused(engine: tuple[ScriptedEngine, httpx.AsyncClient]) -> None:
    for ids in ([2**64], [-1], [258], [10**400], list(range(200)) * 30):
        for field in (f'"prompt": "x", "stop_token_ids": {ids}', f'"prompt": [{ids}]'):
            answer = await engine[1].post("/v1/completions", content=f'{{"model": "tiny", {field}}}')
            assert answer.status_code == 400, ids
            assert len(answer.content) < 1000

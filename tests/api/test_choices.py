"""The choices of one request: what becomes of one is no other's fate."""

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import httpx
import pytest
from api_support import EOS, Api, ScriptedEngine, endless, running

from kvasir_engine.api.tokenizer import ServedModel
from kvasir_engine.engine_client import EngineError, GenerateRequest, Output

PLACES = [
    ("/v1/completions", {"prompt": "x"}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
]


def index_of(request: GenerateRequest) -> int:
    return int(request.id.rsplit("-", 1)[1])


def failing_at(*places: int, after: int = 0, error: Exception) -> Any:
    async def script(request: GenerateRequest) -> AsyncGenerator[Output, None]:
        for place in range(3):
            if index_of(request) in places and place == after:
                raise error
            yield Output([65], cached_tokens=0)
        yield Output([EOS], None, "stop", 0)

    return script


class SmallEngine(ScriptedEngine):
    """Has room for `room` sequences, and says so to those beyond."""

    def __init__(self, room: int) -> None:
        super().__init__(self.answer)
        self.room = room
        self.running = 0
        self.refused = 0

    async def answer(self, request: GenerateRequest) -> AsyncGenerator[Output, None]:
        if self.running >= self.room:
            self.refused += 1
            raise EngineError("overloaded", "no room", 503)
        self.running += 1
        try:
            for _ in range(5):
                await asyncio.sleep(0)
                yield Output([65], cached_tokens=0)
            yield Output([EOS], None, "stop", 0)
        finally:
            self.running -= 1


async def ask(
    api: Api, path: str, body: dict[str, Any], stream: bool
) -> tuple[int, dict[int, dict[str, Any]], str]:
    """Status, the choices by index with their whole text, and what was sent."""
    async with httpx.AsyncClient(base_url=api.url, timeout=60) as http:
        answer = await http.post(path, json={"model": "tiny", "stream": stream} | body)
    choices: dict[int, dict[str, Any]] = {}
    if answer.status_code != 200:
        return answer.status_code, {}, answer.text
    if not stream:
        for each in answer.json()["choices"]:
            text = each["text"] if "text" in each else each["message"]["content"]
            choices[each["index"]] = {"text": text, "finish": each["finish_reason"], "error": each.get("error")}
        return 200, choices, answer.text
    for line in answer.text.split("\n\n"):
        if not line.startswith("data: {"):
            continue
        for each in json.loads(line.removeprefix("data: ")).get("choices", []):
            choice = choices.setdefault(each["index"], {"text": "", "finish": None, "error": None})
            choice["text"] += each.get("text") or each.get("delta", {}).get("content") or ""
            choice["finish"] = each["finish_reason"] or choice["finish"]
            choice["error"] = each.get("error") or choice["error"]
    return 200, choices, answer.text


@pytest.mark.parametrize(("path", "body"), PLACES)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("after", [0, 2])
async def test_one_choices_failure_does_not_lose_the_others(
    model: ServedModel, path: str, body: dict[str, Any], stream: bool, after: int
) -> None:
    error = EngineError("kv_digest_mismatch", "page 3 differs")
    letter = model.tokenizer.token_bytes(65).decode()
    async with running(ScriptedEngine(failing_at(0, 2, after=after, error=error)), model) as api:
        status, choices, sent = await ask(api, path, body | {"n": 4}, stream)
    assert status == 200
    assert sorted(choices) == [0, 1, 2, 3]
    for good in (1, 3):
        assert choices[good] == {"text": letter * 3, "finish": "stop", "error": None}
    for bad in (0, 2):
        assert (choices[bad]["text"], choices[bad]["finish"]) == (letter * after, "error")
        assert choices[bad]["error"]["code"] == "kv_digest_mismatch"
    assert sent.endswith("data: [DONE]\n\n") == stream


@pytest.mark.parametrize("stream", [False, True])
async def test_when_all_fail_before_their_first_token_it_is_the_requests_status(
    model: ServedModel, stream: bool
) -> None:
    error = EngineError("no_worker", "nobody there", 503)
    async with running(ScriptedEngine(failing_at(0, 1, 2, error=error)), model) as api:
        status, _, sent = await ask(api, "/v1/completions", {"prompt": "x", "n": 3}, stream)
    assert status == 503
    assert "nobody there" in sent


async def test_when_all_fail_in_the_stream_it_ends_with_the_error(model: ServedModel) -> None:
    error = EngineError("no_worker", "nobody there", 503)
    async with running(ScriptedEngine(failing_at(0, 1, after=1, error=error)), model) as api:
        _, _, sent = await ask(api, "/v1/completions", {"prompt": "x", "n": 2}, True)
    assert "nobody there" in sent.split("\n\n")[-2]
    assert "[DONE]" not in sent


async def test_a_failure_nobody_foresaw_is_told_without_details(model: ServedModel) -> None:
    async with running(ScriptedEngine(failing_at(1, error=RuntimeError("secret"))), model) as api:
        status, choices, sent = await ask(api, "/v1/completions", {"prompt": "x", "n": 2}, False)
    assert (status, choices[0]["finish"], choices[1]["finish"]) == (200, "stop", "error")
    assert "secret" not in sent


@pytest.mark.parametrize(("path", "body"), PLACES)
@pytest.mark.parametrize("choices", [1, 2])
@pytest.mark.parametrize("tokens", [0, 2])
async def test_an_answer_that_the_engine_ends_without_a_reason_is_an_error_and_holds_nobody(
    model: ServedModel, path: str, body: dict[str, Any], choices: int, tokens: int
) -> None:
    async def script(request: GenerateRequest) -> AsyncGenerator[Output, None]:
        for _ in range(tokens):
            yield Output([65], cached_tokens=0)

    async with running(ScriptedEngine(script), model) as api:
        status, _, sent = await ask(api, path, body | {"n": choices}, False)
        assert (status, json.loads(sent)["error"]["code"]) == (500, "unfinished")
        _, _, streamed = await ask(api, path, body | {"n": choices}, True)
    assert '"code":"unfinished"' in streamed
    assert "[DONE]" not in streamed


@pytest.mark.parametrize(("path", "body"), PLACES)
@pytest.mark.parametrize("stream", [False, True])
async def test_more_choices_than_there_is_room_for_all_finish(
    model: ServedModel, path: str, body: dict[str, Any], stream: bool
) -> None:
    engine = SmallEngine(room=2)
    async with running(engine, model) as api:
        status, choices, _ = await ask(api, path, body | {"n": 8}, stream)
    assert (status, [choices[each]["finish"] for each in range(8)]) == (200, ["stop"] * 8)
    assert engine.refused > 0


async def test_choices_that_no_sibling_makes_room_for_are_refused(model: ServedModel) -> None:
    async with running(SmallEngine(room=0), model) as api:
        status, _, sent = await ask(api, "/v1/completions", {"prompt": "x", "n": 4}, False)
    assert status == 503
    assert "no room" in sent


async def test_a_client_that_leaves_ends_choices_that_wait_for_room(model: ServedModel) -> None:
    engine = ScriptedEngine(endless())
    small = engine.script

    async def script(request: GenerateRequest) -> AsyncGenerator[Output, None]:
        if index_of(request):
            raise EngineError("overloaded", "no room", 503)
        async for output in small(request):
            yield output

    engine.script = script
    async with running(engine, model) as api, api.client() as client:
        stream = await client.completions.create(model="tiny", prompt="x", n=3, stream=True)
        await anext(aiter(stream))
        await stream.close()
        async with asyncio.timeout(60):
            while api.lifecycle.inflight:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
    assert len(engine.requests) == 3


async def test_seeds_that_differ_reach_the_engine_as_different_ones(model: ServedModel) -> None:
    seeds = [-(2**63), -1, 0, 1, 2**62, 2**63 - 1]
    engine = ScriptedEngine(failing_at(error=RuntimeError()))
    async with running(engine, model) as api, api.client() as client:
        for seed in seeds:
            await client.completions.create(model="tiny", prompt="x", seed=seed)
    assert len({request.sampling.seed % 2**64 for request in engine.requests}) == len(seeds)

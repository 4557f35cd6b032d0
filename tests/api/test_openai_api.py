"""The front end as the official client sees it."""

import asyncio
import json
from typing import Any

import httpx
import openai
import pytest
from api_support import EOS, Api, ScriptedEngine, endless, failing, running, saying

from kvasir_engine.api.auth import ApiKeys
from kvasir_engine.api.completions import _top
from kvasir_engine.api.detokenizer import Detokenizer
from kvasir_engine.api.errors import ApiError
from kvasir_engine.api.tokenizer import ServedModel
from kvasir_engine.engine_client import EngineError, Output
from kvasir_engine.errors import UserError
from kvasir_engine.protocol import TokenLogprobs

HELLO: list[dict[str, str]] = [{"role": "user", "content": "Hi"}]


async def idle(api: Api) -> None:
    """Return once every request is accounted for: the client may have its answer a little earlier."""
    while api.lifecycle.inflight:  # noqa: ASYNC110
        await asyncio.sleep(0.001)


def ids(model: ServedModel, text: str) -> list[int]:
    return model.tokenizer.encode(text)


async def test_chat_completion(model: ServedModel) -> None:
    engine = ScriptedEngine(saying(ids(model, "The capital is Paris 😀."), cached=5))
    async with running(engine, model) as api, api.client() as client:
        answer = await client.chat.completions.create(model="tiny", messages=HELLO)
    choice = answer.choices[0]
    assert choice.message.content == "The capital is Paris 😀."
    assert (choice.message.role, choice.finish_reason) == ("assistant", "stop")
    (request,) = engine.requests
    assert request.tokens == model.tokenizer.chat(HELLO)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(request.tokens)
    assert answer.usage.completion_tokens == len("The capital is Paris 😀.".encode()) + 1  # the end token
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 5
    assert request.sampling.max_tokens == engine.max_length - len(request.tokens)
    assert request.sampling.temperature == 1.0
    assert request.sampling.stop_token_ids == [EOS]


async def test_a_priority_reaches_the_engine(model: ServedModel) -> None:
    engine = ScriptedEngine(saying(ids(model, "yes")))
    async with running(engine, model) as api, api.client() as client:
        await client.chat.completions.create(model="tiny", messages=HELLO, extra_body={"priority": -3})
        await client.completions.create(model="tiny", prompt="a")
    assert [request.priority for request in engine.requests] == [-3, 0]


async def test_a_streamed_chat_is_the_same_text_in_whole_characters(model: ServedModel) -> None:
    engine = ScriptedEngine(saying(ids(model, "€ and 😀"), cached=3))
    async with running(engine, model) as api, api.client() as client:
        stream = await client.chat.completions.create(
            model="tiny", messages=HELLO, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    texts = [chunk.choices[0].delta.content for chunk in chunks[:-1]]
    assert [text for text in texts if text] == list("€ and 😀")
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.prompt_tokens_details is not None
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens == 3
    assert all(chunk.usage is None for chunk in chunks[:-1])


async def test_the_events_on_the_wire_end_with_done(model: ServedModel) -> None:
    async with (
        running(ScriptedEngine(saying([ids(model, "a")[0]])), model) as api,
        httpx.AsyncClient(timeout=60) as http,
    ):
        body = {"model": "tiny", "prompt": "x", "stream": True}
        response = await http.post(f"{api.url}/v1/completions", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert "usage" not in json.loads(events[0].removeprefix("data: "))


@pytest.mark.parametrize("each", [1, 3, 100])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_string_ends_the_answer_and_the_engines_work(
    model: ServedModel, stream: bool, each: int
) -> None:
    engine = ScriptedEngine(saying(ids(model, "one. STOP two"), each=each))
    async with running(engine, model) as api, api.client() as client:
        if stream:
            chunks = await client.completions.create(
                model="tiny", prompt="x", max_tokens=50, stop=["STOP", "zz"], stream=True
            )
            choices = [chunk.choices[0] async for chunk in chunks]
        else:
            answer = await client.completions.create(model="tiny", prompt="x", max_tokens=50, stop=["STOP", "zz"])
            assert answer.usage is not None
            assert answer.usage.completion_tokens == len("one. STOP")
            choices = list(answer.choices)
        await asyncio.wait_for(engine.ended.get(), 60)
    assert "".join(choice.text for choice in choices) == "one. "
    assert choices[-1].finish_reason == "stop"


async def test_length_and_default_max_tokens(model: ServedModel) -> None:
    engine = ScriptedEngine(saying(ids(model, "x" * 40)))
    async with running(engine, model) as api, api.client() as client:
        default = await client.completions.create(model="tiny", prompt="p")
        three = await client.chat.completions.create(model="tiny", messages=HELLO, max_completion_tokens=3)
    assert (default.choices[0].text, default.choices[0].finish_reason) == ("x" * 16, "length")
    assert (three.choices[0].message.content, three.choices[0].finish_reason) == ("xxx", "length")


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("ab", [[0, 1]]),
        (["a", "b"], [[0], [1]]),
        ([7, 8], [[7, 8]]),
        ([[7], [8, 9]], [[7], [8, 9]]),
    ],
)
async def test_every_form_of_prompt(model: ServedModel, prompt: Any, expected: list[list[int]]) -> None:
    a, b = ids(model, "ab")
    names = {0: a, 1: b}
    engine = ScriptedEngine(saying(ids(model, "ok")))
    async with running(engine, model) as api, api.client() as client:
        answer = await client.completions.create(model="tiny", prompt=prompt)
    assert [request.tokens for request in engine.requests] == [[names.get(t, t) for t in each] for each in expected]
    assert [(choice.index, choice.text) for choice in answer.choices] == [(i, "ok") for i in range(len(expected))]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == sum(map(len, expected))


async def test_n_choices_have_their_own_seeds_and_streams(model: ServedModel) -> None:
    engine = ScriptedEngine(saying(ids(model, "yes")))
    async with running(engine, model) as api, api.client() as client:
        stream = await client.chat.completions.create(model="tiny", messages=HELLO, n=3, seed=7, stream=True)
        texts = ["", "", ""]
        async for chunk in stream:
            texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == ["yes"] * 3
    seeds = [request.sampling.seed for request in engine.requests]
    assert seeds[0] == 7
    assert len(set(seeds)) == 3


async def test_sampling_reaches_the_engine(model: ServedModel) -> None:
    engine = ScriptedEngine(saying([1]))
    async with running(engine, model) as api, api.client() as client:
        for extra in ({}, {"ignore_eos": True}):
            await client.completions.create(
                model="tiny",
                prompt="x",
                temperature=0.5,
                top_p=0.9,
                seed=-1,
                max_tokens=9,
                extra_body={"top_k": 5, "min_p": 0.1, "min_tokens": 2, "stop_token_ids": [3], **extra},
            )
        for _ in range(2):
            await client.completions.create(model="tiny", prompt="x", top_p=0)
    first, second, third, fourth = (request.sampling for request in engine.requests)
    assert (first.temperature, first.top_p, first.top_k, first.min_p) == (0.5, 0.9, 5, 0.1)
    assert (first.seed, first.max_tokens, first.min_tokens) == (-1, 9, 2)
    assert first.stop_token_ids == [EOS, 3]
    assert second.stop_token_ids == [3]
    assert third.temperature == 0  # a nucleus without mass is greedy
    assert third.seed != fourth.seed


async def test_chat_logprobs(model: ServedModel) -> None:
    engine = ScriptedEngine(saying(ids(model, "h€")))
    async with running(engine, model) as api, api.client() as client:
        answer = await client.chat.completions.create(model="tiny", messages=HELLO, logprobs=True, top_logprobs=2)
        stream = await client.chat.completions.create(model="tiny", messages=HELLO, logprobs=True, stream=True)
        streamed = [
            token
            async for chunk in stream
            if chunk.choices[0].logprobs
            for token in chunk.choices[0].logprobs.content or []
        ]
    assert answer.choices[0].logprobs is not None
    content = answer.choices[0].logprobs.content
    assert content is not None
    assert bytes(byte for token in content for byte in token.bytes or []) == "h€".encode()
    assert (content[0].token, content[0].logprob) == ("h", -0.25)
    assert [len(token.top_logprobs) for token in content] == [2, 2, 2, 2]
    assert [(token.bytes, token.top_logprobs) for token in streamed] == [(token.bytes, []) for token in content]


async def test_completion_logprobs(model: ServedModel) -> None:
    engine = ScriptedEngine(saying(ids(model, "hey")))
    async with running(engine, model) as api, api.client() as client:
        answer = await client.completions.create(model="tiny", prompt="x", logprobs=1)
        plain = await client.completions.create(model="tiny", prompt="x", logprobs=0)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert (logprobs.tokens, logprobs.text_offset) == (["h", "e", "y"], [0, 1, 2])
    assert logprobs.token_logprobs == [-0.25] * 3
    assert logprobs.top_logprobs is not None
    assert all(len(each) == 2 for each in logprobs.top_logprobs)
    assert plain.choices[0].logprobs is not None
    assert plain.choices[0].logprobs.top_logprobs is None


def awkward(request: Any) -> Any:
    """Two parts of a character, a whole one, a special token, and one that only the model's vocabulary has."""

    async def script() -> Any:
        top = [(0, -0.1), (160, -0.2), (161, -0.3), (256, -0.4), (300, -0.5)]
        yield Output([161, 65, 300], [TokenLogprobs(-0.3, top)] * 3, "length", 0)

    return script()


async def test_top_logprobs_have_every_token_under_a_name_of_its_own(model: ServedModel) -> None:
    engine = ScriptedEngine(awkward)
    part = [model.tokenizer.token_bytes(token) for token in (160, 161)]
    first, second = ("bytes:" + "".join(f"\\x{byte:02x}" for byte in each) for each in part)
    text, letter = (model.tokenizer.token_bytes(token).decode() for token in (0, 65))
    async with running(engine, model) as api, api.client() as client:
        plain = await client.completions.create(model="tiny", prompt="x", logprobs=5)
        chat = await client.chat.completions.create(model="tiny", messages=HELLO, logprobs=True, top_logprobs=5)
    logprobs = plain.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens == [second, letter, "token_id:300"]
    assert logprobs.top_logprobs is not None
    rest = {text: -0.1, first: -0.2, second: -0.3, "<|im_start|>": -0.4, "token_id:300": -0.5}
    assert logprobs.top_logprobs[0] == rest
    assert logprobs.top_logprobs[1] == rest | {letter: -0.3}
    assert chat.choices[0].logprobs is not None
    content = chat.choices[0].logprobs.content or []
    assert [(each.token, each.bytes) for each in content[0].top_logprobs] == [
        (text, list(text.encode())),
        (first, list(part[0])),
        (second, list(part[1])),
        ("<|im_start|>", None),
        ("token_id:300", None),
    ]


async def test_two_tokens_of_one_text_are_two_entries(model: ServedModel) -> None:
    class Twins:
        def token_bytes(self, token: int) -> bytes:
            return b"A"

        def token_name(self, token: int) -> str | None:
            return None

    piece = Detokenizer(Twins()).push(Output([1], [TokenLogprobs(-1, [(1, -1), (2, -2)])], "length"))
    assert _top(piece.scored[0]) == {"A": -1, "token_id:2": -2}


async def test_models(model: ServedModel) -> None:
    async with running(ScriptedEngine(saying([1])), model) as api, api.client() as client:
        assert [each.id async for each in client.models.list()] == ["tiny"]
        assert (await client.models.retrieve("tiny")).id == "tiny"
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("other")


async def test_an_engine_error_before_the_first_token_is_the_status(model: ServedModel) -> None:
    engine = ScriptedEngine(failing([], EngineError("overloaded", "too much to do", 503)))
    async with running(engine, model) as api, api.client() as client:
        for stream in (False, True):
            with pytest.raises(openai.InternalServerError) as caught:
                await client.chat.completions.create(model="tiny", messages=HELLO, stream=stream)
            assert caught.value.status_code == 503
            assert (caught.value.code, caught.value.type) == ("overloaded", "server_error")


async def test_an_engine_error_in_the_stream_is_an_event_and_no_done(model: ServedModel) -> None:
    engine = ScriptedEngine(failing(ids(model, "ab"), EngineError("kv_digest_mismatch", "page 3 differs")))
    async with running(engine, model) as api, api.client() as client, httpx.AsyncClient(timeout=60) as http:
        body = {"model": "tiny", "prompt": "x", "stream": True}
        wire = (await http.post(f"{api.url}/v1/completions", json=body)).text
        stream = await client.completions.create(model="tiny", prompt="x", stream=True)
        chunks = aiter(stream)
        texts = [(await anext(chunks)).choices[0].text for _ in range(2)]
        with pytest.raises(openai.APIError) as caught:
            await anext(chunks)
        await idle(api)
        failed = api.registry.get_sample_value("kvasir_requests_total", {"code": "500"})
    assert texts == ["a", "b"]
    assert caught.value.code == "kv_digest_mismatch"
    assert "[DONE]" not in wire
    assert failed == 2


async def test_a_failure_nobody_foresaw_is_a_500_without_details(model: ServedModel) -> None:
    async def script(_: Any) -> Any:
        raise RuntimeError("secret")
        yield

    async with running(ScriptedEngine(script), model) as api, api.client() as client:
        with pytest.raises(openai.InternalServerError) as caught:
            await client.completions.create(model="tiny", prompt="x")
        assert "secret" not in str(caught.value)
        assert (await client.models.list()).data


@pytest.mark.parametrize("n", [1, 2])
async def test_a_client_that_leaves_a_stream_ends_the_engines_work(model: ServedModel, n: int) -> None:
    engine = ScriptedEngine(endless())
    async with running(engine, model) as api, api.client() as client:
        stream = await client.chat.completions.create(model="tiny", messages=HELLO, stream=True, n=n)
        await anext(aiter(stream))
        await stream.close()
        for _ in range(n):
            await asyncio.wait_for(engine.ended.get(), 60)


async def test_a_client_that_does_not_wait_for_its_answer_ends_the_engines_work(model: ServedModel) -> None:
    engine = ScriptedEngine(endless())
    async with running(engine, model) as api, httpx.AsyncClient(timeout=60) as http:
        asking = asyncio.create_task(http.post(f"{api.url}/v1/completions", json={"model": "tiny", "prompt": "x"}))
        while not engine.requests:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        asking.cancel()
        await asyncio.wait_for(engine.ended.get(), 60)
        await idle(api)
        assert api.registry.get_sample_value("kvasir_requests_total", {"code": "499"}) == 1


async def test_keys_and_tenants(model: ServedModel, tmp_path: Any) -> None:
    (tmp_path / "..data").mkdir()
    (tmp_path / "one").write_text("key-one\n")
    (tmp_path / "two").write_text("key-two")
    engine = ScriptedEngine(saying([1]))
    async with running(engine, model, ApiKeys(tmp_path)) as api:
        for key in ("key-one", "key-two", "key-one"):
            async with api.client(key) as client:
                await client.completions.create(model="tiny", prompt="x")
        async with api.client("key-three") as client:
            with pytest.raises(openai.AuthenticationError) as caught:
                await client.completions.create(model="tiny", prompt="x")
            assert caught.value.code == "invalid_api_key"
            with pytest.raises(openai.AuthenticationError):
                await client.models.list()
        async with httpx.AsyncClient(timeout=60) as http:
            assert (await http.get(f"{api.url}/v1/models")).status_code == 401
            assert (await http.get(f"{api.url}/health")).status_code == 200
    one, two, again = (request.salt for request in engine.requests)
    assert one == again != two
    assert "key-one" not in one


async def test_rotated_keys_count_without_a_restart(
    model: ServedModel, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvasir_engine.api.auth._REREAD_SECONDS", 0)
    file = tmp_path / "keys"
    with pytest.raises(UserError, match="cannot read the API keys"):
        ApiKeys(file)
    file.write_text("old\n\n")
    keys = ApiKeys(file)
    assert keys.salt("Bearer old")
    file.write_text("new\n")
    assert keys.salt("bearer new")
    with pytest.raises(ApiError):
        keys.salt("Bearer old")
    file.unlink()
    with pytest.raises(ApiError):
        keys.salt("Bearer new")


async def test_readiness_tells_the_reason_and_requests_are_refused_with_it(model: ServedModel) -> None:
    engine = ScriptedEngine(saying([1]))
    async with running(engine, model) as api, httpx.AsyncClient(timeout=60) as http, api.client() as client:
        assert (await http.get(f"{api.url}/ready")).status_code == 200
        engine.reason = "no decode worker is ready"
        response = await http.get(f"{api.url}/ready")
        assert (response.status_code, response.json()) == (503, {"reason": "no decode worker is ready"})
        with pytest.raises(openai.InternalServerError, match="no decode worker is ready") as caught:
            await client.completions.create(model="tiny", prompt="x")
        assert (caught.value.status_code, caught.value.code) == (503, "no_worker")
        engine.reason = None
        api.lifecycle.drain()
        assert (await http.get(f"{api.url}/ready")).json() == {"reason": "draining"}
        assert (await client.completions.create(model="tiny", prompt="x")).choices


async def test_a_draining_process_closes_the_connection_so_that_the_next_request_goes_elsewhere(
    model: ServedModel,
) -> None:
    body = {"model": "tiny", "prompt": "x", "max_tokens": 1}
    async with running(ScriptedEngine(saying([1])), model) as api, httpx.AsyncClient(timeout=60) as http:
        assert "connection" not in (await http.post(f"{api.url}/v1/completions", json=body)).headers
        api.lifecycle.drain()
        answer = await http.post(f"{api.url}/v1/completions", json=body)
        assert (answer.status_code, answer.headers["connection"]) == (200, "close")


async def test_metrics(model: ServedModel) -> None:
    async with running(ScriptedEngine(saying(ids(model, "abc"))), model) as api, api.client() as client:
        await client.completions.create(model="tiny", prompt="x")
        with pytest.raises(openai.BadRequestError):
            await client.completions.create(model="tiny", prompt="x", suffix="end")
        await idle(api)
        async with httpx.AsyncClient(timeout=60) as http:
            shown = (await http.get(f"{api.url}/metrics")).text
    assert 'kvasir_requests_total{code="200"} 1.0' in shown
    assert 'kvasir_requests_total{code="400"} 1.0' in shown
    assert "kvasir_request_ttft_seconds_count 1.0" in shown
    assert "kvasir_request_itl_seconds_count 3.0" in shown
    assert "kvasir_router_inflight 0.0" in shown

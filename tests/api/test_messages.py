"""Anthropic's Messages API, as its official client sees it."""

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import anthropic
import httpx
import pytest
from anthropic import AsyncAnthropic
from anthropic.types import Message as AnthropicMessage
from api_support import Api, ScriptedEngine, endless, failing, running, saying

from kvasir_engine.api.auth import ApiKeys, tenant_salt
from kvasir_engine.api.tokenizer import ServedModel
from kvasir_engine.engine_client import EngineError

HELLO: list[Any] = [{"role": "user", "content": "Hi"}]


def letters(model: ServedModel, text: str) -> list[int]:
    return model.tokenizer.encode(text)


@contextlib.asynccontextmanager
async def asked(
    engine: ScriptedEngine, model: ServedModel, keys: ApiKeys | None = None, key: str = "none"
) -> AsyncIterator[tuple[AsyncAnthropic, Api]]:
    async with (
        running(engine, model, keys) as api,
        AsyncAnthropic(base_url=api.url, api_key=key, max_retries=0, timeout=60) as client,
    ):
        yield client, api


async def test_a_message_is_answered(model: ServedModel) -> None:
    engine = ScriptedEngine(saying(letters(model, "Grüße 😀"), cached=4))
    blocks: list[Any] = [
        {"type": "text", "text": "one", "cache_control": {"type": "ephemeral"}},
        {"type": "text", "text": "two"},
    ]
    async with asked(engine, model) as (client, _):
        answer = await client.messages.create(
            model="tiny",
            max_tokens=50,
            system=[{"type": "text", "text": "Be kind"}],
            messages=[{"role": "user", "content": blocks}],
            metadata={"user_id": "u"},
            extra_body={"temperature": 0.5, "top_k": 5, "top_p": 0.9},
        )
    (request,) = engine.requests
    assert request.tokens == model.tokenizer.chat(
        [{"role": "system", "content": "Be kind"}, {"role": "user", "content": "one\ntwo"}]
    )
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.max_tokens) == (0.5, 5, 0.9, 50)
    assert [block.type for block in answer.content] == ["text"]
    assert answer.content[0].text == "Grüße 😀"  # type: ignore[union-attr]
    assert (answer.stop_reason, answer.stop_sequence, answer.role) == ("end_turn", None, "assistant")
    assert answer.usage.cache_read_input_tokens == 4
    assert answer.usage.input_tokens == len(request.tokens) - 4
    assert answer.usage.output_tokens == len("Grüße 😀".encode()) + 1
    AnthropicMessage.model_validate(answer.model_dump(), strict=True)


@pytest.mark.parametrize(
    ("more", "reason", "stop", "text"),
    [
        ({"max_tokens": 2}, "max_tokens", None, "on"),
        ({"max_tokens": 50, "stop_sequences": ["zz", "two"]}, "stop_sequence", "two", "one "),
        ({"max_tokens": 50, "stop_sequences": ["<|im_end|>"]}, "stop_sequence", "<|im_end|>", "one two"),
        ({"max_tokens": 50, "stop_sequences": ["zz"]}, "end_turn", None, "one two"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_why_it_ended(
    model: ServedModel, more: dict[str, Any], reason: str, stop: str | None, text: str, stream: bool
) -> None:
    async with asked(ScriptedEngine(saying(letters(model, "one two"))), model) as (client, _):
        if stream:
            async with client.messages.stream(model="tiny", messages=HELLO, **more) as events:
                answer = await events.get_final_message()
        else:
            answer = await client.messages.create(model="tiny", messages=HELLO, **more)
    assert (answer.stop_reason, answer.stop_sequence) == (reason, stop)
    assert answer.content[0].text == text  # type: ignore[union-attr]


async def test_the_events_are_anthropics_in_their_order(model: ServedModel) -> None:
    engine = ScriptedEngine(saying(letters(model, "abc"), cached=3))
    body = {"model": "tiny", "max_tokens": 9, "messages": HELLO, "stream": True}
    async with asked(engine, model) as (client, api):
        async with httpx.AsyncClient(timeout=60) as http:
            wire = (await http.post(f"{api.url}/v1/messages", json=body)).text
        stream = await client.messages.create(model="tiny", max_tokens=9, messages=HELLO, stream=True)
        events = [event async for event in stream]
    names = [line.removeprefix("event: ") for line in wire.splitlines() if line.startswith("event: ")]
    assert names == [
        "message_start",
        "content_block_start",
        "ping",
        *["content_block_delta"] * 3,
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert "[DONE]" not in wire
    first: Any = events[0]
    assert first.message.content == []
    assert first.message.usage.cache_read_input_tokens == 3
    assert first.message.usage.input_tokens == len(engine.requests[0].tokens) - 3
    ended: Any = next(event for event in events if event.type == "message_delta")
    assert (ended.delta.stop_reason, ended.usage.output_tokens) == ("end_turn", 4)


async def test_turns_of_one_role_are_one_and_the_last_of_the_assistant_is_continued(model: ServedModel) -> None:
    engine = ScriptedEngine(saying(letters(model, "x")))
    turns: list[Any] = [
        {"role": "user", "content": "a"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "The answer is"},
    ]
    async with asked(engine, model) as (client, _):
        await client.messages.create(model="tiny", max_tokens=5, messages=turns)
        counted = await client.messages.count_tokens(model="tiny", messages=turns)
    shown = b"".join(model.tokenizer.token_bytes(each) for each in engine.requests[0].tokens).decode()
    assert shown.endswith("assistant\nThe answer is")
    assert "a\nb" in shown
    assert counted.input_tokens == len(engine.requests[0].tokens)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": None}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "system", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages[0].content[0]"),
    ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, "messages[0].content[0].tool_use_id"),
    ({"system": [{"type": "text"}]}, "system[0]"),
    ({"tools": [{"name": "f", "input_schema": {}}]}, "tools[0].input_schema"),
    ({"tool_choice": {"type": "any"}}, "tool_choice"),
    ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking"),
    ({"stop_sequences": ["a"] * 5}, "stop_sequences"),
    ({"stop_sequences": [""]}, "stop_sequences"),
    ({"temperature": 3}, "temperature"),
    ({"top_k": -2}, "top_k"),
    ({"metadata": {"user_id": "x" * 1001}}, "metadata.user_id"),
    ({"service_tier": "priority"}, "service_tier"),
    ({"container": "c"}, "container"),
    ({"nonsense": 1}, "nonsense"),
]


@pytest.mark.parametrize(("more", "named"), REFUSED)
async def test_what_is_not_supported_is_refused_by_its_own_name(
    model: ServedModel, more: dict[str, Any], named: str
) -> None:
    body = {"model": "tiny", "max_tokens": 5, "messages": HELLO} | more
    body = {key: value for key, value in body.items() if value is not None}
    async with running(ScriptedEngine(saying([1])), model) as api, httpx.AsyncClient(timeout=60) as http:
        answer = await http.post(f"{api.url}/v1/messages", json=body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["type"] == "error"
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert named in answer.json()["error"]["message"]


async def test_errors_are_the_clients_own(model: ServedModel, tmp_path: Any) -> None:
    (tmp_path / "keys").write_text("secret-key-1\n")
    keys = ApiKeys(tmp_path / "keys")
    engine = ScriptedEngine(saying([1]))
    async with asked(engine, model, keys, key="wrong-key-22") as (client, api):
        with pytest.raises(anthropic.AuthenticationError) as refused:
            await client.messages.create(model="tiny", max_tokens=1, messages=HELLO)
        assert refused.value.body["error"]["type"] == "authentication_error"  # type: ignore[index]
        right = client.with_options(api_key="secret-key-1")
        await right.messages.create(model="tiny", max_tokens=1, messages=HELLO)
        bearer = AsyncAnthropic(base_url=api.url, auth_token="secret-key-1", api_key=None, max_retries=0)
        async with bearer:
            await bearer.messages.create(model="tiny", max_tokens=1, messages=HELLO)
        with pytest.raises(anthropic.NotFoundError):
            await right.messages.create(model="other", max_tokens=1, messages=HELLO)
        with pytest.raises(anthropic.BadRequestError, match="2023-01-01"):
            await right.messages.create(
                model="tiny", max_tokens=1, messages=HELLO, extra_headers={"anthropic-version": "2023-01-01"}
            )
        with pytest.raises(anthropic.BadRequestError, match="context length"):
            await right.messages.create(model="tiny", max_tokens=5000, messages=HELLO)
        async with httpx.AsyncClient(timeout=60) as http:
            wrong = await http.get(f"{api.url}/v1/messages")
            assert (wrong.status_code, wrong.json()["type"]) == (405, "error")
            head = {"x-api-key": "secret-key-1"}  # the header is Anthropic's alone
            assert (await http.get(f"{api.url}/v1/models", headers=head)).status_code == 401
    assert {request.salt for request in engine.requests} == {tenant_salt("secret-key-1")}


async def test_a_late_failure_is_an_event(model: ServedModel) -> None:
    error = EngineError("overloaded", "too much", 503)
    async with (
        asked(ScriptedEngine(failing(letters(model, "ab"), error)), model) as (client, _),
        client.messages.stream(model="tiny", max_tokens=9, messages=HELLO) as stream,
    ):
        with pytest.raises(anthropic.APIStatusError, match="too much"):
            await stream.get_final_message()
    async with asked(ScriptedEngine(failing([], error)), model) as (client, _):
        with pytest.raises(anthropic.APIStatusError) as caught:
            await client.messages.create(model="tiny", max_tokens=9, messages=HELLO, stream=True)
    assert caught.value.status_code == 503
    assert caught.value.body["error"]["type"] == "overloaded_error"  # type: ignore[index]


async def test_a_client_that_leaves_ends_the_work(model: ServedModel) -> None:
    engine = ScriptedEngine(endless())
    async with asked(engine, model) as (client, _):
        async with client.messages.stream(model="tiny", max_tokens=1000, messages=HELLO) as stream:
            async for event in stream:
                if event.type == "content_block_delta":
                    break
        assert await engine.ended.get()

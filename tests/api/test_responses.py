"""OpenAI's Responses API, as its official client sees it."""

from typing import Any

import httpx
import openai
import pytest
from api_support import ScriptedEngine, failing, running, saying
from openai import AsyncOpenAI
from openai.types.responses import Response, ResponseStreamEvent
from openai.types.responses import response_stream_event as events_module
from pydantic import TypeAdapter

from kvasir_engine.api.tokenizer import ServedModel
from kvasir_engine.engine_client import EngineError

ADAPTER: TypeAdapter[Any] = TypeAdapter(events_module.ResponseStreamEvent)


def letters(model: ServedModel, text: str) -> list[int]:
    return model.tokenizer.encode(text)


async def test_a_string_is_a_users_message_and_instructions_the_systems(model: ServedModel) -> None:
    engine = ScriptedEngine(saying(letters(model, "Grüße 😀"), cached=4))
    async with running(engine, model) as api, api.client() as client:
        answer = await client.responses.create(
            model="tiny", input="Hi", instructions="Be kind", metadata={"a": "b"}, temperature=0.5, top_p=0.9
        )
    (request,) = engine.requests
    assert request.tokens == model.tokenizer.chat(
        [{"role": "system", "content": "Be kind"}, {"role": "user", "content": "Hi"}]
    )
    assert (request.sampling.temperature, request.sampling.top_p) == (0.5, 0.9)
    assert answer.output_text == "Grüße 😀"
    assert (answer.status, answer.instructions, answer.metadata) == ("completed", "Be kind", {"a": "b"})
    assert (answer.temperature, answer.top_p, answer.store) == (0.5, 0.9, False)
    assert answer.usage is not None
    assert answer.usage.input_tokens == len(request.tokens)
    assert answer.usage.input_tokens_details.cached_tokens == 4
    assert answer.usage.output_tokens == len("Grüße 😀".encode()) + 1
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    Response.model_validate(answer.model_dump(), strict=True)


async def test_an_answers_items_can_be_sent_back(model: ServedModel) -> None:
    engine = ScriptedEngine(saying(letters(model, "one")))
    async with running(engine, model) as api, api.client() as client:
        first = await client.responses.create(model="tiny", input=[{"role": "user", "content": "a"}])
        items: list[Any] = [{"role": "user", "content": "a"}, *(each.model_dump() for each in first.output)]
        parts = [{"type": "input_text", "text": "b"}, {"type": "input_text", "text": "c"}]
        await client.responses.create(model="tiny", input=[*items, {"role": "user", "content": parts}])
    assert engine.requests[1].tokens == model.tokenizer.chat(
        [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "one"},
            {"role": "user", "content": "b\nc"},
        ]
    )


@pytest.mark.parametrize(("limit", "status"), [(2, "incomplete"), (50, "completed")])
async def test_the_events_are_openais_in_their_order(model: ServedModel, limit: int, status: str) -> None:
    engine = ScriptedEngine(saying(letters(model, "abc")))
    async with running(engine, model) as api, api.client() as client:
        stream = await client.responses.create(model="tiny", input="Hi", max_output_tokens=limit, stream=True)
        events: list[ResponseStreamEvent] = [event async for event in stream]
    text = "abc"[:limit]
    assert [event.type for event in events] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * len(text),
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        f"response.{status}",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    for event in events:
        ADAPTER.validate_python(event.model_dump(warnings=False))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == text
    last: Any = events[-1]
    assert last.response.output_text == text
    assert last.response.status == status
    assert last.response.usage.output_tokens == min(limit, 4)
    if status == "incomplete":
        assert last.response.incomplete_details.reason == "max_output_tokens"
    ids = {event.item_id for event in events if hasattr(event, "item_id")}
    assert ids == {last.response.output[0].id}


async def test_the_clients_stream_helper_gives_the_final_response(model: ServedModel) -> None:
    engine = ScriptedEngine(saying(letters(model, "whole text")))
    async with (
        running(engine, model) as api,
        api.client() as client,
        client.responses.stream(model="tiny", input="Hi") as stream,
    ):
        texts = [event.delta async for event in stream if event.type == "response.output_text.delta"]
        final = await stream.get_final_response()
    assert "".join(texts) == final.output_text == "whole text"


async def test_logprobs_are_included_where_they_are_asked_for(model: ServedModel) -> None:
    engine = ScriptedEngine(saying(letters(model, "ab")))
    ask: dict[str, Any] = {"model": "tiny", "input": "Hi", "include": ["message.output_text.logprobs"]}
    async with running(engine, model) as api, api.client() as client:
        answer = await client.responses.create(**ask, top_logprobs=2)
        stream = await client.responses.create(**ask, top_logprobs=2, stream=True)
        deltas = [event async for event in stream if event.type == "response.output_text.delta"]
    part: Any = answer.output[0].content[0]  # type: ignore[union-attr]
    assert [each.token for each in part.logprobs] == ["a", "b"]
    assert [len(each.top_logprobs) for each in part.logprobs] == [2, 2]
    assert [each.token for delta in deltas for each in delta.logprobs] == ["a", "b"]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"store": True}, "store"),
    ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ({"conversation": "conv_1"}, "conversation"),
    ({"conversation": {"id": "conv_1"}}, "conversation"),
    ({"prompt": {"id": "p"}}, "prompt"),
    ({"background": True}, "background"),
    ({"truncation": "auto"}, "truncation"),
    ({"text": {"format": {"type": "grammar"}}}, "text.format.type"),
    ({"text": {"verbosity": "low"}}, "text.verbosity"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"include": ["reasoning.encrypted_content"]}, "include[0]"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"reasoning": {"effort": "high"}}, "reasoning.effort"),
    ({"reasoning": {"summary": "auto"}}, "reasoning.summary"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
    ({"max_output_tokens": 2**31}, "max_output_tokens"),
    ({"temperature": 2.5}, "temperature"),
    ({"metadata": {"a": "x" * 1001}}, "metadata"),
    ({"stream_options": {"include_obfuscation": False}}, "stream_options"),
    ({"input": []}, "input"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
    ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role"),
    ({"input": [{"content": "x"}]}, "input[0].role"),
    ({"input": [{"role": "user"}]}, "input[0].content"),
    ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0]"),
    ({"input": "x" * 5000}, "input"),
    ({"nonsense": 1}, "nonsense"),
    ({"max_tokens": 1}, "max_tokens"),
]


@pytest.mark.parametrize(("more", "param"), REFUSED)
async def test_what_is_not_supported_is_refused_by_its_own_name(
    model: ServedModel, more: dict[str, Any], param: str
) -> None:
    async with running(ScriptedEngine(saying([1])), model) as api, httpx.AsyncClient(timeout=60) as http:
        answer = await http.post(f"{api.url}/v1/responses", json={"model": "tiny", "input": "a"} | more)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == param
    assert "max_completion_tokens" not in error["message"]


async def test_an_error_before_the_first_token_is_a_status_and_later_an_event(model: ServedModel) -> None:
    error = EngineError("no_worker", "all gone", 503)
    async with running(ScriptedEngine(failing([], error)), model) as api, api.client() as client:
        for stream in (False, True):
            with pytest.raises(openai.APIStatusError) as caught:
                await client.responses.create(model="tiny", input="Hi", stream=stream)
            assert caught.value.status_code == 503
    async with running(ScriptedEngine(failing(letters(model, "ab"), error)), model) as api, api.client() as client:
        events = [event async for event in await client.responses.create(model="tiny", input="Hi", stream=True)]
    last: Any = events[-1]
    assert last.type == "response.failed"
    assert (last.response.status, last.response.error.code) == ("failed", "no_worker")
    assert [event.sequence_number for event in events] == list(range(len(events)))


async def test_nothing_is_kept(model: ServedModel) -> None:
    async with running(ScriptedEngine(saying([1])), model) as api, api.client() as client:
        answer = await client.responses.create(model="tiny", input="Hi")
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(answer.id)
        with pytest.raises(openai.NotFoundError):
            await client.responses.create(model="other", input="Hi")


async def test_a_client_that_leaves_ends_the_work(model: ServedModel) -> None:
    from api_support import endless

    engine = ScriptedEngine(endless())
    async with running(engine, model) as api, AsyncOpenAI(base_url=f"{api.url}/v1", api_key="x") as client:
        stream = await client.responses.create(model="tiny", input="Hi", stream=True)
        async for event in stream:
            if event.type == "response.output_text.delta":
                break
        await stream.close()
        assert await engine.ended.get()

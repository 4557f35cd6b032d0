"""The cheap way to write an event writes the same bytes as the plain one."""

import asyncio
import json
from typing import Any

import pytest
from api_support import ScriptedEngine, running, saying
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from kvasir_engine.api.answer import Answer
from kvasir_engine.api.chat import chat_chunk
from kvasir_engine.api.completions import completion_chunk
from kvasir_engine.api.generation import UsageCounter
from kvasir_engine.api.histogram import LoopHistogram
from kvasir_engine.api.text_events import PLACE, TextEvents
from kvasir_engine.api.tokenizer import ServedModel

TEXT = 'quote " line\n€ 😀 </s> \\'


@pytest.mark.parametrize("chunk", [chat_chunk, completion_chunk])
@pytest.mark.parametrize("include_usage", [False, True])
@pytest.mark.parametrize("model", ["m", PLACE, f'a"{PLACE}'])
def test_an_event_of_a_template_is_the_whole_chunk_encoded(chunk: Any, include_usage: bool, model: str) -> None:
    answer = Answer("id", 1, model, 2, 3, UsageCounter(1), include_usage)
    events = TextEvents(lambda index: chunk(answer, index))
    for index in (1, 0, 1):
        value = json.loads(events.event(index, TEXT))
        assert value["model"] == model
        (choice,) = value["choices"]
        assert choice["index"] == index
        assert (choice["delta"]["content"] if "delta" in choice else choice["text"]) == TEXT
        assert ("usage" in value) is include_usage


async def raw(url: str, version: str, path: str, body: dict[str, Any]) -> bytes:
    """The body of an answer, its chunks put together."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/{version}\r\nhost: x\r\nconnection: close\r\ncontent-length: {len(data)}\r\n\r\n"
    writer.write(head.encode() + data)
    async with asyncio.timeout(60):
        answer = await reader.read()
    writer.close()
    head_bytes, _, rest = answer.partition(b"\r\n\r\n")
    if b"chunked" not in head_bytes:
        assert version == "1.0"
        return rest
    whole = b""
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        whole, rest = whole + rest[: int(size, 16)], rest[int(size, 16) + 2 :]
    return whole


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages"])
async def test_chunks_hold_what_a_client_without_chunks_gets(model: ServedModel, path: str) -> None:
    body: dict[str, Any] = {"model": "tiny", "stream": True}
    body |= {"prompt": "a"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "a"}]}
    if path == "/v1/responses":
        body = {"model": "tiny", "stream": True, "input": "a"}
    if path == "/v1/messages":
        body["max_tokens"] = 20
    async with running(ScriptedEngine(saying(model.tokenizer.encode("Grüße 😀"))), model) as api:
        new = (await raw(api.url, "1.1", path, body)).decode()
        old = (await raw(api.url, "1.0", path, body)).decode()

    def texts(answer: str) -> list[Any]:
        events = [line.removeprefix("data: ") for line in answer.splitlines() if line.startswith("data: {")]
        return [
            [choice.get("text", choice.get("delta")) for choice in event.get("choices", [])]
            + [event.get("type"), event.get("delta")]
            for event in map(json.loads, events)
        ]

    assert texts(new) == texts(old)
    assert len(texts(new)) > 5


def test_the_cheap_histogram_shows_what_prometheus_own_would() -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    buckets = (0.1, 1, 2.5)
    cheap = LoopHistogram("h", "A help.", buckets, ours)
    plain = Histogram("h", "A help.", buckets=buckets, registry=theirs)
    for value, times in ((0.1, 1), (0.05, 3), (1.0, 2), (7.0, 1), (2.4, 1)):
        cheap.observe(value, times)
        for _ in range(times):
            plain.observe(value)

    def shown(registry: CollectorRegistry) -> list[str]:
        return [line for line in generate_latest(registry).decode().splitlines() if "_created" not in line]

    assert shown(ours) == shown(theirs)

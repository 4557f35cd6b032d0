"""Long prompts cost what fits the context at most, in pieces, beside the event loop, while the client stays."""

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from api_support import ScriptedEngine, endless, running, saying

from kvasir_engine.api.text_splitting import MOST_PIECE, PIECE
from kvasir_engine.api.tokenizer import ServedModel, Tokenizer

WORDS = "some words, and more of them. "  # 30 characters and tokens
Ids = Callable[[Any, str], list[int]]


class Encoder:
    """Stands before the tokenizer: counts what it is given, and can hold the long texts back."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.long: list[int] = []  # lengths
        self.threads: set[int] = set()
        self.begun = threading.Event()
        self.go = threading.Event()
        self.go.set()
        real: Ids = Tokenizer._ids

        def ids(backend: Any, text: str) -> list[int]:
            self.threads.add(threading.get_ident())
            if len(text) > 1000:
                self.long.append(len(text))
                self.begun.set()
                assert self.go.wait(60)
            return real(backend, text)

        monkeypatch.setattr(Tokenizer, "_ids", staticmethod(ids))


@pytest.fixture
def encoder(monkeypatch: pytest.MonkeyPatch) -> Encoder:
    return Encoder(monkeypatch)


def bodies(text: str) -> list[tuple[str, dict[str, Any]]]:
    """`text` in every place of a request that is tokenized."""
    chat = "/v1/chat/completions"
    half = [text[: len(text) // 2], text[len(text) // 2 :]]
    return [
        ("/v1/completions", {"prompt": text}),
        ("/v1/completions", {"prompt": ["short", text]}),
        (chat, {"messages": [{"role": "user", "content": text}]}),
        (chat, {"messages": [{"role": role, "content": each} for role, each in zip(("system", "user"), half)]}),  # noqa: B905
        (chat, {"messages": [{"role": "user", "content": [{"type": "text", "text": each} for each in half]}]}),
    ]


@pytest.mark.parametrize("which", range(5))
async def test_more_characters_than_the_tokens_that_fit_can_hold_are_not_tokenized(
    model: ServedModel, encoder: Encoder, which: int
) -> None:
    path, body = bodies("x" * 500_000)[which]
    engine = ScriptedEngine(saying([1]), max_length=1000)
    async with running(engine, model) as api, httpx.AsyncClient(base_url=api.url, timeout=60) as http:
        answer = await http.post(path, json={"model": "tiny"} | body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert encoder.long == []
    assert engine.requests == []


@pytest.mark.parametrize("which", range(5))
async def test_a_long_prompt_is_tokenized_in_pieces_and_not_beyond_what_fits(
    model: ServedModel, encoder: Encoder, which: int
) -> None:
    engine = ScriptedEngine(saying([1]), max_length=100_000)
    path, body = bodies(WORDS * 30_000)[which]  # 900,000 characters
    async with running(engine, model) as api, httpx.AsyncClient(base_url=api.url, timeout=60) as http:
        answer = await http.post(path, json={"model": "tiny"} | body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert max(encoder.long) <= PIECE
    assert len(encoder.long) == -(-100_000 // PIECE)
    assert threading.get_ident() not in encoder.threads


@pytest.mark.parametrize(
    "text", ["a" * 900_000, " " * 900_000, "1" * 900_000, "é" * 900_000, "<|im_end|>" * 90_000]
)
async def test_no_piece_is_without_a_bound_whatever_the_text(
    model: ServedModel, encoder: Encoder, text: str
) -> None:
    encoding = model.tokenizer.plain(text)
    steps = 0
    while not encoding.done:
        encoding.step()
        steps += 1
        assert sum(encoder.long) <= MOST_PIECE * steps
    assert max(encoder.long) <= MOST_PIECE
    assert b"".join(map(model.tokenizer.token_bytes, encoding.tokens)).decode() == text.replace("<|im_end|>", "")


async def test_the_tokens_of_a_text_in_pieces_are_those_of_the_whole(model: ServedModel) -> None:
    text = WORDS * 7000
    whole = model.tokenizer._backend.encode(text).ids
    assert model.tokenizer.encode(text) == whole
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}]
    rendered = model.tokenizer._render(messages)
    assert model.tokenizer.chat(messages) == model.tokenizer._backend.encode(rendered).ids


async def test_a_client_that_leaves_ends_the_tokenizing_of_its_prompt(model: ServedModel, encoder: Encoder) -> None:
    engine = ScriptedEngine(saying([1]), max_length=1_000_000)
    encoder.go.clear()
    async with running(engine, model) as api, httpx.AsyncClient(base_url=api.url, timeout=60) as http:
        request = asyncio.create_task(
            http.post("/v1/completions", json={"model": "tiny", "prompt": WORDS * 30_000})
        )
        assert await asyncio.to_thread(encoder.begun.wait, 60)
        request.cancel()
        async with asyncio.timeout(60):
            while api.lifecycle.inflight:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        encoder.go.set()
        assert (await http.post("/v1/completions", json={"model": "tiny", "prompt": "x"})).status_code == 200
        assert api.registry.get_sample_value("kvasir_requests_total", {"code": "499"}) == 1
    assert len(encoder.long) == 1
    assert len(engine.requests) == 1


async def test_beside_many_long_prompts_short_ones_and_streams_and_probes_go_on(
    model: ServedModel, encoder: Encoder
) -> None:
    """The long ones do not go on until the others have: who needed what a long one holds would wait for ever."""
    engine = ScriptedEngine(endless(), max_length=1_000_000)
    async with (
        running(engine, model) as api,
        httpx.AsyncClient(base_url=api.url, timeout=60) as http,
        api.client() as client,
    ):
        stream = aiter(await client.completions.create(model="tiny", prompt="x", stream=True, max_tokens=100_000))
        encoder.go.clear()
        body = {"model": "tiny", "prompt": WORDS * 20_000, "stream": True}
        long = [asyncio.create_task(client.completions.create(**body)) for _ in range(3)]  # type: ignore[call-overload]
        assert await asyncio.to_thread(encoder.begun.wait, 60)
        while len(encoder.long) < 2:  # noqa: ASYNC110  one in each thread: their first pieces come as they come
            await asyncio.sleep(0.001)
        for _ in range(100):
            await anext(stream)
            assert (await http.get("/health")).status_code == 200
        encoder.go.set()
        for each in await asyncio.gather(*long):
            assert (await anext(aiter(each))).choices


async def test_a_short_prompt_waits_for_one_piece_of_a_long_one_at_most(
    model: ServedModel, encoder: Encoder
) -> None:
    engine = ScriptedEngine(saying([1]), max_length=1_000_000)
    counts: list[int] = []
    async with running(engine, model) as api, httpx.AsyncClient(base_url=api.url, timeout=60) as http:
        body = {"model": "tiny", "prompt": WORDS * 20_000, "max_tokens": 1}
        long = [asyncio.create_task(http.post("/v1/completions", json=body)) for _ in range(4)]
        assert await asyncio.to_thread(encoder.begun.wait, 60)
        while not all(each.done() for each in long):
            before = len(encoder.long)
            short = await http.post("/v1/completions", json={"model": "tiny", "prompt": "x", "max_tokens": 1})
            assert short.status_code == 200
            counts.append(len(encoder.long) - before)
        assert [each.result().status_code for each in long] == [200] * 4
    # 4 first pieces may have come before it, each thread is in one, and one more may begin.
    assert max(counts) <= 8
    assert len(counts) >= len(encoder.long) / 8

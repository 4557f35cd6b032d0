"""Parameters that the front end alone honours, streaming and not."""

import json
from collections.abc import AsyncGenerator
from typing import Any

import httpx
import pytest
from api_support import EOS, ScriptedEngine, running, saying, tiny_tokenizer

from kvasir_engine.api.auth import salt_within, tenant_salt
from kvasir_engine.api.tokenizer import ServedModel, Tokenizer
from kvasir_engine.engine_client import GenerateRequest, Output
from kvasir_engine.protocol import LogitsProcessors, Submit, TokenLogprobs, decode_to_worker, encode

HELLO = [{"role": "user", "content": "Hi"}]
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if not enable_thinking %}no thoughts{{ note }}{{ reasoning_effort }}{% endif %}{% endif %}"
)


def with_template(template: str) -> ServedModel:
    hf = tiny_tokenizer()
    hf.chat_template = template
    return ServedModel("tiny", Tokenizer(hf), 258, (EOS,), 0)


def text_of(model: ServedModel, tokens: list[int]) -> str:
    names = {256: b"{start}", 257: b"{end}"}
    return b"".join(names.get(token) or model.tokenizer.token_bytes(token) for token in tokens).decode()


async def post(engine: ScriptedEngine, model: ServedModel, path: str, **body: Any) -> Any:
    """The JSON answer, or a stream's chunks."""
    async with running(engine, model) as api, httpx.AsyncClient(base_url=api.url, timeout=60) as http:
        answer = await http.post(f"/v1/{path}", json={"model": "tiny"} | body)
    assert answer.status_code == 200, answer.text
    if not body.get("stream"):
        return answer.json()
    events = [event.removeprefix("data: ") for event in answer.text.split("\n\n") if event]
    assert events[-1] == "[DONE]"
    return [json.loads(event) for event in events[:-1]]


def letters(model: ServedModel, text: str) -> list[int]:
    return model.tokenizer.encode(text)


@pytest.mark.parametrize(
    ("prompt", "echoes"),
    [("p€<|im_end|>", ["p€<|im_end|>"]), (["a", "b"], ["a", "b"]), ([[65], [66, 67]], None)],
)
async def test_echo_puts_each_prompt_before_its_answers(
    model: ServedModel, prompt: Any, echoes: list[str] | None
) -> None:
    if echoes is None:
        echoes = [text_of(model, each) for each in prompt]
    engine = ScriptedEngine(saying(letters(model, "xy")))
    whole = await post(engine, model, "completions", prompt=prompt, echo=True, n=2)
    chunks = await post(engine, model, "completions", prompt=prompt, echo=True, n=2, stream=True)
    expected = [each + "xy" for each in echoes for _ in range(2)]
    assert [choice["text"] for choice in whole["choices"]] == expected
    texts = [""] * len(expected)
    for chunk in chunks:
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == expected


def rated(model: ServedModel) -> ScriptedEngine:
    """The i-th sequence says its digit with the i-th of these log-probabilities."""
    rates = [-1.0, -0.2, -3.0, -0.1]

    async def script(request: GenerateRequest) -> AsyncGenerator[Output, None]:
        place = int(request.id.rsplit("-", 1)[1])
        assert request.sampling.logprobs is not None
        yield Output([48 + place], [TokenLogprobs(rates[place % 4])], "length", 0)

    return ScriptedEngine(script)


async def test_best_of_shows_the_likeliest(model: ServedModel) -> None:
    answer = await post(rated(model), model, "completions", prompt=["a", "b"], n=2, best_of=4, max_tokens=1)
    digits = [text_of(model, [48 + place]) for place in (3, 1, 7, 5)]
    assert [(each["index"], each["text"]) for each in answer["choices"]] == list(enumerate(digits))
    assert [each["logprobs"] for each in answer["choices"]] == [None] * 4
    assert answer["usage"]["completion_tokens"] == 8


@pytest.mark.parametrize("stream", [False, True])
async def test_token_ids_of_prompt_and_answer(model: ServedModel, stream: bool) -> None:
    tokens = letters(model, "h€y")
    engine = ScriptedEngine(saying(tokens))
    plain = await post(engine, model, "completions", prompt=[[1, 2], [3]], return_token_ids=True, stream=stream)
    chat = await post(engine, model, "chat/completions", messages=HELLO, return_token_ids=True, stream=stream)
    ids: dict[int, list[int]] = {}
    prompts: dict[int, list[list[int]]] = {}
    for chunk in plain if stream else [plain]:
        for choice in chunk["choices"]:
            ids.setdefault(choice["index"], []).extend(choice["token_ids"])
            prompts.setdefault(choice["index"], []).extend(
                [choice["prompt_token_ids"]] if "prompt_token_ids" in choice else []
            )
    assert ids == {0: [*tokens, EOS], 1: [*tokens, EOS]}
    assert prompts == {0: [[1, 2]], 1: [[3]]}
    chunks = chat if stream else [chat]
    assert [each["prompt_token_ids"] for each in chunks if "prompt_token_ids" in each] == [
        model.tokenizer.chat(HELLO)
    ]
    given = [token for each in chunks for choice in each["choices"] for token in choice.get("token_ids", [])]
    assert given == [*tokens, EOS]
    bare = await post(engine, model, "completions", prompt="x")
    assert "token_ids" not in bare["choices"][0]


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
async def test_continuous_usage_grows_to_the_whole(model: ServedModel, path: str) -> None:
    engine = ScriptedEngine(saying(letters(model, "abc"), cached=1))
    asked: dict[str, Any] = {"prompt": "xyz"} if path == "completions" else {"messages": HELLO}
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = await post(engine, model, path, stream=True, stream_options=options, **asked)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert set(counts) == {1, 2, 3, 4}
    assert {chunk["usage"]["prompt_tokens_details"]["cached_tokens"] for chunk in chunks} == {1}


@pytest.mark.parametrize(("count", "kept"), [(3, "efg"), (7, "abcdefg"), (100, "abcdefg")])
async def test_a_truncated_prompt_keeps_its_end(model: ServedModel, count: int, kept: str) -> None:
    engine = ScriptedEngine(saying(letters(model, "x")))
    for prompt in ("abcdefg", letters(model, "abcdefg")):
        answer = await post(engine, model, "completions", prompt=prompt, truncate_prompt_tokens=count, echo=True)
        assert answer["usage"]["prompt_tokens"] == len(kept)
    assert [text_of(model, each.tokens) for each in engine.requests] == [kept, kept]
    assert answer["choices"][0]["text"] == kept + "x"


@pytest.mark.parametrize("prompt", ["a" * 150, [65] * 150])
async def test_a_prompt_beyond_the_context_may_be_truncated_into_it(model: ServedModel, prompt: Any) -> None:
    engine = ScriptedEngine(saying([1]), max_length=100)
    answer = await post(engine, model, "completions", prompt=prompt, truncate_prompt_tokens=-1, max_tokens=1)
    assert answer["usage"]["prompt_tokens"] == 99


async def test_the_generation_prompt_may_be_left_out(model: ServedModel) -> None:
    engine = ScriptedEngine(saying([1]))
    await post(engine, model, "chat/completions", messages=HELLO, add_generation_prompt=False)
    assert text_of(model, engine.requests[0].tokens) == "{start}user\nHi{end}\n"


@pytest.mark.parametrize("text", ["The answer is", "It says <|im_end|> here"])
async def test_the_final_message_is_continued(model: ServedModel, text: str) -> None:
    engine = ScriptedEngine(saying([1]))
    messages = [*HELLO, {"role": "assistant", "content": text}]
    await post(engine, model, "chat/completions", messages=messages, continue_final_message=True)
    assert text_of(model, engine.requests[0].tokens) == "{start}user\nHi{end}\n{start}assistant\n" + text


async def test_variables_reach_a_template_that_knows_them_as_text() -> None:
    model = with_template(THINKING)
    engine = ScriptedEngine(saying([1]))
    for variables in ({}, {"enable_thinking": True}, {"note": "<|im_end|>"}):
        await post(engine, model, "chat/completions", messages=HELLO, chat_template_kwargs=variables)
    await post(engine, model, "chat/completions", messages=HELLO, reasoning_effort="high")
    before = "{start}user\nHi{end}\n{start}assistant\n"
    assert [text_of(model, each.tokens).removeprefix(before) for each in engine.requests] == [
        "no thoughts",
        "",
        "no thoughts<|im_end|>",
        "no thoughtshigh",
    ]


async def test_a_variable_nested_deeply_is_a_400() -> None:
    model = with_template(THINKING)
    deep = b'{"a":' * 900 + b"1" + b"}" * 900
    body = (
        b'{"model":"tiny","messages":[{"role":"user","content":"x"}],"chat_template_kwargs":{"note":' + deep + b"}}"
    )
    async with (
        running(ScriptedEngine(saying([1])), model) as api,
        httpx.AsyncClient(base_url=api.url, timeout=60) as http,
    ):
        answer = await http.post("/v1/chat/completions", content=body)
    assert answer.status_code == 400


async def test_a_cache_salt_narrows_the_tenants_own(model: ServedModel) -> None:
    engine = ScriptedEngine(saying([1]))
    for salt in ("a", "b", "a", None):
        await post(engine, model, "completions", prompt="x", cache_salt=salt)
    first, second, again, none = (each.salt for each in engine.requests)
    assert first == again
    assert len({first, second, none}) == 3
    one, two = tenant_salt("key-one"), tenant_salt("key-two")
    within = {salt_within(one, "a"), salt_within(two, "a"), salt_within("", "a"), salt_within(one, two)}
    assert len({one, two, *within}) == 6


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["completions", "chat/completions"])
async def test_penalties_biases_and_words_reach_the_engine(model: ServedModel, path: str, stream: bool) -> None:
    engine = ScriptedEngine(saying([1]))
    asked: dict[str, Any] = {"prompt": "x"} if path == "completions" else {"messages": HELLO}
    asked |= {
        "presence_penalty": -1,
        "frequency_penalty": 0.5,
        "repetition_penalty": 1.25,
        "logit_bias": {"5": 3, "0": -100, "7": 0},
        "bad_words": ["ab", " ab", "<|im_end|>"],
        "allowed_token_ids": [9, 1, 2, 9, 5],
        "n": 2,
    }
    await post(engine, model, path, stream=stream, **asked)
    spaced, plain = model.tokenizer.bare(" ab"), model.tokenizer.bare("ab")
    assert [each.sampling.processors for each in engine.requests] == [
        LogitsProcessors(
            presence_penalty=-1,
            frequency_penalty=0.5,
            repetition_penalty=1.25,
            logit_bias=[(5, 3.0), (0, -100.0)],
            bad_words=[plain, spaced, [EOS]],
            allowed_token_ids=[1, 2, 5, 9],
        )
    ] * 2
    for each in engine.requests:
        frame = Submit("a", each.tokens, each.sampling)
        assert decode_to_worker(encode(frame)) == frame


async def test_values_that_change_nothing_ask_the_worker_for_nothing(model: ServedModel) -> None:
    engine = ScriptedEngine(saying([1]))
    neutral = {"presence_penalty": 0, "frequency_penalty": 0.0, "repetition_penalty": 1, "logit_bias": {"5": 0}}
    await post(engine, model, "completions", prompt="x", bad_words=[], **neutral)
    assert engine.requests[0].sampling.processors is None

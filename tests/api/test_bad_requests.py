"""What cannot be honoured is refused, in OpenAI's words; what changes nothing is accepted."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import pytest_asyncio
from api_support import ScriptedEngine, running, saying, tiny_model

from kvasir_engine.api.tokenizer import ServedModel

pytestmark = pytest.mark.asyncio(loop_scope="module")

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}
PLAIN = {"model": "tiny", "prompt": "x"}
BANG = tiny_model().tokenizer.bare("!")[0]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def http(model: ServedModel) -> AsyncIterator[httpx.AsyncClient]:
    engine = ScriptedEngine(saying([1, 2]), max_length=100)
    async with running(engine, model) as api, httpx.AsyncClient(base_url=api.url, timeout=60) as client:
        yield client


async def post(http: httpx.AsyncClient, path: str, body: Any) -> httpx.Response:
    sent = {"content": body} if isinstance(body, bytes) else {"json": body}
    return await http.post(path, **sent)


def check_error(response: httpx.Response, status: int, param: str | None, code: str | None) -> None:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (response.status_code, error["param"], error["code"]) == (status, param, code)
    assert error["type"] == "invalid_request_error"
    assert error["message"]


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"temperature": 2.1}, "temperature", "decimal_above_max_value"),
        ({"temperature": -1}, "temperature", "decimal_below_min_value"),
        ({"temperature": "hot"}, "temperature", "invalid_type"),
        ({"top_p": 1.5}, "top_p", "decimal_above_max_value"),
        ({"top_k": -2}, "top_k", "integer_below_min_value"),
        ({"min_p": 2}, "min_p", "decimal_above_max_value"),
        ({"max_tokens": 0}, "max_tokens", "integer_below_min_value"),
        ({"max_tokens": True}, "max_tokens", "invalid_type"),
        ({"max_tokens": 5, "min_tokens": 6}, "min_tokens", "integer_above_max_value"),
        ({"n": 0}, "n", "integer_below_min_value"),
        ({"n": 1000}, "n", "integer_above_max_value"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "array_above_max_length"),
        ({"stop": ""}, "stop", "empty_string"),
        ({"stop": ["a", "b" * 1001]}, "stop", "string_above_max_length"),
        ({"stop_token_ids": [1] * 1001}, "stop_token_ids", "array_above_max_length"),
        ({"user": "u" * 100_000}, "user", "string_above_max_length"),
        ({"seed": 2**63}, "seed", "integer_above_max_value"),
        ({"seed": 10**4000}, "seed", "integer_above_max_value"),
        ({"seed": -(10**4000)}, "seed", "integer_below_min_value"),
        ({"n": 10**400}, "n", "integer_above_max_value"),
        ({"seed": 2**64}, "seed", "integer_above_max_value"),
        ({"seed": 2**70}, "seed", "integer_above_max_value"),
        ({"seed": -(2**63) - 1}, "seed", "integer_below_min_value"),
        ({"stop_token_ids": [258]}, "stop_token_ids", "invalid_value"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        (
            {"stream": True, "stream_options": {"include_obfuscation": True}},
            "stream_options.include_obfuscation",
            "unsupported_value",
        ),
        ({"presence_penalty": 2.5}, "presence_penalty", "decimal_above_max_value"),
        ({"presence_penalty": -3}, "presence_penalty", "decimal_below_min_value"),
        ({"presence_penalty": "much"}, "presence_penalty", "invalid_type"),
        ({"frequency_penalty": -2.1}, "frequency_penalty", "decimal_below_min_value"),
        ({"frequency_penalty": 10**40}, "frequency_penalty", "decimal_above_max_value"),
        ({"repetition_penalty": 0}, "repetition_penalty", "decimal_below_min_value"),
        ({"repetition_penalty": -1.5}, "repetition_penalty", "decimal_below_min_value"),
        ({"repetition_penalty": 1e-9}, "repetition_penalty", "decimal_below_min_value"),
        ({"repetition_penalty": 101}, "repetition_penalty", "decimal_above_max_value"),
        ({"logit_bias": {"5": 100.5}}, "logit_bias", "decimal_above_max_value"),
        ({"logit_bias": {"5": -101}}, "logit_bias", "decimal_below_min_value"),
        ({"logit_bias": {"258": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"-1": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"05": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"five": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"٣": 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {"9" * 5000: 1}}, "logit_bias", "invalid_value"),
        ({"logit_bias": {str(n): 1 for n in range(1025)}}, "logit_bias", "array_above_max_length"),
        ({"bad_words": [""]}, "bad_words", "empty_string"),
        ({"bad_words": ["a", " \n"]}, "bad_words", "empty_string"),
        ({"bad_words": ["x" * 101]}, "bad_words", "string_above_max_length"),
        ({"bad_words": ["x"] * 129}, "bad_words", "array_above_max_length"),
        ({"bad_words": ["!", "ab"], "allowed_token_ids": [BANG]}, "allowed_token_ids", "invalid_value"),
        ({"allowed_token_ids": []}, "allowed_token_ids", "empty_array"),
        ({"allowed_token_ids": [258]}, "allowed_token_ids", "invalid_value"),
        ({"allowed_token_ids": [-1]}, "allowed_token_ids", "invalid_value"),
        ({"allowed_token_ids": [10**400]}, "allowed_token_ids", "invalid_value"),
        ({"allowed_token_ids": [1] * 300}, "allowed_token_ids", "array_above_max_length"),
        ({"allowed_token_ids": [257], "min_tokens": 1}, "allowed_token_ids", "invalid_value"),
        ({"best_off": 2}, "best_off", "unknown_parameter"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "integer_below_min_value"),
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens", "integer_below_min_value"),
        ({"cache_salt": ""}, "cache_salt", "empty_string"),
        (
            {"stream": True, "stream_options": {"continuous_usage_stats": True}},
            "stream_options.continuous_usage_stats",
            "invalid_value",
        ),
    ],
)
@pytest.mark.parametrize(("path", "base"), [("/v1/chat/completions", CHAT), ("/v1/completions", PLAIN)])
async def test_refused_on_both_endpoints(
    http: httpx.AsyncClient, path: str, base: dict[str, Any], change: dict[str, Any], param: str, code: str
) -> None:
    check_error(await post(http, path, base | change), 400, param, code)


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"messages": []}, "messages", "empty_array"),
        ({"messages": "hi"}, "messages", "invalid_type"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role", "unsupported_value"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "invalid_type"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "invalid_type"),
        ({"messages": [{"content": "x"}]}, "messages[0].role", "missing_required_parameter"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0]",
            "unsupported_value",
        ),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]},
            "messages",
            "invalid_value",
        ),  # the template's own refusal
        ({"top_logprobs": 3}, "top_logprobs", "invalid_value"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "integer_above_max_value"),
        ({"logprobs": 3}, "logprobs", "invalid_type"),
        ({"max_tokens": 3, "max_completion_tokens": 3}, "max_tokens", "invalid_value"),
        ({"store": True}, "store", "unsupported_value"),
        ({"modalities": ["audio"]}, "modalities", "unsupported_value"),
        ({"reasoning_effort": "high"}, "reasoning_effort", "unsupported_value"),
        ({"salt": "other-tenant"}, "salt", "unknown_parameter"),
        (
            {"add_generation_prompt": True, "continue_final_message": True},
            "continue_final_message",
            "invalid_value",
        ),
        ({"chat_template_kwargs": {"thinking": 1}}, "chat_template_kwargs.thinking", "unsupported_value"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages", "unsupported_value"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs.tokenize", "unsupported_value"),
        ({"chat_template": "x"}, "chat_template", "unknown_parameter"),
        ({"messages": [{"role": "user", "content": "x", "name": "me"}]}, "messages[0].name", "unsupported_value"),
        ({"messages": [{"role": "user", "content": "x"}] * 101}, "messages", "array_above_max_length"),
        ({"metadata": {str(n): "" for n in range(17)}}, "metadata", "array_above_max_length"),
        ({"metadata": {"a": "b" * 1001}}, "metadata", "string_above_max_length"),
        ({"safety_identifier": "b" * 1001}, "safety_identifier", "string_above_max_length"),
        ({"prompt_cache_key": "b" * 1001}, "prompt_cache_key", "string_above_max_length"),
    ],
)
async def test_refused_in_a_chat(http: httpx.AsyncClient, change: dict[str, Any], param: str, code: str) -> None:
    check_error(await post(http, "/v1/chat/completions", CHAT | change), 400, param, code)


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"prompt": ""}, "prompt", "empty_prompt"),
        ({"prompt": []}, "prompt", "empty_array"),
        ({"prompt": [[]]}, "prompt", "empty_prompt"),
        ({"prompt": ["a", 5]}, "prompt", "invalid_type"),
        ({"prompt": [300]}, "prompt", "invalid_value"),
        ({"prompt": [2**70]}, "prompt", "invalid_value"),
        ({"prompt": [5, "a"]}, "prompt", "invalid_type"),
        ({"prompt": ["a"] * 129}, "prompt", "invalid_value"),
        ({"prompt": [[1]] * 129}, "prompt", "invalid_value"),
        ({"prompt": [1] * 100_000}, "prompt", "context_length_exceeded"),
        ({"prompt": [[1], [1] * 100_000]}, "prompt", "context_length_exceeded"),
        ({"prompt": "a" * 100_000}, "prompt", "context_length_exceeded"),
        ({"prompt": ["a", "a" * 100_000]}, "prompt", "context_length_exceeded"),
        ({"prompt": [[1], [-1]]}, "prompt", "invalid_value"),
        ({"prompt": ["a"] * 100, "n": 2}, "prompt", "invalid_value"),
        ({"echo": True, "max_tokens": -1}, "max_tokens", "integer_below_min_value"),
        ({"max_tokens": 0}, "max_tokens", "integer_below_min_value"),
        ({"echo": False, "max_tokens": 0, "logprobs": 1}, "max_tokens", "integer_below_min_value"),
        ({"echo": True, "max_tokens": 0, "min_tokens": 1}, "min_tokens", "integer_above_max_value"),
        ({"prompt_logprobs": -1}, "prompt_logprobs", "integer_below_min_value"),
        ({"logprob_start_len": 1}, "logprob_start_len", "invalid_value"),
        ({"logprob_start_len": 0, "echo": True}, "logprob_start_len", "invalid_value"),
        ({"logprob_start_len": 1, "logprobs": 1}, "logprob_start_len", "invalid_value"),
        ({"prompt_logprobs": 1, "logprob_start_len": 2**31}, "logprob_start_len", "integer_above_max_value"),
        ({"prompt_logprobs": 1, "logprob_start_len": -(2**31)}, "logprob_start_len", "integer_below_min_value"),
        ({"prompt_logprobs": 1, "logprob_start_len": 1.5}, "logprob_start_len", "invalid_type"),
        ({"prompt_logprobs": 21}, "prompt_logprobs", "integer_above_max_value"),
        ({"prompt_logprobs": 2**70}, "prompt_logprobs", "integer_above_max_value"),
        ({"prompt_logprobs": True}, "prompt_logprobs", "invalid_type"),
        ({"prompt_logprobs": 1.5}, "prompt_logprobs", "invalid_type"),
        ({"prompt": ["a" * 70] * 100, "prompt_logprobs": 20}, "prompt_logprobs", "integer_above_max_value"),
        ({"prompt": ["a" * 500] * 64, "logprobs": 4, "echo": True}, "echo", "integer_above_max_value"),
        ({"prompt": "a" * 70, "prompt_logprobs": 20, "n": 100}, "prompt_logprobs", "integer_above_max_value"),
        ({"suffix": "end"}, "suffix", "unsupported_value"),
        ({"best_of": 2, "stream": True}, "best_of", "invalid_value"),
        ({"best_of": 2, "n": 3}, "best_of", "integer_below_min_value"),
        ({"best_of": 129}, "best_of", "integer_above_max_value"),
        ({"best_of": 2, "prompt": ["a"] * 65}, "prompt", "invalid_value"),
        ({"logprobs": 6}, "logprobs", "integer_above_max_value"),
    ],
)
async def test_refused_in_a_completion(
    http: httpx.AsyncClient, change: dict[str, Any], param: str, code: str
) -> None:
    check_error(await post(http, "/v1/completions", PLAIN | change), 400, param, code)


DEEP = 100_000


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"model": "tiny", "prompt": "x"',
        b'{"model": "tiny", "prompt": "x"} {}',
        b"[1]",
        b"null",
        b'"x"',
        b"5",
        b"\xff",
        b'\xef\xbb\xbf{"model": "tiny", "prompt": "x"}',
        '{"model": "tiny", "prompt": "x"}'.encode("utf-16"),
        b'{"model": "tiny", "prompt": "a\xff"}',
        b'{"model": "tiny", "prompt": "\xed\xa0\x80"}',
        b'{"model": "tiny", "pro\xffmpt": "a"}',
        b'{"model": "tiny", "prompt": "a", "user": "\xc3"}',
        b'{"model": "tiny", "prompt": "\\ud800"}',
        b'{"model": "tiny", "prompt": "\\udc00"}',
        b'{"model": "tiny", "prompt": "\\ud800\\u0041"}',
        b'{"model": "tiny", "prompt": ["a", "\\udfff"]}',
        b'{"model": "tiny", "prompt": "x", "temperature": NaN}',
        b'{"model": "tiny", "prompt": "x", "temperature": Infinity}',
        b'{"model": "tiny", "prompt": "x", "temperature": 1e999}',
        b'{"model": "tiny", "prompt": "x", "seed": ' + b"9" * DEEP + b"}",
        b'{"model": "tiny", "prompt": ' + b"[" * DEEP + b"]" * DEEP + b"}",
        b'{"model": "tiny", "prompt": "x", "user": ' + b'{"a":' * DEEP + b"1" + b"}" * DEEP + b"}",
        b"[" * DEEP,
        b'{"model": "tiny", "prompt": [' + b"[],".join([b"", *[b""] * 250_000]) + b"[]]}",
    ],
)
async def test_malformed_bodies(http: httpx.AsyncClient, body: bytes, caplog: pytest.LogCaptureFixture) -> None:
    response = await post(http, "/v1/completions", body)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"
    assert not caplog.records


@pytest.mark.parametrize(
    "field",
    [
        b'"tools": [{"type": "function", "custom": ' + b"[" * DEEP + b"]" * DEEP + b"}]",
        b'"tool_choice": {"type": "x", "custom": ' + b'{"a":' * DEEP + b"1" + b"}" * DEEP + b"}",
        b'"tools": [{"type": "function", "function": {"name": "f", "parameters": '
        + b'{"a":' * DEEP
        + b"1"
        + b"}" * DEEP
        + b"}}]",
        b'"tools": ["\xff"]',
        b'"metadata": {"\xff": "a"}',
    ],
)
async def test_malformed_values_of_any_shape(
    http: httpx.AsyncClient, field: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    body = b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], ' + field + b"}"
    check_error(await post(http, "/v1/chat/completions", body), 400, None, None)
    assert not caplog.records


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"content-type": "text/plain"}, 400),
        ({"content-type": "application/x-www-form-urlencoded"}, 400),
        ({"content-type": "application/json; charset=utf-16"}, 400),
        ({"content-encoding": "gzip"}, 400),
        ({"content-encoding": "br"}, 400),
        ({"content-type": "application/json; charset=UTF-8"}, 200),
        ({"content-type": 'application/problem+json; charset="utf-8"; x=y', "content-encoding": "identity"}, 200),
    ],
)
async def test_a_body_of_another_type_or_coding(
    http: httpx.AsyncClient, headers: dict[str, str], status: int
) -> None:
    response = await http.post("/v1/completions", content=json.dumps(PLAIN), headers=headers)
    assert response.status_code == status
    if status != 200:
        check_error(response, status, None, None)


async def test_the_last_of_two_equal_keys_counts_as_in_most_parsers(http: httpx.AsyncClient) -> None:
    body = b'{"model": "tiny", "prompt": "y", "prompt": "x", "n": 2, "n": 1}'
    response = await post(http, "/v1/completions", body)
    assert (response.status_code, len(response.json()["choices"])) == (200, 1)


async def test_a_name_of_a_megabyte_is_not_said_back(http: httpx.AsyncClient) -> None:
    for change in ({"model": "m" * 10**6}, {"x" * 10**6: 1}, {"temperature": "t" * 10**6}):
        response = await post(http, "/v1/completions", PLAIN | change)
        assert response.status_code in (400, 404)
        assert len(response.content) < 10_000


async def raw(http: httpx.AsyncClient, head: bytes, body: bytes = b"") -> tuple[int, bytes]:
    """Status and body of the answer to bytes that no HTTP library would send."""
    url = http.base_url
    reader, writer = await asyncio.open_connection(url.host, url.port)
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n" + head + b"\r\n\r\n" + body)
    async with asyncio.timeout(60):
        answer = await reader.read()
    writer.close()
    first, _, rest = answer.partition(b"\r\n\r\n")
    return int(first.split()[1]), rest


@pytest.mark.parametrize(
    "head",
    [
        b"Content-Length: abc",
        b"Content-Length: -5",
        b"Content-Length: 1e3",
        b"Content-Length: +5",
        b"Content-Length:",
        b"Content-Length: 5\r\nContent-Length: 6",
        b"Transfer-Encoding: gzip",
        b"a line without a colon",
    ],
)
async def test_a_head_that_says_no_length_is_a_400_in_openais_body(http: httpx.AsyncClient, head: bytes) -> None:
    status, body = await raw(http, head)
    assert 400 <= status < 500 or status == 501
    assert json.loads(body)["error"]["type"] == "invalid_request_error"
    assert (await post(http, "/v1/completions", PLAIN)).status_code == 200


async def test_a_length_beyond_the_limit_is_refused_before_the_body(http: httpx.AsyncClient) -> None:
    for length in (b"100000000", b"9" * 18):
        status, body = await raw(http, b"Connection: close\r\nContent-Length: " + length)
        assert (status, json.loads(body)["error"]["code"]) == (413, "request_too_large")
    check_error(
        await post(http, "/v1/completions", PLAIN | {"prompt": "a" * 5_000_000}), 413, None, "request_too_large"
    )


async def test_a_client_that_leaves_within_its_body_is_no_error_of_ours(
    http: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    _, writer = await asyncio.open_connection(http.base_url.host, http.base_url.port)
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
    await writer.drain()
    writer.close()
    await writer.wait_closed()
    async with asyncio.timeout(60):
        while 'code="499"' not in (await http.get("/metrics")).text:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert not caplog.records


async def test_an_unknown_model(http: httpx.AsyncClient) -> None:
    check_error(await post(http, "/v1/completions", PLAIN | {"model": "gpt"}), 404, "model", "model_not_found")
    check_error(await post(http, "/v1/completions", {"prompt": "x"}), 400, "model", "missing_required_parameter")


@pytest.mark.parametrize("size", [100, 500])
async def test_a_prompt_that_is_too_long(http: httpx.AsyncClient, size: int) -> None:
    response = await post(http, "/v1/completions", PLAIN | {"prompt": [1] * size})
    check_error(response, 400, "prompt", "context_length_exceeded")
    assert f"maximum context length is 100 tokens. However, your prompt resulted in {size}" in response.text
    response = await post(http, "/v1/completions", PLAIN | {"prompt": "a" * size})
    check_error(response, 400, "prompt", "context_length_exceeded")
    response = await post(http, "/v1/chat/completions", CHAT | {"max_tokens": 99})
    check_error(response, 400, "messages", "context_length_exceeded")


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/v1/nothing", 404), ("GET", "/v1/completions", 405)]
)
async def test_unknown_urls(http: httpx.AsyncClient, method: str, path: str, status: int) -> None:
    check_error(await http.request(method, path), status, None, None)


async def test_neutral_values_and_labels_are_accepted(http: httpx.AsyncClient) -> None:
    neutral = {
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "logit_bias": {},
        "bad_words": [],
        "allowed_token_ids": None,
        "n": 1,
        "stop": None,
        "stream": False,
        "stream_options": None,
        "top_k": -1,
        "user": "someone",
    }
    chat = {
        "tools": [],
        "tool_choice": "auto",
        "functions": None,
        "function_call": None,
        "response_format": {"type": "text"},
        "parallel_tool_calls": True,
        "modalities": ["text"],
        "service_tier": "auto",
        "store": False,
        "metadata": {"a": "b"},
        "logprobs": False,
    }
    roundtrip = {
        "messages": [
            {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": "y", "refusal": None, "tool_calls": None, "annotations": []},
            {"role": "user", "content": "z"},
        ]
    }
    assert (await post(http, "/v1/chat/completions", CHAT | neutral | chat | roundtrip)).status_code == 200
    plain = {"best_of": 1, "echo": False, "suffix": None, "logprobs": None}
    assert (await post(http, "/v1/completions", PLAIN | neutral | plain)).status_code == 200

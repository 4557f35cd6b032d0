"""Tools, thinking and structured output of the Messages API, as Anthropic's client reads them."""

import contextlib
import json
from collections.abc import AsyncIterator
from itertools import groupby
from typing import Any

import anthropic
import httpx
import pytest
import pytest_asyncio
from anthropic import AsyncAnthropic
from anthropic.types import Message as AnthropicMessage
from api_support import Api, ScriptedEngine, running, saying
from conversations import conversations
from pydantic import BaseModel
from tool_models import family_model, tokens_of

from kvasir_engine.api.tokenizer import ServedModel
from kvasir_engine.api.tools.flags import Parsers

HELLO: list[Any] = [{"role": "user", "content": "hi"}]
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
ANY = {"type": "object"}
WEATHER: dict[str, Any] = {"name": "get_weather", "description": "Of a city", "input_schema": SCHEMA}
SEARCH: dict[str, Any] = {"type": "custom", "name": "search", "input_schema": ANY}
RUN: dict[str, Any] = {"name": "run-it_2", "input_schema": ANY}
TOOLS: list[Any] = [WEATHER, SEARCH, RUN]
CALL = '<tool_call>{"name": "search", "arguments": {"q": "é"}}</tool_call>'
ON = {"type": "enabled", "budget_tokens": 1024}


@contextlib.asynccontextmanager
async def asked(model: ServedModel, text: str, each: int = 3) -> AsyncIterator[tuple[AsyncAnthropic, Api]]:
    engine = ScriptedEngine(saying(tokens_of(model, text), each=each), max_length=100_000)
    async with (
        running(engine, model) as api,
        AsyncAnthropic(base_url=api.url, api_key="none", max_retries=0, timeout=60) as client,
    ):
        yield client, api


async def answered(client: AsyncAnthropic, stream: bool = False, **more: Any) -> Any:
    body: dict[str, Any] = {"model": "tiny", "max_tokens": 10_000, "messages": HELLO} | more
    if not stream:
        return await client.messages.create(**body)
    async with client.messages.stream(**body) as events:
        return await events.get_final_message()


def blocks(message: Any) -> list[tuple[str, Any]]:
    """Type and content of each block; of a call its name too."""
    found: list[tuple[str, Any]] = []
    for block in message.content:
        if block.type == "tool_use":
            found.append((block.type, (block.name, block.input)))
        else:
            found.append((block.type, block.thinking if block.type == "thinking" else block.text))
    return found


@pytest.mark.parametrize("family", ["hermes", "llama3_json", "mistral", "deepseek_v3", "openai", "json"])
async def test_calls_reach_the_client_streamed_and_not(family: str) -> None:
    for conversation in [each for each in conversations(family) if each.calls][7::67]:
        async with asked(family_model(family), conversation.text) as (client, _):
            whole = await answered(client, tools=TOOLS)
            streamed = await answered(client, stream=True, tools=TOOLS)
        AnthropicMessage.model_validate(whole.model_dump(), strict=True)
        calls = [("tool_use", (each.name, json.loads(each.written))) for each in conversation.calls]
        text = [("text", conversation.content)] if conversation.content else []
        assert blocks(whole) == blocks(streamed) == [*text, *calls]
        assert whole.stop_reason == streamed.stop_reason == "tool_use"
        ids = [block.id for block in whole.content if block.type == "tool_use"]
        assert len(set(ids)) == len(ids)
        assert all(each.startswith("toolu_") for each in ids)


async def test_the_events_are_anthropics_in_their_order() -> None:
    async with asked(family_model("qwen3"), f"<think>Hm</think>So{CALL}") as (client, _):
        body: Any = {"model": "tiny", "max_tokens": 2000, "messages": HELLO, "tools": TOOLS, "thinking": ON}
        events: list[Any] = [event async for event in await client.messages.create(**body, stream=True)]
    names = [
        (event.type, getattr(event, "index", None), getattr(getattr(event, "delta", None), "type", None))
        for event in events
    ]
    assert [name for name, _ in groupby(names)] == [
        ("message_start", None, None),
        ("content_block_start", 0, None),
        ("content_block_delta", 0, "thinking_delta"),
        ("content_block_stop", 0, None),
        ("content_block_start", 1, None),
        ("content_block_delta", 1, "text_delta"),
        ("content_block_stop", 1, None),
        ("content_block_start", 2, None),
        ("content_block_delta", 2, "input_json_delta"),
        ("content_block_stop", 2, None),
        ("message_delta", None, None),
        ("message_stop", None, None),
    ]
    thinking, text, call = (each.content_block for each in events if each.type == "content_block_start")
    assert (thinking.thinking, thinking.signature, text.text, call.name, call.input) == ("", "", "", "search", {})
    written = "".join(
        each.delta.partial_json for each in events if getattr(each, "index", 0) == 2 and hasattr(each, "delta")
    )
    assert written == '{"q": "é"}'
    assert events[-2].delta.stop_reason == "tool_use"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("thinking", "shown"),
    [
        (None, False),
        ({"type": "disabled"}, False),
        (ON, True),
        ({**ON, "display": "summarized"}, True),
        ({**ON, "display": "omitted"}, False),
        ({"type": "adaptive"}, True),
    ],
)
async def test_thinking_is_shown_where_it_is_asked_for(thinking: Any, shown: bool, stream: bool) -> None:
    more = {} if thinking is None else {"thinking": thinking}
    async with asked(family_model("r1"), "Hm</think>So") as (client, _):
        message = await answered(client, stream, **more)
    assert blocks(message) == [*([("thinking", "Hm")] if shown else []), ("text", "So")]
    assert message.usage.output_tokens == len("HmSo") + 2
    assert message.stop_reason == "end_turn"


async def test_a_template_that_can_be_told_whether_to_think_is_told() -> None:
    model = family_model("qwen3")
    async with asked(model, "x") as (client, api):

        async def told(**more: Any) -> bool:
            await answered(client, **more)
            prompt = model.tokenizer.decode(api.engine.requests[-1].tokens)
            body = {key: value for key, value in more.items() if key == "thinking"}
            counted = await client.messages.count_tokens(model="tiny", messages=HELLO, **body)
            if "extra_body" not in more:
                assert counted.input_tokens == len(api.engine.requests[-1].tokens)
            return bool(prompt.endswith("<think>\n\n</think>\n\n"))

        assert await told(thinking={"type": "disabled"})
        assert not await told(thinking=ON)
        assert not await told(thinking={"type": "adaptive"})
        assert not await told()
        kwargs = {"chat_template_kwargs": {"enable_thinking": True}}
        assert not await told(thinking={"type": "disabled"}, extra_body=kwargs)


async def test_thinking_of_a_model_without_it_is_refused() -> None:
    async with asked(family_model("qwen3", Parsers("auto", "none")), "x") as (client, _):
        with pytest.raises(anthropic.BadRequestError, match="'thinking'"):
            await answered(client, thinking=ON)
        for other in ({"type": "disabled"}, {"type": "adaptive"}):
            assert blocks(await answered(client, thinking=other)) == [("text", "x")]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("more", "reason", "expected"),
    [
        ({"max_tokens": 43}, "max_tokens", {"q": [1]}),
        ({"max_tokens": 36}, "max_tokens", {}),
        ({"stop_sequences": [", 2"]}, "stop_sequence", {"q": [1]}),
    ],
)
async def test_of_a_call_that_was_cut_off_there_is_what_came_whole(
    more: dict[str, Any], reason: str, expected: Any, stream: bool
) -> None:
    text = '<tool_call>{"name": "search", "arguments": {"q": [1, 2]}}</tool_call>'
    async with asked(family_model("hermes"), text) as (client, _):
        message = await answered(client, stream, tools=TOOLS, **more)
    assert blocks(message) == [("tool_use", ("search", expected))]
    assert message.stop_reason == reason


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ('{"q": nope}', {"INVALID_JSON": '{"q": nope}}'}),
        ('{"q": 123456789012345678901234567890, "r": 1e3}', {"q": 123456789012345678901234567890, "r": 1000.0}),
    ],
)
async def test_arguments_are_an_object_whatever_the_model_wrote(written: str, expected: Any) -> None:
    text = f'<tool_call>{{"name": "search", "arguments": {written}}}</tool_call>'
    async with asked(family_model("hermes"), text) as (client, _):
        message = await answered(client, tools=TOOLS)
    assert blocks(message) == [("tool_use", ("search", expected))]


async def test_a_tool_that_is_named_ends_with_tool_use_and_forced_calls_have_a_grammar() -> None:
    model = family_model("hermes")
    async with asked(model, CALL) as (client, api):
        for choice, names in (
            ({"type": "tool", "name": "search"}, {"search"}),
            ({"type": "any"}, {"get_weather", "search", "run-it_2"}),
        ):
            message = await answered(client, tools=TOOLS, tool_choice=choice)
            grammar = api.engine.requests[-1].sampling.grammar
            assert message.stop_reason == "tool_use"
            assert grammar is not None
            assert {tool["name"] for tool in TOOLS if tool["name"] in grammar.source} == names
        await answered(client, tools=TOOLS, tool_choice={"type": "auto"})
        assert api.engine.requests[-1].sampling.grammar is None
        await answered(client, tools=[{**WEATHER, "strict": True}])
        assert api.engine.requests[-1].sampling.grammar is not None
        await answered(client, tools=TOOLS, tool_choice={"type": "none"})
        assert "get_weather" not in model.tokenizer.decode(api.engine.requests[-1].tokens)


async def test_without_parallel_use_the_answer_ends_with_the_first_call() -> None:
    async with asked(family_model("hermes"), f"{CALL}\n{CALL}") as (client, _):
        one = await answered(client, tools=TOOLS, tool_choice={"type": "auto", "disable_parallel_tool_use": True})
        both = await answered(client, tools=TOOLS)
    assert [len(each.content) for each in (one, both)] == [1, 2]
    assert (one.stop_reason, both.stop_reason) == ("tool_use", "tool_use")


async def test_an_answers_blocks_and_results_are_the_history_of_a_chat() -> None:
    model = family_model("qwen3")
    async with asked(model, f"<think>Hm</think>So{CALL}{CALL}") as (client, api):
        first = await answered(client, tools=TOOLS, thinking=ON)
        ids = [block.id for block in first.content if block.type == "tool_use"]
        results: list[Any] = [
            {"type": "tool_result", "tool_use_id": ids[0], "content": "one", "is_error": True},
            {
                "type": "tool_result",
                "tool_use_id": ids[1],
                "content": [{"type": "text", "text": "t"}, {"type": "text", "text": "wo"}],
                "cache_control": {"type": "ephemeral", "ttl": "1h"},
            },
            {"type": "text", "text": "next"},
        ]
        turns = [*HELLO, {"role": "assistant", "content": first.content}, {"role": "user", "content": results}]
        await answered(client, tools=TOOLS, messages=turns, system="Be kind")
        counted = await client.messages.count_tokens(model="tiny", tools=TOOLS, messages=turns, system="Be kind")
        calls = [
            {"id": id, "type": "function", "function": {"name": "search", "arguments": '{"q": "é"}'}} for id in ids
        ]
        messages: list[Any] = [
            {"role": "system", "content": "Be kind"},
            *HELLO,
            {"role": "assistant", "content": "So", "reasoning_content": "Hm", "tool_calls": calls},
            {"role": "tool", "tool_call_id": ids[0], "content": "Error: one"},
            {"role": "tool", "tool_call_id": ids[1], "content": "t\nwo"},
            {"role": "user", "content": "next"},
        ]
        described: list[Any] = [
            {
                "type": "function",
                "function": {
                    **{key: tool[key] for key in ("name", "description") if key in tool},
                    "parameters": tool["input_schema"],
                },
            }
            for tool in TOOLS
        ]
        async with api.client() as openai:
            await openai.chat.completions.create(model="tiny", messages=messages, tools=described)
    assert api.engine.requests[-2].tokens == api.engine.requests[-1].tokens
    assert counted.input_tokens == len(api.engine.requests[-1].tokens)


class Weather(BaseModel):
    city: str


async def test_the_clients_parse_helper_reads_the_format() -> None:
    async with asked(family_model("hermes"), '{"city": "Ulm"}') as (client, api):
        parsed = await client.messages.parse(model="tiny", max_tokens=50, messages=HELLO, output_format=Weather)
        grammar = api.engine.requests[-1].sampling.grammar
    assert parsed.parsed_output == Weather(city="Ulm")
    assert grammar is not None
    assert (grammar.kind, json.loads(grammar.source)["required"]) == ("json_schema", ["city"])


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def http() -> AsyncIterator[httpx.AsyncClient]:
    engine = ScriptedEngine(saying(tokens_of(family_model("qwen3"), "x")), max_length=100_000)
    async with (
        running(engine, family_model("qwen3")) as api,
        httpx.AsyncClient(base_url=api.url, timeout=60) as client,
    ):
        yield client


def use(**more: Any) -> dict[str, Any]:
    return {"type": "tool_use", "id": "c", "name": "f", "input": {}} | more


def result(**more: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": "c", "content": "r"} | more


def without(block: dict[str, Any], field: str) -> dict[str, Any]:
    return {key: value for key, value in block.items() if key != field}


def turns(*turn: list[dict[str, Any]]) -> dict[str, Any]:
    """Turns of the user's and the assistant's, beginning with the assistant's second."""
    roles = ["assistant", "user"] * len(turn)
    said = [{"role": role, "content": content} for role, content in zip(roles, turn, strict=False)]
    return {"messages": [*HELLO, *said]}


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
        ({"tools": [{**SEARCH, "name": "a b"}]}, "tools[0].name"),
        ({"tools": [SEARCH, SEARCH]}, "tools[1].name"),
        ({"tools": [{**SEARCH, "input_schema": {"type": "string"}}]}, "tools[0].input_schema"),
        ({"tools": [{**SEARCH, "description": "x" * 20_000}]}, "tools[0].description"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
        ({"tools": [{**SEARCH, "wrong": 1}]}, "wrong"),
        ({"tools": [{**SEARCH, "defer_loading": True}]}, "tools[0].defer_loading"),
        ({"tools": [{**SEARCH, "input_examples": [{}]}]}, "tools[0].input_examples"),
        ({"tools": [{**SEARCH, "eager_input_streaming": False}]}, "tools[0].eager_input_streaming"),
        ({"tools": [{**SEARCH, "allowed_callers": ["code_execution_20250825"]}]}, "tools[0].allowed_callers"),
        ({"tools": [{**SEARCH, "cache_control": {"type": "x"}}]}, "tools[0].cache_control.type"),
        (
            {"tools": [{**SEARCH, "cache_control": {"type": "ephemeral", "ttl": "9y"}}]},
            "tools[0].cache_control.ttl",
        ),
        ({"cache_control": {"type": "x"}}, "cache_control.type"),
        ({"tools": TOOLS, "tool_choice": {"type": "required"}}, "tool_choice.type"),
        ({"tools": TOOLS, "tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"tools": TOOLS, "tool_choice": {"type": "tool", "name": "zz"}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "auto", "name": "search"}}, "tool_choice.name"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        (
            {"tool_choice": {"type": "auto", "disable_parallel_tool_use": True}},
            "tool_choice.disable_parallel_tool_use",
        ),
        (
            {"tools": TOOLS, "tool_choice": {"type": "none", "disable_parallel_tool_use": True}},
            "tool_choice.disable_parallel_tool_use",
        ),
        *((turns([without(use(), field)]), f"messages[1].content[0].{field}") for field in ("id", "name", "input")),
        (turns([use(input=[])]), "input"),
        (turns([use(id="")], [result()]), "messages[1].content[0].id"),
        (turns([use(id="x" * 300)], [result()]), "messages[1].content[0].id"),
        (turns([use(name="")], [result()]), "messages[1].content[0].name"),
        (turns([use(), use()], [result()]), "messages[1].content[1].id"),
        (turns([use(), use(id="d")]), "messages[1]"),
        (turns([use()], [result(tool_use_id="d")]), "messages[2].content[0].tool_use_id"),
        (turns([use()], [without(result(), "tool_use_id")]), "messages[2].content[0].tool_use_id"),
        (turns([use()], [result(content=[{"type": "image"}])]), "messages[2].content[0].content[0]"),
        (turns([result()]), "messages[1].content[0]"),
        (turns([use()], [use()]), "messages[2].content[0]"),
        (turns([{"type": "thinking"}]), "messages[1].content[0].thinking"),
        (turns([{"type": "redacted_thinking", "data": "x"}]), "messages[1].content[0]"),
        (
            turns([use(input=json.loads('{"a":' * 100 + "1" + "}" * 100))], [result()]),
            "messages[1].content[0].input",
        ),
        ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens"),
        ({"thinking": {**ON, "budget_tokens": 1023}}, "thinking.budget_tokens"),
        ({"thinking": {**ON, "budget_tokens": 2000}}, "thinking.budget_tokens"),
        ({"thinking": {**ON, "display": "loud"}}, "thinking.display"),
        ({"thinking": {"type": "sometimes"}}, "thinking.type"),
        ({"thinking": {"type": "disabled", "budget_tokens": 1024}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "disabled", "display": "omitted"}}, "thinking.display"),
        ({"output_config": {"format": {"type": "json_object"}}}, "output_config.format.type"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema"),
        (
            {"output_config": {"format": {"type": "json_schema", "schema": {"type": "strin"}}}},
            "output_config.format.schema",
        ),
        ({"output_config": {"effort": "high"}}, "output_config.effort"),
        ({"output_config": {"wrong": 1}}, "output_config.wrong"),
    ],
)
async def test_what_is_wrong_is_a_400_that_names_the_field(
    http: httpx.AsyncClient, change: dict[str, Any], named: str
) -> None:
    body = {"model": "tiny", "max_tokens": 2000, "messages": HELLO} | change
    response = await http.post("/v1/messages", json=body)
    error = response.json()["error"]
    assert (response.status_code, error["type"]) == (400, "invalid_request_error"), error
    assert named in error["message"]
    for chats in ("tool_calls", ".function", "response_format", "parallel_tool_calls"):
        assert f"{chats}" not in error["message"].replace("with 'tool_calls'", "")
    del body["max_tokens"]
    counted = await http.post("/v1/messages/count_tokens", json=body)
    assert (
        counted.status_code == 400
        or change.get("thinking", {}).get("budget_tokens") == 2000
        or "output_config" in change
    )


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    "change",
    [
        {"tools": [], "tool_choice": {"type": "auto"}},
        {"tools": [{**SEARCH, "type": None, "strict": None, "eager_input_streaming": True, "input_examples": []}]},
        {"tools": TOOLS, "tool_choice": {"type": "none"}},
        {"output_config": {}},
        {"output_config": {"format": None, "effort": None}},
        turns([use()], [without(result(), "content")]),
        turns([use()], [result(content=[], is_error=False)]),
        turns([{"type": "thinking", "thinking": "t", "signature": "s"}, {"type": "text", "text": "a"}]),
        turns(
            [{"type": "thinking", "thinking": "t", "signature": ""}, use()],
            [result(), {"type": "text", "text": "a"}],
        ),
        turns([]),
    ],
)
async def test_what_is_right_is_answered(http: httpx.AsyncClient, change: dict[str, Any]) -> None:
    body = {"model": "tiny", "max_tokens": 2000, "messages": HELLO} | change
    response = await http.post("/v1/messages", json=body)
    assert response.status_code == 200, response.text

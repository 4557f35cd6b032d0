"""Tools, reasoning and structured output of the Responses API, as OpenAI's client reads them."""

import json
from collections.abc import AsyncIterator
from itertools import groupby
from typing import Any

import httpx
import openai
import pytest
import pytest_asyncio
from api_support import Api, ScriptedEngine, running, saying
from conversations import conversations, reasoned
from openai.types.responses import Response
from openai.types.responses import response_stream_event as events_module
from pydantic import BaseModel, TypeAdapter
from tool_models import family_model, tokens_of

from kvasir_engine.api.tokenizer import ServedModel
from kvasir_engine.api.tools.flags import Parsers

ADAPTER: TypeAdapter[Any] = TypeAdapter(events_module.ResponseStreamEvent)
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER: dict[str, Any] = {
    "type": "function",
    "name": "get_weather",
    "description": "Of a city",
    "parameters": SCHEMA,
}
SEARCH: dict[str, Any] = {"type": "function", "name": "search"}
RUN: dict[str, Any] = {"type": "function", "name": "run-it_2"}
TOOLS = [WEATHER, SEARCH, RUN]
CALL = '<tool_call>{"name": "search", "arguments": {"q": "é"}}</tool_call>'


def api_of(model: ServedModel, text: str, each: int = 3) -> Any:
    return running(ScriptedEngine(saying(tokens_of(model, text), each=each), max_length=100_000), model)


async def respond(api: Api, **more: Any) -> Any:
    return await api.client().responses.create(**{"model": "tiny", "input": "hi"} | more)


async def streamed(api: Api, **more: Any) -> list[Any]:
    return [event async for event in await respond(api, stream=True, **more)]


def shown(response: Any) -> list[tuple[str, str, str, str]]:
    """Type, name, text and status of each item."""
    items = []
    for item in response.output:
        if item.type == "function_call":
            items.append((item.type, item.name, item.arguments, item.status))
        else:
            items.append((item.type, "", "".join(part.text for part in item.content), item.status))
    return items


def deltas(events: list[Any], count: int) -> list[str]:
    """What the events' deltas add up to, by output index."""
    whole = [""] * count
    for event in events:
        if event.type.endswith(".delta"):
            whole[event.output_index] += event.delta
    return whole


@pytest.mark.parametrize("family", ["hermes", "llama3_json", "mistral", "deepseek_v3", "openai", "json"])
async def test_calls_reach_the_client_streamed_and_not(family: str) -> None:
    model = family_model(family)
    for conversation in [each for each in conversations(family) if each.calls][5::67]:
        async with api_of(model, conversation.text) as api:
            whole = await respond(api, tools=TOOLS)
            events = await streamed(api, tools=TOOLS)
        Response.model_validate(whole.model_dump(), strict=True)
        calls = [item for item in whole.output if item.type == "function_call"]
        assert [(each.name, each.arguments) for each in calls] == [
            (each.name, each.written) for each in conversation.calls
        ]
        assert len({each.call_id for each in calls} | {each.id for each in calls}) == 2 * len(calls)
        assert whole.output_text == (conversation.content or "")
        final = events[-1].response
        assert events[-1].type == "response.completed"
        assert shown(final) == shown(whole)
        assert deltas(events, len(final.output)) == [text for _, _, text, _ in shown(whole)]


async def test_the_events_are_openais_in_their_order() -> None:
    text = f"<think>Hm</think>So{CALL}"
    async with api_of(family_model("qwen3"), text, each=500) as api:
        events = await streamed(api, tools=TOOLS)
        whole = await respond(api, tools=TOOLS)
    assert [name for name, _ in groupby(event.type.removeprefix("response.") for event in events)] == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "reasoning_text.delta",
        "reasoning_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    for event in events:
        ADAPTER.validate_python(event.model_dump(warnings=False, by_alias=True))
    items = [event.item for event in events if event.type == "response.output_item.done"]
    assert [item.type for item in items] == ["reasoning", "message", "function_call"]
    assert items == events[-1].response.output
    begun = [event.item for event in events if event.type == "response.output_item.added"]
    assert [(item.id, item.status) for item in begun] == [(item.id, "in_progress") for item in items]
    assert begun[2].arguments == ""
    by_index = {event.output_index: event.item_id for event in events if hasattr(event, "item_id")}
    assert by_index == {place: item.id for place, item in enumerate(items)}
    assert shown(whole) == [
        ("reasoning", "", "Hm", "completed"),
        ("message", "", "So", "completed"),
        ("function_call", "search", '{"q": "é"}', "completed"),
    ]
    assert whole.usage.output_tokens_details.reasoning_tokens == len("Hm") + 2


async def test_reasoning_reaches_the_client() -> None:
    model = family_model("qwen3")
    for conversation in [each for each in reasoned("<think>", "</think>", False) if each.reasoning][2::97]:
        async with api_of(model, conversation.text) as api:
            whole = await respond(api, tools=TOOLS)
            events = await streamed(api, tools=TOOLS)
        first = whole.output[0]
        assert (first.type, first.summary) == ("reasoning", [])
        assert first.content[0].text == conversation.reasoning
        assert shown(events[-1].response) == shown(whole)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("tokens", "items"),
    [
        (3, [("reasoning", "", "ab", "incomplete")]),
        (6, [("reasoning", "", "abc", "completed"), ("message", "", "d", "incomplete")]),
        (
            44,
            [
                ("reasoning", "", "abc", "completed"),
                ("message", "", "d", "completed"),
                ("function_call", "search", '{"q":', "incomplete"),
            ],
        ),
    ],
)
async def test_what_was_cut_off_is_incomplete(tokens: int, items: list[Any], stream: bool) -> None:
    async with api_of(family_model("qwen3"), f"<think>abc</think>d{CALL}", each=1) as api:
        ask = {"tools": TOOLS, "max_output_tokens": tokens}
        response = (await streamed(api, **ask))[-1].response if stream else await respond(api, **ask)
    assert response.status == "incomplete"
    assert shown(response) == items


async def test_an_answers_items_and_results_are_the_history_of_a_chat() -> None:
    model = family_model("qwen3")
    async with api_of(model, f"<think>Hm</think>So{CALL}{CALL}") as api:
        first = await respond(api, tools=TOOLS)
        calls = [item for item in first.output if item.type == "function_call"]
        results: list[Any] = [
            {"type": "function_call_output", "call_id": calls[0].call_id, "output": "one"},
            {
                "type": "function_call_output",
                "call_id": calls[1].call_id,
                "output": [{"type": "input_text", "text": "t"}, {"type": "input_text", "text": "wo"}],
            },
        ]
        said = [{"role": "user", "content": "hi"}, *(item.model_dump() for item in first.output), *results]
        await respond(api, tools=TOOLS, input=[*said, {"role": "user", "content": "next"}], instructions="Be kind")
        asked = [
            {"id": each.call_id, "type": "function", "function": {"name": each.name, "arguments": each.arguments}}
            for each in calls
        ]
        messages: list[Any] = [
            {"role": "system", "content": "Be kind"},
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "So", "reasoning_content": "Hm", "tool_calls": asked},
            {"role": "tool", "tool_call_id": calls[0].call_id, "content": "one"},
            {"role": "tool", "tool_call_id": calls[1].call_id, "content": "t\nwo"},
            {"role": "user", "content": "next"},
        ]
        tools = [
            {"type": "function", "function": {key: value for key, value in tool.items() if key != "type"}}
            for tool in TOOLS
        ]
        await api.client().chat.completions.create(model="tiny", messages=messages, tools=tools)
    assert api.engine.requests[-2].tokens == api.engine.requests[-1].tokens


ALLOWED: dict[str, Any] = {
    "type": "allowed_tools",
    "mode": "auto",
    "tools": [{"type": "function", "name": "search"}],
}


@pytest.mark.parametrize(
    ("choice", "calls"),
    [
        ("required", {"get_weather", "search", "run-it_2"}),
        ({"type": "function", "name": "search"}, {"search"}),
        (
            {
                "type": "allowed_tools",
                "mode": "required",
                "tools": [{"type": "function", "name": name} for name in ("search", "get_weather")],
            },
            {"search", "get_weather"},
        ),
    ],
)
async def test_forced_calls_ask_for_a_grammar(choice: Any, calls: set[str]) -> None:
    async with api_of(family_model("hermes"), CALL) as api:
        whole = await respond(api, tools=TOOLS, tool_choice=choice)
        grammar = api.engine.requests[-1].sampling.grammar
        await respond(api, tools=TOOLS, tool_choice="none")
        assert api.engine.requests[-1].sampling.grammar is None
        assert "get_weather" not in family_model("hermes").tokenizer.decode(api.engine.requests[-1].tokens)
    assert grammar is not None
    assert {name for name in ("get_weather", "search", "run-it_2") if name in grammar.source} == calls
    assert [item.type for item in whole.output] == ["function_call"]
    shown_choice = whole.tool_choice if isinstance(choice, str) else whole.tool_choice.model_dump()
    assert shown_choice == choice
    assert [tool.name for tool in whole.tools] == [tool["name"] for tool in TOOLS]
    assert whole.tools[0].parameters == SCHEMA


async def test_a_strict_tool_asks_for_a_grammar_and_others_do_not() -> None:
    async with api_of(family_model("hermes"), "x") as api:
        await respond(api, tools=TOOLS)
        assert api.engine.requests[-1].sampling.grammar is None
        await respond(api, tools=[{**WEATHER, "strict": True}])
        assert api.engine.requests[-1].sampling.grammar is not None


async def test_without_parallel_calls_the_answer_ends_with_the_first() -> None:
    async with api_of(family_model("hermes"), f"{CALL}\n{CALL}") as api:
        one = await respond(api, tools=TOOLS, parallel_tool_calls=False)
        both = await respond(api, tools=TOOLS)
    assert ([item.type for item in one.output], one.parallel_tool_calls) == (["function_call"], False)
    assert ([item.type for item in both.output], both.parallel_tool_calls) == (["function_call"] * 2, True)


class Weather(BaseModel):
    city: str


async def test_the_clients_parse_helpers_read_text_and_calls() -> None:
    tools: Any = [openai.pydantic_function_tool(Weather)]
    text = '<tool_call>{"name": "Weather", "arguments": {"city": "Ulm"}}</tool_call>'
    async with api_of(family_model("hermes"), text) as api:
        parsed = await api.client().responses.parse(model="tiny", input="hi", tools=tools)
        async with api.client().responses.stream(model="tiny", input="hi", tools=tools) as stream:
            final = await stream.get_final_response()
    for each in (parsed, final):
        assert each.output[0].parsed_arguments == Weather(city="Ulm")
    async with api_of(family_model("hermes"), '{"city": "Ulm"}') as api:
        answer = await api.client().responses.parse(model="tiny", input="hi", text_format=Weather)
        grammar = api.engine.requests[-1].sampling.grammar
        async with api.client().responses.stream(model="tiny", input="hi", text_format=Weather) as texts:
            last = await texts.get_final_response()
    assert answer.output_parsed == last.output_parsed == Weather(city="Ulm")
    assert grammar is not None
    assert (grammar.kind, json.loads(grammar.source)["required"]) == ("json_schema", ["city"])


@pytest.mark.parametrize(
    ("format", "kind"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, "json_object"),
        ({"type": "json_schema", "name": "n", "schema": SCHEMA}, "json_schema"),
        ({"type": "json_schema", "name": "n", "schema": SCHEMA, "strict": True, "description": "d"}, "json_schema"),
    ],
)
async def test_the_texts_format_is_a_grammar_and_is_shown(format: dict[str, Any], kind: str | None) -> None:
    async with api_of(family_model("plain"), "{}") as api:
        answer = await respond(api, text={"format": format})
        grammar = api.engine.requests[-1].sampling.grammar
    assert (None if grammar is None else grammar.kind) == kind
    given = answer.text.format.model_dump(exclude_none=True, by_alias=True)
    assert given == format
    Response.model_validate(answer.model_dump(by_alias=True), strict=True)


async def test_logprobs_are_of_the_text_alone() -> None:
    include = ["message.output_text.logprobs"]
    async with api_of(family_model("qwen3"), f"<think>Hm</think>So{CALL}", each=1) as api:
        whole = await respond(api, tools=TOOLS, include=include)
        events = await streamed(api, tools=TOOLS, include=include)
    names = [each.token for each in whole.output[1].content[0].logprobs]
    assert "".join(names).endswith("So")
    assert "H" not in names
    assert "é" not in "".join(names)
    streamed_names = [
        each.token for event in events if event.type == "response.output_text.delta" for each in event.logprobs
    ]
    assert streamed_names == names


async def test_where_no_calls_are_read_tools_are_refused() -> None:
    async with api_of(family_model("hermes", Parsers("none", "none")), "x") as api:
        with pytest.raises(openai.BadRequestError) as refused:
            await respond(api, tools=TOOLS)
    assert refused.value.body["param"] == "tools"  # type: ignore[index]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def http() -> AsyncIterator[httpx.AsyncClient]:
    async with (
        api_of(family_model("hermes"), "x") as api,
        httpx.AsyncClient(base_url=api.url, timeout=60) as client,
    ):
        yield client


USER: dict[str, Any] = {"role": "user", "content": "hi"}


def call(**more: Any) -> dict[str, Any]:
    return {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"} | more


def result(**more: Any) -> dict[str, Any]:
    return {"type": "function_call_output", "call_id": "c", "output": "r"} | more


def without(item: dict[str, Any], field: str) -> dict[str, Any]:
    return {key: value for key, value in item.items() if key != field}


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tools": [SEARCH, {**SEARCH, "name": "a b"}]}, "tools[1].name"),
        ({"tools": [SEARCH, SEARCH]}, "tools[1].name"),
        ({"tools": [{**SEARCH, "parameters": {"type": "string"}}]}, "tools[0].parameters"),
        ({"tools": [{**SEARCH, "description": "x" * 20_000}]}, "tools[0].description"),
        ({"tools": [{**SEARCH, "defer_loading": True}]}, "tools[0].defer_loading"),
        ({"tools": [{**SEARCH, "allowed_callers": ["programmatic"]}]}, "tools[0].allowed_callers"),
        ({"tools": [{"type": "mcp"}]}, "tools[0].type"),
        ({"tools": [{**SEARCH, "function": {}}]}, "tools[0].function"),
        ({"tools": [{**SEARCH, "name": f"f{n}"} for n in range(129)]}, "tools"),
        ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "tool_choice.name"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "zz"}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "z" * 65}}, "tool_choice.name"),
        ({"tools": TOOLS, "tool_choice": {"type": "mcp"}}, "tool_choice.type"),
        ({"tools": TOOLS, "tool_choice": {"type": "allowed_tools", "tools": []}}, "tool_choice.mode"),
        ({"tools": TOOLS, "tool_choice": {"type": "allowed_tools", "mode": "auto"}}, "tool_choice.tools"),
        ({"tools": TOOLS, "tool_choice": {**ALLOWED, "tools": []}}, "tool_choice.tools"),
        ({"tools": TOOLS, "tool_choice": {**ALLOWED, "mode": "any"}}, "tool_choice.mode"),
        ({"tools": TOOLS, "tool_choice": {**ALLOWED, "name": "search"}}, "tool_choice.name"),
        ({"tools": TOOLS, "tool_choice": {**ALLOWED, "tools": [{"type": "x"}]}}, "tool_choice.tools[0].type"),
        (
            {"tools": TOOLS, "tool_choice": {**ALLOWED, "tools": [{"type": "function"}]}},
            "tool_choice.tools[0].name",
        ),
        (
            {"tools": TOOLS, "tool_choice": {"type": "function", "name": "f", "mode": "auto"}},
            "tool_choice.mode",
        ),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"parallel_tool_calls": False}, "parallel_tool_calls"),
        ({"text": {"format": {"type": "json_schema", "schema": SCHEMA}}}, "text.format.name"),
        ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format.schema"),
        ({"text": {"format": {"type": "json_object", "schema": SCHEMA}}}, "text.format.schema"),
        ({"text": {"format": {"type": "text", "strict": True}}}, "text.format.strict"),
        ({"text": {"format": {"type": "json_object", "wrong": 1}}}, "text.format.wrong"),
        (
            {"text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "strin"}}}},
            "text.format.schema",
        ),
        *(({"input": [USER, without(call(), field)]}, f"input[1].{field}") for field in call() if field != "type"),
        *(
            ({"input": [USER, call(), without(result(), field)]}, f"input[2].{field}")
            for field in ("call_id", "output")
        ),
        ({"input": [USER, call(arguments="{")]}, "input[1].arguments"),
        ({"input": [USER, call(arguments="[]")]}, "input[1].arguments"),
        ({"input": [USER, call(), call(call_id="d"), call(call_id="d")]}, "input[3].call_id"),
        ({"input": [USER, call(call_id="")]}, "input[1].call_id"),
        ({"input": [USER, call(call_id="x" * 300)]}, "input[1].call_id"),
        ({"input": [USER, call(name="")]}, "input[1].name"),
        ({"input": [USER, call(), result(call_id="d")]}, "input[2].call_id"),
        ({"instructions": "i", "input": [USER, call(), result(call_id="d")]}, "input[2].call_id"),
        ({"input": [USER, call(), result(output=[{"type": "input_image"}])]}, "input[2].output[0]"),
        ({"input": [USER, *(call(call_id=f"c{n}") for n in range(129))]}, "input"),
        ({"input": [{"type": "reasoning", "id": "r"}, USER]}, "input[0].content"),
        ({"input": [{"type": "reasoning", "summary": [], "encrypted_content": "x"}]}, "input[0].encrypted_content"),
        (
            {"input": [{"type": "reasoning", "content": [{"type": "output_text", "text": "x"}]}]},
            "input[0].content[0]",
        ),
        ({"input": [{"type": "reasoning", "summary": [{"type": "x"}]}]}, "input[0].summary[0]"),
        ({"input": [{"type": "web_search_call", "id": "x"}]}, "input[0].type"),
    ],
)
async def test_what_is_wrong_is_a_400_that_names_the_field(
    http: httpx.AsyncClient, change: dict[str, Any], param: str
) -> None:
    response = await http.post("/v1/responses", json={"model": "tiny", "input": "hi", **change})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param), error
    for chats in ("messages", ".function.", "response_format", "json_schema.schema"):
        assert f"'{chats}" not in error["message"]


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    "change",
    [
        {"tools": [], "tool_choice": "auto"},
        {"tools": [{**SEARCH, "parameters": None, "strict": None, "defer_loading": False}]},
        {"tools": TOOLS, "tool_choice": "none", "parallel_tool_calls": False},
        {"input": [USER, call(arguments=""), result(output="")]},
        {"input": [USER, {"type": "reasoning", "summary": [{"type": "summary_text", "text": "s"}]}]},
        {"input": [USER, {"type": "reasoning", "summary": []}, call(id="x", status="completed"), result()]},
        {"text": {"format": None}},
        {"text": {"format": {"type": "text", "name": None, "schema": None}}},
    ],
)
async def test_what_is_right_is_answered(http: httpx.AsyncClient, change: dict[str, Any]) -> None:
    response = await http.post("/v1/responses", json={"model": "tiny", "input": "hi", **change})
    assert response.status_code == 200, response.text

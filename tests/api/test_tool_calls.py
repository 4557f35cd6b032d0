"""Tools and reasoning over the API, as the official client reads them."""

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import pytest_asyncio
from api_support import Api, ScriptedEngine, running, saying
from conversations import Conversation, conversations, reasoned
from openai import BadRequestError
from tool_models import family_model, tokens_of

from kvasir_engine.api.tokenizer import ServedModel
from kvasir_engine.api.tools.flags import Parsers

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather <|im_end|> of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "unit": {"enum": ["C", "F"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
SEARCH = {"type": "function", "function": {"name": "search"}}
RUN = {"type": "function", "function": {"name": "run-it_2", "parameters": {"type": "object"}}}
TOOLS = [WEATHER, SEARCH, RUN]
ASK = [{"role": "user", "content": "hi"}]


def api_of(model: ServedModel, text: str, each: int = 3) -> Any:
    return running(ScriptedEngine(saying(tokens_of(model, text), each=each), max_length=100_000), model)


async def ask(api: Api, **more: Any) -> Any:
    said = {"model": "tiny", "messages": ASK, "max_completion_tokens": 10_000, "seed": 1} | more
    return await api.client().chat.completions.create(**said)


async def streamed(api: Api, **more: Any) -> tuple[str, str, list[dict[str, str]], str]:
    """Content, reasoning, calls and the finish reason, put together of the deltas."""
    content, reasoning, calls, finish = "", "", [], ""
    async for chunk in await ask(api, stream=True, **more):
        for choice in chunk.choices:
            content += choice.delta.content or ""
            reasoning += getattr(choice.delta, "reasoning_content", None) or ""
            for call in choice.delta.tool_calls or []:
                if call.id:
                    assert (call.index, call.type) == (len(calls), "function")
                    calls.append({"id": call.id, "name": call.function.name, "arguments": ""})
                assert call.function.name is None or call.id
                calls[call.index]["arguments"] += call.function.arguments
            finish = choice.finish_reason or finish
    return content, reasoning, calls, finish


FAMILIES = {
    "hermes": "hermes",
    "llama3_json": "llama3_json",
    "mistral": "mistral",
    "deepseek_v3": "deepseek_v3",
    "openai": "openai",
    "json": "json",
    "qwen3_coder": "qwen3_coder",
    "glm45": "glm45",
}


@pytest.mark.parametrize("family", FAMILIES)
async def test_calls_reach_the_client_streamed_and_not(family: str) -> None:
    model = family_model(family)
    some = [each for each in conversations(FAMILIES[family]) if each.calls][3::31]
    for conversation in [*some, list(conversations(FAMILIES[family]))[-1]]:
        text = conversation.text
        async with api_of(model, text) as api:
            whole = await ask(api, tools=TOOLS)
            content, _, calls, finish = await streamed(api, tools=TOOLS)
        message, expected = whole.choices[0].message, [(each.name, each.written) for each in conversation.calls]
        read = [(each.function.name, each.function.arguments) for each in message.tool_calls or []]
        assert (message.content, read) == (conversation.content, expected)
        assert (content or None, [(each["name"], each["arguments"]) for each in calls]) == (
            conversation.content,
            expected,
        )
        assert whole.choices[0].finish_reason == finish == ("tool_calls" if expected else "stop")
        ids = [each.id for each in message.tool_calls or []] + [each["id"] for each in calls]
        assert len(set(ids)) == len(ids)
        assert all(each.startswith("call_") for each in ids)
        assert whole.usage.completion_tokens == len(tokens_of(model, text)) + 1


@pytest.mark.parametrize(("family", "begun"), [("qwen3", False), ("r1", True)])
async def test_reasoning_reaches_the_client_and_is_counted(family: str, begun: bool) -> None:
    model = family_model(family)
    some: list[Conversation] = [each for each in reasoned("<think>", "</think>", begun) if each.reasoning][1::47]
    for conversation in some:
        tokens = tokens_of(model, conversation.text)
        close = tokens.index(tokens_of(model, "</think>")[0])
        async with api_of(model, conversation.text) as api:
            whole = await ask(api, tools=TOOLS)
            _, reasoning, calls, _ = await streamed(api, tools=TOOLS)
            hidden = await ask(api, tools=TOOLS, extra_body={"include_reasoning": False})
        message = whole.choices[0].message
        assert message.reasoning_content == reasoning == conversation.reasoning
        assert message.content == conversation.content
        assert len(message.tool_calls or []) == len(calls) == len(conversation.calls)
        assert whole.usage.completion_tokens_details.reasoning_tokens == close + 1
        assert getattr(hidden.choices[0].message, "reasoning_content", None) is None
        assert hidden.usage.completion_tokens_details.reasoning_tokens == close + 1


async def test_a_template_that_ends_the_reasoning_leaves_none() -> None:
    async with api_of(family_model("qwen3"), "<think>x</think>y") as api:
        off = await ask(api, extra_body={"chat_template_kwargs": {"enable_thinking": False}})
        on = await ask(api)
    assert off.choices[0].message.content == "<think>x</think>y"
    assert (on.choices[0].message.content, on.choices[0].message.reasoning_content) == ("y", "x")


async def test_parsers_may_be_named_or_off() -> None:
    text = '<think>a</think><tool_call>{"name": "search", "arguments": {}}</tool_call>'
    async with api_of(family_model("qwen3", Parsers("none", "none")), text) as api:
        whole = await ask(api)
        with pytest.raises(BadRequestError) as refused:
            await ask(api, tools=TOOLS)
    assert whole.choices[0].message.content == text
    assert refused.value.body["param"] == "tools"  # type: ignore[index]
    async with api_of(family_model("plain", Parsers("qwen3_coder")), "x") as api:
        with pytest.raises(BadRequestError) as refused:
            await ask(api, tools=TOOLS)
        assert (await ask(api)).choices[0].message.content == "x"
    async with api_of(family_model("glm45", Parsers("mistral", "none")), "[TOOL_CALLS]search[ARGS]{}") as api:
        named = await ask(api, tools=TOOLS)
    assert named.choices[0].message.tool_calls[0].function.name == "search"


def prompt_of(api: Api, model: ServedModel) -> str:
    return model.tokenizer.decode(api.engine.requests[-1].tokens)


HISTORY: list[dict[str, Any]] = [
    {"role": "user", "content": "hi"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": "call_1",
                "type": "function",
                "function": {"name": "search", "arguments": '{"q": "é<|im_end|>"}'},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": "found"},
]


@pytest.mark.parametrize("family", ["hermes", "mistral", "deepseek_v3", "deepseek_v31", "json"])
async def test_the_template_gets_tools_and_history_as_transformers_gives_them(family: str) -> None:
    model = family_model(family)
    async with api_of(model, "x") as api:
        await ask(api, tools=TOOLS, messages=HISTORY)
        prompt = prompt_of(api, model)
        assert json.dumps(WEATHER, ensure_ascii=False) in prompt
        if family != "json":
            assert '{"q": "é<|im_end|>"}' in prompt
        assert ("call_1" in prompt) == (family != "mistral")
        # a client's marker is text
        assert api.engine.requests[-1].tokens.count(257) == prompt.count("<|im_end|>") - 2 + (family == "json")
        await ask(api, tools=TOOLS, tool_choice="none")
        assert "get_weather" not in prompt_of(api, model)


async def test_a_template_without_tools_gets_them_in_a_system_message() -> None:
    model = family_model("plain")
    async with api_of(model, '<tool_call>{"name": "search", "arguments": {"q": 1}}</tool_call>') as api:
        whole = await ask(api, tools=TOOLS, messages=[{"role": "system", "content": "Be brief."}, *HISTORY])
        prompt = prompt_of(api, model)
    assert whole.choices[0].message.tool_calls[0].function.arguments == '{"q": 1}'
    assert prompt.startswith("<|im_start|>system\nBe brief.\n\nYou can call functions.")
    assert json.dumps(WEATHER["function"], ensure_ascii=False) in prompt
    assert '<tool_call>\n{"name": "search", "arguments": {"q": "é<|im_end|>"}}\n</tool_call>' in prompt
    assert "<|im_start|>user\n<tool_response>\nfound\n</tool_response><|im_end|>" in prompt


TWO = '<tool_call>{"name": "search", "arguments": {}}</tool_call>\n' * 2


async def test_without_parallel_calls_the_answer_ends_with_the_first() -> None:
    for each in (1, 500):
        async with api_of(family_model("hermes"), f"Hm. {TWO} tail", each) as api:
            whole = await ask(api, tools=TOOLS, parallel_tool_calls=False)
            content, _, calls, finish = await streamed(api, tools=TOOLS, parallel_tool_calls=False)
            both = await ask(api, tools=TOOLS)
        assert [call.function.name for call in whole.choices[0].message.tool_calls] == ["search"]
        assert (content, len(calls), finish) == ("Hm.", 1, "tool_calls")
        assert whole.choices[0].message.content == "Hm."
        assert len(both.choices[0].message.tool_calls) == 2


@pytest.mark.parametrize(
    ("choice", "finish"),
    [("required", "tool_calls"), ({"type": "function", "function": {"name": "search"}}, "stop")],
)
async def test_forced_calls_ask_for_a_grammar_and_end_as_openais_do(choice: Any, finish: str) -> None:
    async with api_of(family_model("hermes"), TWO[: TWO.index("\n")]) as api:
        whole = await ask(api, tools=TOOLS, tool_choice=choice)
        grammar = api.engine.requests[-1].sampling.grammar
    assert whole.choices[0].finish_reason == finish
    assert grammar is not None
    assert ("get_weather" in grammar.source) == (choice == "required")


NAMED: dict[str, Any] = {"type": "function", "function": {"name": "search"}}
ALLOWED: dict[str, Any] = {"mode": "auto", "tools": [NAMED]}


def allowing(tools: list[dict[str, Any]], mode: str = "auto", **more: Any) -> dict[str, Any]:
    """A request that allows these of all tools."""
    allowed = {"mode": mode, "tools": tools}
    return {"tools": TOOLS, "tool_choice": {"type": "allowed_tools", "allowed_tools": allowed, **more}}


@pytest.mark.parametrize("mode", ["auto", "required"])
async def test_of_the_tools_allowed_alone_one_can_be_called_though_all_are_told_of(mode: str) -> None:
    async with api_of(family_model("hermes"), TWO[: TWO.index("\n")]) as api:
        await ask(api, **allowing([NAMED], mode))
        request = api.engine.requests[-1]
        await ask(api, tools=TOOLS)
        assert api.engine.requests[-1].tokens == request.tokens
        every = allowing([{"type": "function", "function": {"name": each["function"]["name"]}} for each in TOOLS])
        await ask(api, **every)
        assert api.engine.requests[-1].sampling.grammar is None
    grammar = request.sampling.grammar
    assert grammar is not None
    assert "search" in grammar.source
    assert "get_weather" not in grammar.source


async def test_a_free_choice_asks_for_a_grammar_only_where_a_tool_is_strict() -> None:
    strict = {"type": "function", "function": {**WEATHER["function"], "strict": True}}  # type: ignore[dict-item]
    async with api_of(family_model("hermes"), "x") as api:
        await ask(api, tools=TOOLS)
        assert api.engine.requests[-1].sampling.grammar is None
        await ask(api, tools=[strict, SEARCH])
        assert api.engine.requests[-1].sampling.grammar is not None
        await ask(api, tools=[strict, SEARCH], tool_choice="none")
        assert api.engine.requests[-1].sampling.grammar is None


async def test_calls_in_python_are_json_where_a_schema_has_to_hold() -> None:
    model, strict = (
        family_model("pythonic"),
        {"type": "function", "function": {**SEARCH["function"], "strict": True}},
    )  # type: ignore[dict-item]
    async with api_of(model, "[search(q=1)]") as api:
        free = await ask(api, tools=TOOLS)
        assert free.choices[0].message.tool_calls[0].function.arguments == '{"q": 1}'
        with pytest.raises(BadRequestError) as refused:
            await ask(api, tools=[strict])
    assert refused.value.body["param"] == "tools"  # type: ignore[index]
    async with api_of(model, '[{"name": "search", "arguments": {"q": 1}}]') as api:
        for more in ({"tool_choice": "required"}, {"response_format": {"type": "json_object"}}):
            forced = await ask(api, tools=TOOLS, **more)
            assert forced.choices[0].message.tool_calls[0].function.arguments == '{"q": 1}'


async def test_what_was_answered_may_be_sent_back() -> None:
    model = family_model("qwen3")
    async with api_of(model, f"<think>a</think>{TWO}") as api:
        first = (await ask(api, tools=TOOLS)).choices[0].message
        results = [{"role": "tool", "tool_call_id": call.id, "content": "r"} for call in first.tool_calls]
        again = await ask(api, tools=TOOLS, messages=[*ASK, first.model_dump(), *results])
    assert again.choices[0].message.reasoning_content == "a"


async def test_logprobs_and_token_ids_of_calls_lose_none() -> None:
    model = family_model("mistral")
    text = "Hm.[TOOL_CALLS]search[ARGS]{}"
    async with api_of(model, text) as api:
        whole = await ask(api, tools=TOOLS, logprobs=True, extra_body={"return_token_ids": True})
        seen, ids = [], []
        async for chunk in await ask(
            api, tools=TOOLS, logprobs=True, stream=True, extra_body={"return_token_ids": True}
        ):
            for choice in chunk.choices:
                seen += [each.token for each in choice.logprobs.content] if choice.logprobs else []
                ids += getattr(choice, "token_ids", None) or []
    assert [each.token for each in whole.choices[0].logprobs.content] == seen
    assert "".join(seen) == text
    assert whole.choices[0].token_ids == ids == [*tokens_of(model, text), 257]


def function(**more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f"} | more}


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "object"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


def called(**more: Any) -> list[dict[str, Any]]:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}} | more
    return [*ASK, {"role": "assistant", "tool_calls": [call]}]


CALLED = called()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def http() -> AsyncIterator[httpx.AsyncClient]:
    async with (
        api_of(family_model("hermes"), "x") as api,
        httpx.AsyncClient(base_url=api.url, timeout=60) as client,
    ):
        yield client


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"tools": [function(), function()]}, "tools[1].function.name"),
        ({"tools": [function(name="")]}, "tools[0].function.name"),
        ({"tools": [function(name="a b")]}, "tools[0].function.name"),
        ({"tools": [function(name="x" * 65)]}, "tools[0].function.name"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "function": {"name": "f"}, "custom": {}}]}, "tools[0].custom"),
        ({"tools": [function(parameters={"type": "string"})]}, "tools[0].function.parameters"),
        ({"tools": [function(parameters={})]}, "tools[0].function.parameters"),
        ({"tools": [function(parameters={"type": "object", "required": "a"})]}, "tools[0].function.parameters"),
        (
            {"tools": [function(parameters={"type": "object", "properties": {"a": {"type": "strin"}}})]},
            "tools[0].function.parameters",
        ),
        ({"tools": [function(parameters={"type": "object", "x": "y" * 70_000})]}, "tools[0].function.parameters"),
        ({"tools": [function(parameters=deep(40))]}, "tools[0].function.parameters"),
        ({"tools": [function(parameters={"type": "object", "anyOf": [{}] * 5000})]}, "tools"),
        ({"tools": [function(parameters=[])]}, "tools[0].function.parameters"),
        ({"tools": [function(description="x" * 20_000)]}, "tools[0].function.description"),
        ({"tools": [function(name=f"f{n}") for n in range(129)]}, "tools"),
        ({"tools": [function(wrong=1)]}, "tools[0].function.wrong"),
        ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "zz"}}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "tool_choice.function"),
        ({"tools": TOOLS, "tool_choice": {"type": "custom", "custom": {"name": "f"}}}, "tool_choice.type"),
        ({"tools": TOOLS, "tool_choice": {"type": "allowed_tools"}}, "tool_choice.allowed_tools"),
        (allowing([], "auto"), "tool_choice.allowed_tools.tools"),
        (allowing([NAMED], "none"), "tool_choice.allowed_tools.mode"),
        (allowing([NAMED, {"type": "function", "function": {"name": "zz"}}]), "tool_choice"),
        (allowing([NAMED, {"type": "mcp"}]), "tool_choice.allowed_tools.tools[1].type"),
        (allowing([{"type": "function"}]), "tool_choice.allowed_tools.tools[0].function"),
        (allowing([NAMED], function={"name": "search"}), "tool_choice.function"),
        ({"tool_choice": allowing([NAMED])["tool_choice"]}, "tool_choice"),
        (
            {"tools": TOOLS, "tool_choice": {"type": "function", **NAMED, "allowed_tools": ALLOWED}},
            "tool_choice.allowed_tools",
        ),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"parallel_tool_calls": False}, "parallel_tool_calls"),
        ({"messages": [*ASK, {"role": "tool", "content": "x"}]}, "messages[1].tool_call_id"),
        ({"messages": [*ASK, {"role": "tool", "content": "x", "tool_call_id": "c"}]}, "messages[1].tool_call_id"),
        (
            {"messages": [*CALLED, {"role": "tool", "content": "x", "tool_call_id": "d"}]},
            "messages[2].tool_call_id",
        ),
        (
            {"messages": [*CALLED, {"role": "tool", "content": "x", "tool_call_id": "c", "name": "g"}]},
            "messages[2].name",
        ),
        ({"messages": [*CALLED, {"role": "tool", "tool_call_id": "c"}]}, "messages[2].content"),
        ({"messages": [{"role": "user", "content": "x", "tool_call_id": "c"}]}, "messages[0].tool_call_id"),
        ({"messages": [{**CALLED[1], "role": "user"}]}, "messages[0].tool_calls"),
        (
            {"messages": [{"role": "user", "content": "x", "reasoning_content": "y"}]},
            "messages[0].reasoning_content",
        ),
        (
            {"messages": called(function={"name": "f", "arguments": "{"})},
            "messages[1].tool_calls[0].function.arguments",
        ),
        (
            {"messages": called(function={"name": "f", "arguments": "[1]"})},
            "messages[1].tool_calls[0].function.arguments",
        ),
        (
            {"messages": called(function={"name": "f", "arguments": '{"a": NaN}'})},
            "messages[1].tool_calls[0].function.arguments",
        ),
        (
            {"messages": called(function={"name": "f", "arguments": '{"a": "\\ud800"}'})},
            "messages[1].tool_calls[0].function.arguments",
        ),
        (
            {"messages": called(function={"name": "f", "arguments": '{"a":' * 100 + "1" + "}" * 100})},
            "messages[1].tool_calls[0].function.arguments",
        ),
        (
            {"messages": called(function={"name": "f", "arguments": '{"a":' * 9999 + "1" + "}" * 9999})},
            "messages[1].tool_calls[0].function.arguments",
        ),
        ({"messages": called(function={"name": "", "arguments": "{}"})}, "messages[1].tool_calls[0].function.name"),
        ({"messages": called(id="")}, "messages[1].tool_calls[0].id"),
        ({"messages": called(type="custom")}, "messages[1].tool_calls[0].type"),
        ({"messages": called(id="x" * 300)}, "messages[1].tool_calls[0].id"),
        (
            {"messages": [ASK[0], {**CALLED[1], "tool_calls": CALLED[1]["tool_calls"] * 2}]},
            "messages[1].tool_calls[1].id",
        ),
        ({"messages": [*ASK, {"role": "assistant", "tool_calls": []}]}, "messages[1].content"),
    ],
)
async def test_what_is_wrong_with_tools_is_a_400_that_names_the_field(
    http: httpx.AsyncClient, change: dict[str, Any], param: str
) -> None:
    response = await http.post("/v1/chat/completions", json={"model": "tiny", "messages": ASK, **change})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param), error
    assert error["type"] == "invalid_request_error"


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    "change",
    [
        {"tools": [], "tool_choice": "auto"},
        {"tools": None, "tool_choice": "none"},
        {"tools": TOOLS, "tool_choice": "none", "parallel_tool_calls": False},
        {"tools": [function(parameters=None, description=None, strict=None)]},
        {"messages": called(function={"name": "f", "arguments": ""})},
        {"messages": called(index=0)},
        {"messages": [*CALLED, {"role": "tool", "tool_call_id": "c", "name": "f", "content": "x"}]},
        {"messages": [*CALLED, {"role": "tool", "tool_call_id": "c", "content": [{"type": "text", "text": "x"}]}]},
        {"messages": [*ASK, {"role": "assistant", "content": "x", "reasoning_content": "y"}]},
    ],
)
async def test_what_is_right_is_answered(http: httpx.AsyncClient, change: dict[str, Any]) -> None:
    response = await http.post("/v1/chat/completions", json={"model": "tiny", "messages": ASK, **change})
    assert response.status_code == 200, response.text

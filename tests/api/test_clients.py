"""Clients that many programs use, unchanged: litellm and LangChain."""

import json
from typing import Any

import pytest
from api_support import ScriptedEngine, failing, running, saying
from tool_models import family_model, tokens_of

from kvasir_engine.api.tokenizer import ServedModel
from kvasir_engine.engine_client import EngineError

HELLO = [{"role": "user", "content": "Hi"}]


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would tell others of the tests, and fetch price lists."""
    for name, value in {
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "LANGSMITH_TRACING": "false",
        "LANGCHAIN_TRACING_V2": "false",
    }.items():
        monkeypatch.setenv(name, value)


def engine(model: ServedModel, text: str = "Grüße 😀") -> ScriptedEngine:
    return ScriptedEngine(saying(model.tokenizer.encode(text)))


async def test_litellm_speaks_openais_api(model: ServedModel) -> None:
    import litellm

    async with running(engine(model), model) as api:
        asked: dict[str, Any] = {"api_base": f"{api.url}/v1", "api_key": "x", "max_retries": 0, "timeout": 60}
        whole = await litellm.acompletion("hosted_vllm/tiny", HELLO, temperature=0.5, **asked)
        stream = await litellm.acompletion("openai/tiny", HELLO, stream=True, **asked)
        texts = [chunk.choices[0].delta.content or "" async for chunk in stream]
        text = await litellm.atext_completion(model="text-completion-openai/tiny", prompt="a", **asked)
        with pytest.raises(litellm.BadRequestError):
            await litellm.acompletion("openai/tiny", HELLO, temperature=9, **asked)
    assert whole.choices[0].message.content == "".join(texts) == "Grüße 😀"
    assert whole.usage.completion_tokens == len("Grüße 😀".encode()) + 1
    assert text.choices[0].text == "Grüße 😀"


async def test_litellm_speaks_anthropics_api(model: ServedModel) -> None:
    import litellm

    async with running(engine(model), model) as api:
        whole = await litellm.acompletion(
            "anthropic/tiny", HELLO, api_base=api.url, api_key="x", max_tokens=50, timeout=60
        )
    assert whole.choices[0].message.content == "Grüße 😀"


async def test_langchain(model: ServedModel) -> None:
    from langchain_openai import ChatOpenAI, OpenAI

    async with running(engine(model), model) as api:
        asked: dict[str, Any] = {"base_url": f"{api.url}/v1", "api_key": "x", "model": "tiny", "max_retries": 0}
        chat = ChatOpenAI(**asked, timeout=60, temperature=0)
        whole = await chat.ainvoke([("system", "Be kind"), ("human", "Hi")])
        pieces = [piece.text async for piece in chat.astream("Hi")]
        together = await chat.abatch(["a", "b", "c"])
        by_responses = await ChatOpenAI(**asked, timeout=60, use_responses_api=True).ainvoke("Hi")
        plain = await OpenAI(**asked, timeout=60).ainvoke("Hi")
    assert whole.content == "".join(pieces) == plain == "Grüße 😀"
    assert [each.content for each in together] == ["Grüße 😀"] * 3
    assert by_responses.text == "Grüße 😀"
    assert whole.usage_metadata is not None
    assert whole.usage_metadata["output_tokens"] == len("Grüße 😀".encode()) + 1


CALL = '<tool_call>{"name": "search", "arguments": {"q": "é"}}</tool_call>'
SEARCH: dict[str, Any] = {
    "type": "function",
    "function": {"name": "search", "description": "d", "parameters": {"type": "object", "properties": {}}},
}


async def test_langchain_calls_tools_by_responses() -> None:
    from langchain_core.messages import HumanMessage, ToolMessage
    from langchain_openai import ChatOpenAI

    model = family_model("qwen3")
    async with running(ScriptedEngine(saying(tokens_of(model, f"<think>Hm</think>So{CALL}"))), model) as api:
        asked: dict[str, Any] = {"base_url": f"{api.url}/v1", "api_key": "x", "model": "tiny", "max_retries": 0}
        chat = ChatOpenAI(**asked, timeout=60, use_responses_api=True).bind_tools([SEARCH])
        first: Any = await chat.ainvoke("Hi")
        pieces = [piece async for piece in chat.astream("Hi")]
        streamed: Any = sum(pieces[1:], pieces[0])
        (call,) = first.tool_calls
        results = [HumanMessage("Hi"), first, ToolMessage("found", tool_call_id=call["id"])]
        again: Any = await chat.ainvoke(results)
    assert (first.text, call["name"], call["args"]) == ("So", "search", {"q": "é"})
    assert [(each["name"], each["args"]) for each in streamed.tool_calls] == [("search", {"q": "é"})]
    assert len(again.tool_calls) == 1
    assert "found" in model.tokenizer.decode(api.engine.requests[-1].tokens)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("provider", ["anthropic", "openai", "hosted_vllm"])
async def test_litellm_calls_tools_and_sends_what_was_answered_back(provider: str, stream: bool) -> None:
    import litellm

    model = family_model("hermes")
    async with running(ScriptedEngine(saying(tokens_of(model, CALL))), model) as api:
        base = api.url if provider == "anthropic" else f"{api.url}/v1"
        asked: dict[str, Any] = {"api_base": base, "api_key": "x", "max_tokens": 500, "timeout": 60}
        asked["tools"] = [SEARCH]
        answer = await litellm.acompletion(f"{provider}/tiny", HELLO, stream=stream, **asked)
        if stream:
            answer = litellm.stream_chunk_builder([chunk async for chunk in answer])
        message = answer.choices[0].message
        (call,) = message.tool_calls
        said = [*HELLO, message.model_dump(), {"role": "tool", "tool_call_id": call.id, "content": "found"}]
        await litellm.acompletion(f"{provider}/tiny", said, tool_choice="required", **asked)
    assert (call.function.name, json.loads(call.function.arguments)) == ("search", {"q": "é"})
    assert answer.choices[0].finish_reason == "tool_calls"
    assert api.engine.requests[-1].sampling.grammar is not None
    assert "found" in model.tokenizer.decode(api.engine.requests[-1].tokens)


async def test_their_errors_are_ours(model: ServedModel) -> None:
    import openai
    from langchain_openai import ChatOpenAI

    gone = ScriptedEngine(failing([], EngineError("no_worker", "all gone", 503)))
    async with running(gone, model) as api:
        chat = ChatOpenAI(base_url=f"{api.url}/v1", api_key="x", model="tiny", max_retries=0, timeout=60)  # type: ignore[arg-type]
        with pytest.raises(openai.InternalServerError, match="all gone"):
            await chat.ainvoke("Hi")

"""What programs do with four clients, unchanged: chats, streams, tools, structured output, logprobs, errors."""

import json
import math
from typing import Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict

MODEL = "smollm2"
QUESTION = "What is the capital of France?"
# a small model follows what it is shown
REPORT = 'Report the weather. For example: {"sky": "grey", "wind": "none"}'
CALL = 'Report the weather. For example: {"name": "report", "arguments": {"sky": "grey", "wind": "none"}}'
TOKENS = 6
JSON_TOKENS = 80


class Weather(BaseModel):
    """What a report has."""

    model_config = ConfigDict(extra="forbid")
    sky: Literal["blue", "grey"]
    wind: Literal["none", "strong"]


PARAMETERS = Weather.model_json_schema()
FUNCTION: dict[str, Any] = {"name": "report", "description": "Report the weather", "parameters": PARAMETERS}
TOOL: dict[str, Any] = {"type": "function", "function": FUNCTION}


def system(client: str) -> str:
    """More than a decode worker computes itself, and another's for each client."""
    return f"You are asked by {client}. " + "Answer every question in one short and simple sentence. " * 4


def messages(client: str, question: str = QUESTION) -> list[Any]:
    return [{"role": "system", "content": system(client)}, {"role": "user", "content": question}]


def called(name: str, arguments: Any) -> None:
    assert name == "report"
    Weather.model_validate(json.loads(arguments) if isinstance(arguments, str) else arguments)


def likely(logprobs: list[float]) -> None:
    assert logprobs
    assert all(each <= 0 and math.isfinite(each) for each in logprobs)


async def openai_walk(url: str) -> None:
    import openai

    said = messages("openai")
    asked: Any = {"model": MODEL, "messages": said, "temperature": 0, "max_completion_tokens": TOKENS}
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0, timeout=500) as client:
        assert [model.id async for model in client.models.list()] == [MODEL]
        whole = await client.chat.completions.create(**asked)
        (choice,) = whole.choices
        assert choice.message.content
        chunks = [chunk async for chunk in await client.chat.completions.create(**asked, stream=True)]
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == choice.message.content
        assert chunks[-1].choices[0].finish_reason == choice.finish_reason

        calling = messages("openai", CALL)
        forced: Any = {"model": MODEL, "messages": calling, "temperature": 0, "max_completion_tokens": JSON_TOKENS}
        forced |= {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False}
        calls = (await client.chat.completions.create(**forced)).choices[0].message.tool_calls
        async with client.chat.completions.stream(**forced) as stream:
            async for _ in stream:
                pass
            streamed = (await stream.get_final_completion()).choices[0].message.tool_calls
        assert calls
        assert streamed
        for call in (calls[0], streamed[0]):
            assert call.type == "function"
            called(call.function.name, call.function.arguments)
        answered = [*calling, {"role": "assistant", "tool_calls": [calls[0].model_dump()]}]
        answered += [{"role": "tool", "tool_call_id": calls[0].id, "content": "It is blue."}]
        again = await client.chat.completions.create(**{**asked, "messages": answered, "tools": [TOOL]})
        assert again.choices[0].finish_reason in ("stop", "length", "tool_calls")

        shown: Any = {**asked, "messages": messages("openai", REPORT), "max_completion_tokens": JSON_TOKENS}
        parsed = await client.chat.completions.parse(**shown, response_format=Weather)
        assert isinstance(parsed.choices[0].message.parsed, Weather)

        scored = await client.chat.completions.create(**asked, logprobs=True, top_logprobs=3)
        tokens = scored.choices[0].logprobs
        assert tokens is not None
        assert tokens.content
        likely([each.logprob for each in tokens.content])
        assert all(each.top_logprobs[0].logprob == each.logprob for each in tokens.content)  # it was greedy
        assert scored.choices[0].message.content == choice.message.content

        response = await client.responses.create(
            model=MODEL, instructions=system("openai"), input=QUESTION, temperature=0, max_output_tokens=TOKENS
        )
        assert response.output_text == choice.message.content
        text = await client.completions.create(model=MODEL, prompt=system("openai"), max_tokens=3, echo=True)
        assert text.choices[0].text.startswith(system("openai"))

        with pytest.raises(openai.BadRequestError, match="temperature") as bad:
            await client.chat.completions.create(**{**asked, "temperature": 9})
        assert bad.value.param == "temperature"
        with pytest.raises(openai.NotFoundError) as missing:
            await client.chat.completions.create(**{**asked, "model": "other"})
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError) as long:
            await client.chat.completions.create(**{**asked, "max_completion_tokens": 10**6})
        assert long.value.code == "context_length_exceeded"


async def anthropic_walk(url: str) -> None:
    """Its API has no log-probabilities, so who asks for some is refused."""
    import anthropic

    asked: Any = {
        "model": MODEL,
        "system": system("anthropic"),
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": TOKENS,
        "extra_body": {"temperature": 0},
    }
    async with anthropic.AsyncAnthropic(base_url=url, api_key="x", max_retries=0, timeout=500) as client:
        whole = await client.messages.create(**asked)
        assert whole.content[0].type == "text"
        async with client.messages.stream(**asked) as stream:
            pieces = [text async for text in stream.text_stream]
            final = await stream.get_final_message()
        assert "".join(pieces) == whole.content[0].text
        assert len(pieces) > 1
        assert (final.stop_reason, final.usage.output_tokens) == (whole.stop_reason, whole.usage.output_tokens)
        assert final.usage.cache_read_input_tokens  # of the first answer's prompt

        tool = {"name": "report", "description": "Report the weather", "input_schema": PARAMETERS}
        calling = [{"role": "user", "content": CALL}]
        forced = {**asked, "messages": calling, "tools": [tool], "max_tokens": JSON_TOKENS}
        forced["tool_choice"] = {"type": "any", "disable_parallel_tool_use": True}
        answer = await client.messages.create(**forced)
        async with client.messages.stream(**forced) as stream:
            streamed = await stream.get_final_message()
        for each in (answer, streamed):
            assert each.stop_reason == "tool_use"
            (use,) = each.content[:1]
            assert use.type == "tool_use"
            called(use.name, use.input)
        result = {"type": "tool_result", "tool_use_id": answer.content[0].id, "content": "It is blue."}
        history: list[Any] = [*calling, {"role": "assistant", "content": answer.content[:1]}]
        history += [{"role": "user", "content": [result]}]
        again = await client.messages.create(**{**asked, "messages": history, "tools": [tool]})
        assert again.usage.output_tokens > 0

        shown = {**asked, "messages": [{"role": "user", "content": REPORT}], "max_tokens": JSON_TOKENS}
        parsed = await client.messages.parse(**shown, output_format=Weather)
        assert isinstance(parsed.parsed_output, Weather)

        assert (await client.messages.count_tokens(
            model=MODEL, system=asked["system"], messages=asked["messages"]
        )).input_tokens > 64  # fmt: skip
        for field, value in (("temperature", 9), ("logprobs", True)):
            with pytest.raises(anthropic.BadRequestError, match=field):
                await client.messages.create(**{**asked, "extra_body": {field: value}})
        with pytest.raises(anthropic.NotFoundError):
            await client.messages.create(**{**asked, "model": "other"})


async def litellm_walk(url: str) -> None:
    import litellm

    asked: Any = {"api_base": f"{url}/v1", "api_key": "x", "max_retries": 0, "timeout": 500}
    asked |= {"model": f"openai/{MODEL}", "messages": messages("litellm"), "temperature": 0}
    whole = await litellm.acompletion(**asked, max_tokens=TOKENS)
    text = whole.choices[0].message.content
    assert text
    chunks = [chunk async for chunk in await litellm.acompletion(**asked, max_tokens=TOKENS, stream=True)]
    assert len(chunks) > 2
    assert litellm.stream_chunk_builder(chunks).choices[0].message.content == text

    forced = {**asked, "messages": messages("litellm", CALL), "tools": [TOOL], "tool_choice": "required"}
    forced |= {"parallel_tool_calls": False, "max_tokens": JSON_TOKENS}
    answer = await litellm.acompletion(**forced)
    parts = [chunk async for chunk in await litellm.acompletion(**forced, stream=True)]
    for each in (answer, litellm.stream_chunk_builder(parts)):
        call = each.choices[0].message.tool_calls[0]
        called(call.function.name, call.function.arguments)
    said = [*forced["messages"], answer.choices[0].message.model_dump()]
    said += [{"role": "tool", "tool_call_id": answer.choices[0].message.tool_calls[0].id, "content": "Blue."}]
    again = await litellm.acompletion(**{**asked, "messages": said, "tools": [TOOL]}, max_tokens=TOKENS)
    assert again.usage.completion_tokens > 0

    shown = {**asked, "messages": messages("litellm", REPORT), "max_tokens": JSON_TOKENS}
    structured = await litellm.acompletion(**shown, response_format=Weather)
    Weather.model_validate_json(structured.choices[0].message.content)

    scored = await litellm.acompletion(**asked, max_tokens=TOKENS, logprobs=True, top_logprobs=2)
    likely([each.logprob for each in scored.choices[0].logprobs.content])
    assert scored.choices[0].message.content == text

    with pytest.raises(litellm.BadRequestError, match="temperature"):
        await litellm.acompletion(**{**asked, "temperature": 9})
    with pytest.raises(litellm.NotFoundError, match="other"):
        await litellm.acompletion(**{**asked, "model": "openai/other"})


async def langchain_walk(url: str) -> None:
    import openai
    from langchain_core.messages import ToolMessage
    from langchain_openai import ChatOpenAI

    asked: Any = {"base_url": f"{url}/v1", "api_key": "x", "model": MODEL, "max_retries": 0, "timeout": 500}
    said = [("system", system("langchain")), ("human", QUESTION)]
    chat = ChatOpenAI(**asked, temperature=0, max_tokens=TOKENS)
    whole = await chat.ainvoke(said)
    assert whole.text
    pieces = [piece.text async for piece in chat.astream(said)]
    assert "".join(pieces) == whole.text
    assert len(pieces) > 2

    longer = ChatOpenAI(**asked, temperature=0, max_tokens=JSON_TOKENS)
    forced = longer.bind_tools([TOOL], tool_choice="required", parallel_tool_calls=False)
    calling = [said[0], ("human", CALL)]
    answer: Any = await forced.ainvoke(calling)
    parts: list[Any] = [part async for part in forced.astream(calling)]
    for each in (answer, sum(parts[1:], parts[0])):
        called(each.tool_calls[0]["name"], each.tool_calls[0]["args"])
    results = [ToolMessage("Blue.", tool_call_id=call["id"]) for call in answer.tool_calls]
    assert (await chat.bind_tools([TOOL]).ainvoke([*calling, answer, *results])).usage_metadata

    shown = longer.with_structured_output(Weather, method="json_schema")
    assert isinstance(await shown.ainvoke([said[0], ("human", REPORT)]), Weather)

    scored = await chat.bind(logprobs=True, top_logprobs=2).ainvoke(said)
    likely([each["logprob"] for each in scored.response_metadata["logprobs"]["content"]])
    assert scored.text == whole.text

    with pytest.raises(openai.BadRequestError, match="temperature"):
        await ChatOpenAI(**asked, temperature=9).ainvoke(said)
    with pytest.raises(openai.NotFoundError, match="other"):
        await ChatOpenAI(**{**asked, "model": "other"}).ainvoke(said)


WALKS = [openai_walk, anthropic_walk, litellm_walk, langchain_walk]

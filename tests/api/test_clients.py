"""Clients that many programs use, unchanged: litellm and LangChain."""

from typing import Any

import pytest
from api_support import ScriptedEngine, failing, running, saying

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


async def test_their_errors_are_ours(model: ServedModel) -> None:
    import openai
    from langchain_openai import ChatOpenAI

    gone = ScriptedEngine(failing([], EngineError("no_worker", "all gone", 503)))
    async with running(gone, model) as api:
        chat = ChatOpenAI(base_url=f"{api.url}/v1", api_key="x", model="tiny", max_retries=0, timeout=60)  # type: ignore[arg-type]
        with pytest.raises(openai.InternalServerError, match="all gone"):
            await chat.ainvoke("Hi")

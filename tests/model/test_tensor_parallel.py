"""Models divided among real rank processes over gloo, against transformers' whole ones."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from sequences import random_tokens
from tiny_models import gemma3, llama, mistral, qwen2, qwen3, qwen3_moe, reference_logits

from kvasir_engine.model.architectures import parse_config
from kvasir_engine.model.errors import ModelError
from kvasir_engine.model.parallel import Shard, shard

RANK_PROCESS = Path(__file__).with_name("rank_process.py")
EVEN = {"vocab_size": 152}

# A prompt in chunks, beside another that is decoded, and both decoded together.
STEPS: list[dict[int, int]] = [{0: 40}, {0: 20, 1: 9}, {1: 1, 0: 33}, {0: 1, 1: 1}, {1: 1, 0: 1}]

MODELS = {
    "llama": (2, lambda: llama(**EVEN)),
    "llama, tied embeddings": (2, lambda: llama(**EVEN, tie_word_embeddings=True)),
    "llama, a KV head on two ranks": (2, lambda: llama(**EVEN, num_key_value_heads=1)),
    "mistral": (2, lambda: mistral(**EVEN, sliding_window=30)),
    "qwen2": (2, lambda: qwen2(**EVEN)),
    "qwen3": (2, lambda: qwen3(**EVEN)),
    "qwen3 moe": (2, lambda: qwen3_moe(**EVEN, mlp_only_layers=[1])),
    "gemma 3": (2, lambda: gemma3(**EVEN)),
    "llama, three ranks, each with its KV head": (3, lambda: llama(vocab_size=153, num_key_value_heads=3)),
    "llama, four ranks, two to each KV head": (4, lambda: llama(**EVEN, num_attention_heads=8)),
}


@dataclass(frozen=True)
class Result:
    kv_heads: int
    logits: list[torch.Tensor]  # after each of STEPS, [sequences, vocab]


def run_ranks(folder: Path, size: int, jobs: list[dict[str, Any]]) -> list[list[Result]]:
    """What each of `size` rank processes says of each job."""
    folder.mkdir(exist_ok=True)
    work = folder / "work.json"
    work.write_text(json.dumps(jobs))
    address = f"file://{folder}/meeting"
    ranks = [
        subprocess.Popen(
            [sys.executable, RANK_PROCESS, str(rank), str(size), address, work], stderr=subprocess.PIPE, text=True
        )
        for rank in range(size)
    ]
    try:
        said = [rank.communicate(timeout=120)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert [rank.returncode for rank in ranks] == [0] * size, "\n".join(said)
    loaded = [torch.load(folder / f"logits-{rank}.pt", weights_only=True) for rank in range(size)]
    return [[Result(*result) for result in results] for results in loaded]


@pytest.fixture(scope="module")
def divided(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[list[torch.Tensor], list[Result]]]:
    """For each of MODELS: transformers' logits after each of STEPS, and each rank's result.

    All models of one size go through the same processes, as most of the time goes into their start.
    """
    root = tmp_path_factory.mktemp("divided")
    outcome = {}
    for size in sorted({size for size, _ in MODELS.values()}):
        names = [name for name in MODELS if MODELS[name][0] == size]
        jobs, expected = [], []
        for number, name in enumerate(names):
            model = MODELS[name][1]()
            folder = root / f"{size}-{number}"
            model.save_pretrained(folder)
            prompts = [random_tokens(95, model.config.vocab_size, seed) for seed in (1, 2)]
            expected.append(expected_logits(model, prompts))
            params = {"dtype": "float32"}
            jobs.append(
                {"folder": str(folder), "params": params, "prompts": prompts, "steps": STEPS, "most_tokens": 96}
            )
        results = run_ranks(root / f"ranks-{size}", size, jobs)
        for number, name in enumerate(names):
            outcome[name] = (expected[number], [result[number] for result in results])
    return outcome


def expected_logits(model: Any, prompts: list[list[int]]) -> list[torch.Tensor]:
    whole = [reference_logits(model, prompt) for prompt in prompts]
    done, expected = [0, 0], []
    for step in STEPS:
        for i, count in step.items():
            done[i] += count
        expected.append(torch.stack([whole[i][done[i] - 1] for i in step]))
    return expected


@pytest.mark.parametrize("name", MODELS)
def test_every_rank_has_the_whole_model_s_logits(
    name: str, divided: dict[str, tuple[list[torch.Tensor], list[Result]]]
) -> None:
    expected, ranks = divided[name]
    assert len(ranks) == MODELS[name][0]
    assert expected[0].std() > 0.5  # else closeness would mean nothing
    for theirs, first, *others in zip(expected, *(rank.logits for rank in ranks), strict=True):
        torch.testing.assert_close(first, theirs, atol=1e-4, rtol=0)
        assert all(torch.equal(first, other) for other in others)


def test_the_pool_of_a_rank_has_its_kv_heads_only(
    divided: dict[str, tuple[list[torch.Tensor], list[Result]]],
) -> None:
    held = {name: [rank.kv_heads for rank in ranks] for name, (_, ranks) in divided.items()}
    assert held["llama"] == [1, 1]
    assert held["llama, a KV head on two ranks"] == [1, 1]
    assert held["llama, three ranks, each with its KV head"] == [1, 1, 1]


def config(**changes: Any) -> Any:
    values = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "vocab_size": 160,
        "max_position_embeddings": 512,
    }
    return parse_config({**values, **changes})


def test_the_ranks_hold_everything_once() -> None:
    assert shard(config()) == Shard(range(16), range(4), range(96), range(0), range(160))
    parts = [shard(config(), rank, 4) for rank in range(4)]
    for field, count in (("heads", 16), ("kv_heads", 4), ("intermediate", 96), ("vocab", 160)):
        assert [i for part in parts for i in getattr(part, field)] == list(range(count))


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16])
def test_a_rank_has_the_kv_heads_of_its_query_heads(size: int) -> None:
    for rank in range(size):
        part = shard(config(), rank, size)
        assert {head // 4 for head in part.heads} == set(part.kv_heads)
        # The backend gives each of the rank's KV heads as many of its query heads as the next, in order.
        group = len(part.heads) // len(part.kv_heads)
        assert [part.kv_heads[i // group] for i in range(len(part.heads))] == [head // 4 for head in part.heads]


@pytest.mark.parametrize(
    ("changes", "size", "said"),
    [
        ({}, 3, "size 3 does not divide the model's 4 KV heads"),
        (
            {"num_attention_heads": 12, "num_key_value_heads": 2, "head_dim": 4},
            5,
            "5 is no multiple of the model's 2",
        ),
        ({"num_key_value_heads": 1}, 32, "size 32 does not divide the model's 16 attention heads"),
        ({"intermediate_size": 97}, 2, "size 2 does not divide the model's 97 intermediate columns"),
        ({"vocab_size": 161}, 2, "size 2 does not divide the model's 161 vocabulary entries"),
    ],
)
def test_a_model_that_cannot_be_divided_is_refused(changes: dict[str, Any], size: int, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        shard(config(**changes), 0, size)

"""Deterministic mode: the same bits for a token in any batch and chunk, and after any cached prefix."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from sequences import Sequences, random_tokens
from tiny_models import gemma3, llama, mistral, qwen2, qwen3, qwen3_moe, runner_of

from kvasir_engine.cpu_kernels import unavailable_reason
from kvasir_engine.errors import ModelError
from kvasir_engine.executor.model_runner import ModelRunner

needs_kernels = pytest.mark.skipif(
    unavailable_reason() is not None, reason=f"CPU kernels cannot run here: {unavailable_reason()}"
)

SHAPE: dict[str, Any] = {
    "head_dim": 32,
    "hidden_size": 96,
    "vocab_size": 160,
    "intermediate_size": 112,
    "max_position_embeddings": 1024,
}
KINDS: dict[str, Any] = {
    "llama": lambda: llama(**SHAPE),
    "mistral": lambda: mistral(**SHAPE, sliding_window=70),
    "qwen2": lambda: qwen2(**SHAPE),
    "qwen3": lambda: qwen3(**SHAPE),
    "qwen3 moe": lambda: qwen3_moe(**SHAPE, num_experts=16, num_experts_per_tok=5, moe_intermediate_size=48),
    "gemma 3": lambda: gemma3(**SHAPE),
}
LENGTHS = [1, 17, 130, 300, 520]
BEGINNING = 64
"""Tokens that the two longest prompts have in common."""


@pytest.fixture(autouse=True)
def threads():  # type: ignore[no-untyped-def]
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


Bits = dict[tuple[int, int], torch.Tensor]


def run(runner: ModelRunner, prompts: list[list[int]], seed: int) -> tuple[Bits, list[torch.Tensor]]:
    """The logits after each chunk, by sequence and tokens so far, and each sequence's KV at its end."""
    choice = random.Random(seed)
    runner.pool.tensor.fill_(float("nan"))
    sequences = Sequences(runner, prompts, max(LENGTHS), seed)
    done = [0] * len(prompts)
    found: Bits = {}
    reused = seed % 2 == 0
    while unfinished := [i for i, prompt in enumerate(prompts) if done[i] < len(prompt)]:
        if reused:  # nobody's KV is there yet to be read: the last prompt waits for the one before it
            unfinished = [i for i in unfinished if i != len(prompts) - 1] or unfinished
            if done[-2] >= BEGINNING and not done[-1]:
                sequences.reuse(len(prompts) - 2, len(prompts) - 1, BEGINNING)
                done[-1] = BEGINNING
                unfinished = [*{*unfinished, len(prompts) - 1}]
        chosen = choice.sample(unfinished, choice.randint(1, len(unfinished)))
        counts = {i: min(len(prompts[i]) - done[i], choice.choice([1, 1, 1, 2, 9, 100, 520])) for i in chosen}
        logits = sequences.step(counts)
        for row, (i, count) in enumerate(counts.items()):
            done[i] += count
            found[i, done[i]] = logits[row].clone()
    return found, [sequences.kv(i) for i in range(len(prompts))]


@needs_kernels
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bits_in_any_batch_chunk_and_after_any_cached_prefix(kind: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    runner = runner_of(KINDS[kind](), tmp_path, dtype="bfloat16", page_size=16, pages=200, deterministic=True)
    prompts = [random_tokens(length, runner.vocab, length) for length in LENGTHS]
    prompts[-1][:BEGINNING] = prompts[-2][:BEGINNING]
    first, kv = run(runner, prompts, 0)
    compared = 0
    for seed in range(1, 6):
        torch.set_num_threads(2 if seed == 1 else 1)  # how many share the work is no part of it either
        other, other_kv = run(runner, prompts, seed)
        for place in first.keys() & other.keys():
            assert torch.equal(first[place], other[place]), f"seed {seed}: sequence and tokens {place}"
            compared += 1
        for i, (one, another) in enumerate(zip(kv, other_kv, strict=True)):
            assert torch.equal(one, another), f"seed {seed}: KV of sequence {i}"
    assert compared >= 5 * len(LENGTHS), "at least the ends have been compared"


@pytest.mark.parametrize(
    ("params", "reason"),
    [
        ({"dtype": "float32"}, "its kernels compute in bfloat16, not in float32"),
        pytest.param(
            {"dtype": "bfloat16", "page_size": 4},
            "no kernel attends over heads of 32 and pages of 4",
            marks=needs_kernels,
        ),
    ],
)
def test_what_it_cannot_do_is_refused(params: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"^deterministic mode: {reason}$"):
        runner_of(llama(**SHAPE), tmp_path, pages=8, deterministic=True, **params)


@needs_kernels
def test_a_matrix_that_no_kernel_takes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"^deterministic mode: no kernel multiplies by a \[90, 96\] matrix"):
        runner_of(llama(**{**SHAPE, "vocab_size": 90}), tmp_path, dtype="bfloat16", pages=8, deterministic=True)

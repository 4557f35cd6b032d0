"""Random shapes of every architecture, in random batches, against transformers."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from sequences import Sequences, random_tokens
from tiny_models import (
    LLAMA_3_SCALING,
    gemma3,
    llama,
    mistral,
    qwen2,
    qwen3,
    qwen3_moe,
    reference_logits,
    runner_of,
)

KINDS = {
    "llama": llama,
    "mistral": mistral,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "qwen3 moe": qwen3_moe,
    "gemma 3": gemma3,
}


def random_shape(kind: str, choice: random.Random) -> dict[str, Any]:
    """Changes to a tiny model's configuration."""
    kv_heads = choice.choice([1, 2, 3])
    heads = kv_heads * choice.choice([1, 2, 4])
    layers = choice.randint(1, 4)
    shape: dict[str, Any] = {
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": choice.choice([8, 16, 20]),
        "hidden_size": heads * choice.choice([4, 8]),
        "intermediate_size": choice.choice([24, 64, 90]),
        "num_hidden_layers": layers,
        "vocab_size": choice.choice([97, 128]),
        "tie_word_embeddings": choice.random() < 0.5,
        "rms_norm_eps": choice.choice([1e-6, 1e-3]),
    }
    window = choice.choice([1, 2, 5, 16, 40, 127, 128, 129, 150])
    if kind == "llama" and choice.random() < 0.5:
        shape["rope_parameters"] = LLAMA_3_SCALING
    if kind == "mistral":
        shape["sliding_window"] = choice.choice([None, window])
    if kind in ("qwen2", "qwen3"):
        shape["max_window_layers"] = choice.randint(0, layers)
    if kind in ("qwen2", "qwen3", "qwen3 moe"):
        shape |= {"use_sliding_window": choice.random() < 0.6, "sliding_window": window}
    if kind == "qwen3 moe":
        experts = choice.randint(2, 9)
        shape |= {"num_experts": experts, "num_experts_per_tok": choice.randint(1, min(4, experts))}
        shape |= {"decoder_sparse_step": choice.choice([1, 2]), "norm_topk_prob": choice.random() < 0.5}
        shape |= {"mlp_only_layers": choice.sample(range(layers), choice.choice([0, 1]))}
    if kind == "gemma 3":
        shape |= {"sliding_window": window, "sliding_window_pattern": choice.randint(1, 4)}
        shape |= {"query_pre_attn_scalar": choice.choice([4, 16, 50])}
    return shape


def compare(kind: str, seed: int, folder: Path) -> None:
    choice = random.Random(seed)
    shape = random_shape(kind, choice)
    model = KINDS[kind](**shape)
    runner = runner_of(model, folder, page_size=choice.choice([1, 4, 16]), pages=1280)
    prompts = [random_tokens(choice.randint(1, 300), runner.vocab, seed * 10 + i) for i in range(4)]
    references = [reference_logits(model, prompt) for prompt in prompts]
    sequences = Sequences(runner, prompts, 300, seed)
    done = [0] * len(prompts)
    while unfinished := [i for i, prompt in enumerate(prompts) if done[i] < len(prompt)]:
        chosen = choice.sample(unfinished, choice.randint(1, len(unfinished)))
        # Chunks, and nearer to the end single tokens, so that some decode beside others' chunks.
        counts = {i: min(len(prompts[i]) - done[i], choice.choice([1, 1, 3, 40, 140, 290])) for i in chosen}
        logits = sequences.step(counts)
        for row, (i, count) in enumerate(counts.items()):
            done[i] += count
            theirs = references[i][done[i] - 1]
            assert (logits[row] - theirs).abs().max() < 2e-4 * max(1.0, theirs.abs().max()), (shape, done[i])
    torch.testing.assert_close(runner.pool.tensor.isfinite().all(), torch.tensor(True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_random_model_is_transformers_in_random_batches(kind: str, tmp_path: Path) -> None:
    compare(kind, 1, tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(2, 42))
@pytest.mark.parametrize("kind", KINDS)
def test_many_random_models_are_transformers(kind: str, seed: int, tmp_path: Path) -> None:
    compare(kind, seed, tmp_path)

"""Our forward pass against transformers', through the paged pool, in every shape of batch."""

from collections.abc import Callable
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

from kvasir_engine.attention import torch_backend
from kvasir_engine.executor.model_runner import ModelRunner

MODELS = {
    "llama": lambda: llama(),
    "llama, tied embeddings": lambda: llama(tie_word_embeddings=True),
    "llama, one KV head": lambda: llama(num_key_value_heads=1),
    "llama, as many KV heads as heads": lambda: llama(num_key_value_heads=6),
    "llama 3 rotary scaling": lambda: llama(rope_parameters=LLAMA_3_SCALING),
    "linear rotary scaling": lambda: llama(
        rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    ),
    "mistral": lambda: mistral(),
    "mistral within its window": lambda: mistral(sliding_window=300),
    "mistral, short window": lambda: mistral(sliding_window=7),
    "mistral, window of more than a block": lambda: mistral(sliding_window=141),
    "qwen2": lambda: qwen2(),
    "qwen2, window in the last layers": lambda: qwen2(
        use_sliding_window=True, sliding_window=33, max_window_layers=1
    ),
    "qwen3": lambda: qwen3(),
    "qwen3, window in one layer": lambda: qwen3(
        use_sliding_window=True,
        sliding_window=20,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
    ),
    "qwen3 moe": lambda: qwen3_moe(),
    "qwen3 moe, weights of the chosen add up to one": lambda: qwen3_moe(norm_topk_prob=True),
    "qwen3 moe, every second layer": lambda: qwen3_moe(decoder_sparse_step=2),
    "qwen3 moe, dense first layer, window": lambda: qwen3_moe(
        mlp_only_layers=[0], use_sliding_window=True, sliding_window=50
    ),
    "gemma 3": lambda: gemma3(),
    "gemma 3, head of its own": lambda: gemma3(tie_word_embeddings=False),
    "gemma 3, local and global rotary": lambda: gemma3(
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
        }
    ),
}


# One of each kind of attention and MLP, for what every batch has to get right.
KINDS = {
    "full attention": lambda: llama(),
    "windows": lambda: mistral(sliding_window=6),
    "windows in some layers": lambda: gemma3(sliding_window=11),
    "experts": lambda: qwen3_moe(),
}


def all_experts(**changes: Any) -> Any:
    """In bfloat16 another expert may be chosen, which is no small difference; here all are."""
    return qwen3_moe(num_experts=3, num_experts_per_tok=3, **changes)


def windowed(**changes: Any) -> Any:
    return mistral(sliding_window=21, **changes)


@pytest.fixture(scope="module", params=KINDS)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, ModelRunner]:
    model = KINDS[request.param]()
    return model, runner_of(model, tmp_path_factory.mktemp("tiny"))


def assert_close(ours: torch.Tensor, reference: torch.Tensor) -> None:
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, reference, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_transformers(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    runner = runner_of(model, tmp_path)
    tokens = random_tokens(200, runner.vocab, 1)
    reference = reference_logits(model, tokens)
    assert reference.std() > 0.5  # else closeness would mean nothing
    sequences = Sequences(runner, [tokens], 200)
    assert_close(sequences.step({0: 150}), reference[149:150])
    assert_close(sequences.step({0: 49}), reference[198:199])
    assert_close(sequences.step({0: 1}), reference[199:200])


@pytest.mark.parametrize("chunks", [[1] * 23, [23], [4, 4, 4, 4, 4, 3], [3, 1, 7, 1, 1, 5, 5], [22, 1], [1, 22]])
def test_any_chunking_of_a_prompt_gives_the_one_shot_logits(
    tiny: tuple[Any, ModelRunner], chunks: list[int]
) -> None:
    model, runner = tiny
    tokens = random_tokens(23, runner.vocab, 2)
    reference = reference_logits(model, tokens)
    sequences = Sequences(runner, [tokens], 23)
    done = 0
    for chunk in chunks:
        done += chunk
        assert_close(sequences.step({0: chunk}), reference[done - 1 : done])


def test_a_mixed_batch_gives_each_sequence_its_own_logits(tiny: tuple[Any, ModelRunner]) -> None:
    model, runner = tiny
    prompts = [random_tokens(100, runner.vocab, 10 + i) for i in range(6)]
    references = [reference_logits(model, prompt) for prompt in prompts]
    sequences = Sequences(runner, prompts, 100)
    done = [0] * 6
    for counts in [
        {0: 9, 1: 31},  # prefill
        {1: 1, 0: 1, 2: 40},  # decode beside prefill, in another order
        {2: 20, 0: 1, 3: 1, 1: 5},  # chunks with earlier context, a prompt of one token, decode between them
        {4: 3, 5: 2},
        {5: 1, 0: 1, 4: 1, 1: 1, 3: 1, 2: 1},  # decode alone, of unequal lengths
        {5: 1, 0: 1, 4: 1, 1: 1, 3: 1, 2: 1},
    ]:
        logits = sequences.step(counts)
        for row, (i, count) in enumerate(counts.items()):
            done[i] += count
            assert_close(logits[row], references[i][done[i] - 1])


def test_a_reused_prefix_gives_the_logits_of_computing_it(tiny: tuple[Any, ModelRunner]) -> None:
    model, runner = tiny
    first = random_tokens(50, runner.vocab, 30)
    second = first[:32] + random_tokens(18, runner.vocab, 31)
    sequences = Sequences(runner, [first, second], 50)
    sequences.step({0: 40})
    sequences.reuse(0, 1, 32)
    expected = [reference_logits(model, tokens) for tokens in (first, second)]
    logits = sequences.step({1: 15, 0: 9})
    assert_close(logits, torch.stack((expected[1][46], expected[0][48])))
    logits = sequences.step({0: 1, 1: 1})
    assert_close(logits, torch.stack((expected[0][49], expected[1][47])))


def test_decoding_in_several_groups_changes_nothing(
    tiny: tuple[Any, ModelRunner], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, runner = tiny
    prompts = [random_tokens(60, runner.vocab, 20 + i) for i in range(5)]
    lengths = {0: 3, 1: 50, 2: 7, 3: 48, 4: 21}
    monkeypatch.setattr(torch_backend, "PADDING_LIMIT", 5)
    sequences = Sequences(runner, prompts, 60)
    sequences.step(lengths)
    logits = sequences.step(dict.fromkeys(lengths, 1))
    for row, (i, length) in enumerate(lengths.items()):
        assert_close(logits[row], reference_logits(model, prompts[i])[length])


def test_groups_hold_everyone_once_within_their_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_backend, "PADDING_LIMIT", 100)
    monkeypatch.setattr(torch_backend, "GROUP_LIMIT", 2000)
    lengths = random_tokens(200, 900, 3)
    groups = torch_backend._grouped(list(range(0, 200, 2)), lengths)
    assert sorted(i for group in groups for i in group) == list(range(0, 200, 2))
    for group in groups:
        longest = max(lengths[i] for i in group)
        assert sum(longest - lengths[i] for i in group) <= 100
        assert longest * len(group) <= 2000 or len(group) == 1


def test_pages_of_others_are_neither_read_nor_written(tiny: tuple[Any, ModelRunner]) -> None:
    model, runner = tiny
    tokens = random_tokens(30, runner.vocab, 4)
    sequences = Sequences(runner, [tokens, tokens], 30)
    others = torch.ones(runner.pool.pages, dtype=torch.bool)
    others[sequences._pages.flatten()] = False
    before = runner.pool.tensor.clone()
    runner.pool.tensor[others] = float("nan")
    try:
        sequences.step({0: 20, 1: 5})
        logits = sequences.step({0: 1, 1: 1})
        reference = reference_logits(model, tokens)
        assert_close(logits, torch.stack((reference[20], reference[5])))
        assert runner.pool.tensor[others].isnan().all()
    finally:
        runner.pool.tensor.copy_(before)


@pytest.mark.parametrize("kind", [llama, qwen3])
def test_the_pool_holds_a_token_s_keys_where_the_layout_says(kind: Callable[[], Any], tmp_path: Path) -> None:
    model = kind()
    runner = runner_of(model, tmp_path)
    tokens = random_tokens(11, runner.vocab, 5)
    sequences = Sequences(runner, [tokens], 11)
    sequences.step({0: 11})
    with torch.no_grad():
        cache = model(torch.tensor([tokens]), use_cache=True).past_key_values
    for layer in range(runner.config.layers):
        for part, expected in enumerate((cache.layers[layer].keys[0], cache.layers[layer].values[0])):
            for j in range(11):
                held = runner.pool.tensor[sequences._pages[0, j // 4], layer, part, :, j % 4]
                torch.testing.assert_close(held, expected[:, j], atol=1e-4, rtol=0)


@pytest.mark.parametrize("page_size", [4, 16])  # which the CPU's kernels cannot and can read in place
@pytest.mark.parametrize("kind", [llama, windowed, qwen2, qwen3, all_experts, gemma3])
def test_bfloat16_stays_near_float32(kind: Callable[..., Any], page_size: int, tmp_path: Path) -> None:
    model = kind(num_attention_heads=8, head_dim=32, hidden_size=256, initializer_range=0.05)
    tokens = random_tokens(120, 151, 6)
    reference = reference_logits(model, tokens)
    runner = runner_of(model, tmp_path, dtype="bfloat16", page_size=page_size)
    assert runner.pool.tensor.dtype == torch.bfloat16
    sequences = Sequences(runner, [tokens], 120)
    rows = [sequences.step({0: 60}), sequences.step({0: 59}), sequences.step({0: 1})]
    with torch.no_grad():
        theirs = model.to(torch.bfloat16)(torch.tensor([tokens])).logits[0].float()
    for row, place in zip(rows, (59, 118, 119), strict=True):
        error = (row[0] - reference[place]).norm()
        assert error < 0.05 * reference[place].norm()
        assert error < 2 * (theirs[place] - reference[place]).norm()

"""While a model computes, what is known of its pages' digests is what is in them, and the logits stay the same."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sequences import Sequences, random_tokens
from tiny_models import llama, qwen3, runner_of

from kvasir_engine.cpu_kernels import unavailable_reason
from kvasir_engine.executor.model_runner import ModelRunner
from kvasir_engine.kv.digests import token_digests

if (reason := unavailable_reason()) is not None:
    pytest.skip(f"CPU kernels cannot run here: {reason}", allow_module_level=True)

SHAPE: dict[str, Any] = {"head_dim": 32, "hidden_size": 96, "vocab_size": 160, "intermediate_size": 112}
OPTIONS: dict[str, Any] = {"dtype": "bfloat16", "page_size": 16, "pages": 60}
KINDS = {"by graph": llama, "by kernels": qwen3}


def known_and_there(runner: ModelRunner) -> tuple[Any, Any]:
    assert runner.pool.digests is not None
    return runner.pool.digests.table, token_digests(runner.pool.tensor.view(torch.uint8).numpy())


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_that_end_anywhere_decoding_and_copies_are_known_as_they_are(kind: str, tmp_path: Path) -> None:
    choice, runner = random.Random(3), runner_of(KINDS[kind](**SHAPE), tmp_path, **OPTIONS)
    plain = ModelRunner(tmp_path, device="cpu", **OPTIONS)
    runner.keep_digests()
    prompts = [random_tokens(length, runner.vocab, length) for length in (5, 40, 110)]
    ours, theirs = (Sequences(each, prompts, 110) for each in (runner, plain))
    done = [0] * len(prompts)
    while unfinished := [i for i, prompt in enumerate(prompts) if done[i] < len(prompt)]:
        chosen = choice.sample(unfinished, choice.randint(1, len(unfinished)))
        counts = {i: min(len(prompts[i]) - done[i], choice.choice([1, 1, 9, 40])) for i in chosen}
        assert torch.equal(ours.step(counts), theirs.step(counts))
        for i, count in counts.items():
            done[i] += count
        known, there = known_and_there(runner)
        assert np.array_equal(known, np.where(known == 0, 0, there))
        assert (known != 0).all(1).sum() == sum(done), "every token that is computed is known, and no other"
    source, target = (int(page) for page in (known[:, 0] != 0).sum(1).argsort()[[-1, 0]])
    runner.copy_page(source, target)
    known, there = known_and_there(runner)
    assert known[target].all()
    assert np.array_equal(known, np.where(known == 0, 0, there))


def test_pages_that_are_written_again_are_known_anew(tmp_path: Path) -> None:
    runner = runner_of(llama(**SHAPE), tmp_path, **OPTIONS)
    runner.keep_digests()
    for seed in (1, 2):
        Sequences(runner, [random_tokens(37, runner.vocab, seed)], 48).step({0: 37})
    known, there = known_and_there(runner)
    assert (known != 0).all(1).sum() == 37
    assert np.array_equal(known, np.where(known == 0, 0, there))


def test_where_torch_stores_kv_nothing_is_known(tmp_path: Path) -> None:
    runner = runner_of(llama(**SHAPE), tmp_path, **{**OPTIONS, "dtype": "float32"})
    runner.keep_digests()
    assert runner.pool.digests is None

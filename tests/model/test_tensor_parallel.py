"""Models divided among real rank processes over gloo, against transformers' whole ones."""

import json
import queue
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sequences import Sequences, random_tokens
from test_gpu_launch import device, generate
from tiny_models import gemma3, llama, mistral, qwen2, qwen3, qwen3_moe, reference_logits, runner_of

from kvasir_engine.cpu_kernels import unavailable_reason
from kvasir_engine.errors import ModelError
from kvasir_engine.executor import rank_protocol
from kvasir_engine.executor.gpu_launcher import GpuLauncher
from kvasir_engine.executor.model_runner import ModelRunner
from kvasir_engine.executor.rank_protocol import StepFrame
from kvasir_engine.forward_batch import ForwardBatch
from kvasir_engine.model import tensor_parallel
from kvasir_engine.model.layers.basic import Head
from kvasir_engine.model.models.registry import parse_config
from kvasir_engine.model.tensor_parallel import Shard, shard

RANK_PROCESS = Path(__file__).with_name("rank_process.py")
EVEN = {"vocab_size": 152}
BFLOAT16 = "llama in bfloat16"

# A prompt in chunks, beside another that is decoded, and both decoded together.
STEPS: list[dict[int, int]] = [{0: 40}, {0: 20, 1: 9}, {1: 1, 0: 33}, {0: 1, 1: 1}, {1: 1, 0: 1}]

MODELS: dict[str, tuple[int, Callable[[], Any]]] = {
    "llama": (2, lambda: llama(**EVEN)),
    "llama, tied embeddings": (2, lambda: llama(**EVEN, tie_word_embeddings=True)),
    "llama, a KV head on two ranks": (2, lambda: llama(**EVEN, num_key_value_heads=1)),
    "mistral": (2, lambda: mistral(**EVEN, sliding_window=30)),
    "qwen2": (2, lambda: qwen2(**EVEN)),
    "qwen3": (2, lambda: qwen3(**EVEN)),
    "qwen3 moe": (2, lambda: qwen3_moe(**EVEN, mlp_only_layers=[1])),
    "gemma 3": (2, lambda: gemma3(**EVEN)),
    BFLOAT16: (
        2,
        lambda: llama(**EVEN, num_attention_heads=8, head_dim=32, hidden_size=256, initializer_range=0.05),
    ),
    "llama, three ranks": (3, lambda: llama(vocab_size=153, num_key_value_heads=3)),
    "llama, four ranks, two to each KV head": (4, lambda: llama(**EVEN, num_attention_heads=8)),
}
ON_TWO = [name for name, (size, _) in MODELS.items() if size == 2 and name != BFLOAT16]
ON_MORE = [name for name, (size, _) in MODELS.items() if size > 2]


@dataclass(frozen=True)
class Divided:
    """A model on several ranks: what transformers says after each of STEPS [sequences, vocab], and each rank."""

    folder: Path
    expected: list[torch.Tensor]
    logits: list[list[torch.Tensor]]
    kv_heads: list[int]


def run_ranks(folder: Path, size: int, jobs: list[dict[str, Any]]) -> list[list[Any]]:
    """What each of `size` rank processes says of each job."""
    folder.mkdir()
    work = folder / "work.json"
    work.write_text(json.dumps(jobs))
    ranks = [
        subprocess.Popen(
            [sys.executable, RANK_PROCESS, str(rank), str(size), f"file://{folder}/meeting", work],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        said = [rank.communicate(timeout=240)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert [rank.returncode for rank in ranks] == [0] * size, "\n".join(said)
    return [torch.load(folder / f"logits-{rank}.pt", weights_only=True) for rank in range(size)]


def divide(root: Path, size: int) -> dict[str, Divided]:
    """Those of MODELS that go on `size` ranks, through the same processes: their start takes most of the time."""
    names = [name for name in MODELS if MODELS[name][0] == size]
    models = [MODELS[name][1]() for name in names]
    jobs = []
    for number, (name, model) in enumerate(zip(names, models, strict=True)):
        model.save_pretrained(root / str(number))
        job = {"folder": str(root / str(number)), "dtype": "bfloat16" if name == BFLOAT16 else "float32"}
        jobs.append({**job, "prompts": prompts_of(model), "steps": STEPS, "most_tokens": 96})
    ranks = run_ranks(root / "ranks", size, jobs)
    return {
        name: Divided(
            root / str(i), expected_logits(model), [rank[i][1] for rank in ranks], [rank[i][0] for rank in ranks]
        )
        for i, (name, model) in enumerate(zip(names, models, strict=True))
    }


@pytest.fixture(scope="module")
def on_two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Divided]:
    return divide(tmp_path_factory.mktemp("two"), 2)


def prompts_of(model: Any) -> list[list[int]]:
    return [random_tokens(95, model.config.vocab_size, seed) for seed in (1, 2)]


def expected_logits(model: Any) -> list[torch.Tensor]:
    whole = [reference_logits(model, prompt) for prompt in prompts_of(model)]
    done, expected = [0, 0], []
    for step in STEPS:
        for i, count in step.items():
            done[i] += count
        expected.append(torch.stack([whole[i][done[i] - 1] for i in step]))
    return expected


def assert_whole(model: Divided) -> None:
    assert model.expected[0].std() > 0.5  # else closeness would mean nothing
    for theirs, first, *others in zip(model.expected, *model.logits, strict=True):
        torch.testing.assert_close(first, theirs, atol=1e-4, rtol=0)
        assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("name", ON_TWO)
def test_both_ranks_have_the_whole_model_s_logits(name: str, on_two: dict[str, Divided]) -> None:
    assert len(on_two[name].logits) == 2
    assert on_two[name].kv_heads == [1, 1]
    assert_whole(on_two[name])


@pytest.mark.soak
@pytest.mark.parametrize("name", ON_MORE)
def test_three_and_four_ranks_have_the_whole_model_s_logits(name: str, tmp_path: Path) -> None:
    size = MODELS[name][0]
    model = divide(tmp_path, size)[name]
    assert model.kv_heads == [1] * size
    assert_whole(model)


def test_bfloat16_ranks_stay_as_near_to_float32_as_one_process(on_two: dict[str, Divided]) -> None:
    model = on_two[BFLOAT16]
    alone = ModelRunner(model.folder, dtype="bfloat16", device="cpu", page_size=4, pages=128)
    sequences = Sequences(alone, [random_tokens(95, 152, seed) for seed in (1, 2)], 96)
    one = [sequences.step(step) for step in STEPS]
    for theirs, whole, first, second in zip(model.expected, one, *model.logits, strict=True):
        assert torch.equal(first, second)
        assert (first - theirs).norm() < 1.5 * (whole - theirs).norm()
        assert (first - theirs).norm() < 0.03 * theirs.norm()


@pytest.mark.skipif(unavailable_reason() is not None, reason=f"CPU kernels cannot run here: {unavailable_reason()}")
def test_two_deterministic_ranks_have_the_same_bits_in_any_batch(tmp_path: Path) -> None:
    model = llama(vocab_size=160, head_dim=32, num_attention_heads=4, intermediate_size=96)
    model.save_pretrained(tmp_path / "model")
    job = {"folder": str(tmp_path / "model"), "dtype": "bfloat16", "deterministic": True, "most_tokens": 96}
    alone = [{i: count} for i in (0, 1) for step in STEPS for j, count in step.items() if j == i]
    whole = [{0: 95}, {1: 12}]
    jobs = [{**job, "prompts": prompts_of(model), "steps": steps} for steps in (STEPS, alone, whole)]
    found: list[dict[tuple[int, int], torch.Tensor]] = []
    for (_, logits), (_, others), each in zip(*run_ranks(tmp_path / "ranks", 2, jobs), jobs, strict=True):
        done, places = [0, 0], {}
        for step, one, other in zip(each["steps"], logits, others, strict=True):
            assert torch.equal(one, other)
            for row, (i, count) in enumerate(step.items()):
                done[i] += count
                places[i, done[i]] = one[row]
        found.append(places)
    assert found[0].keys() == found[1].keys()
    assert found[2].keys() <= found[0].keys()
    for others in found[1:]:
        assert all(torch.equal(found[0][place], bits) for place, bits in others.items())


class TwoThreads:
    """A Group of two threads."""

    size = here = 2

    def __init__(self, rank: int, barrier: threading.Barrier, shared: list[torch.Tensor]) -> None:
        self.rank, self._barrier, self._shared = rank, barrier, shared

    def _exchange(self, x: torch.Tensor) -> list[torch.Tensor]:
        self._shared[self.rank] = x.clone()
        self._barrier.wait(60)
        both = list(self._shared)
        self._barrier.wait(60)
        return both

    def loaded(self) -> None:
        self._barrier.wait(60)

    def all_reduce(self, x: torch.Tensor) -> None:
        x.copy_(sum(self._exchange(x)))

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat(self._exchange(x), -1)

    def broadcast(self, x: torch.Tensor) -> None:
        x.copy_(self._exchange(x)[0])


def test_a_head_on_two_ranks_tells_apart_what_bfloat16_makes_equal() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5000, 64, generator=generator).bfloat16()
    x = torch.randn(400, 64, generator=generator) * 4
    x[7] = 0  # all are equal: too many to compute again
    barrier, shared = threading.Barrier(2), [torch.empty(0)] * 2
    heads = [Head(weight[rank * 2500 :][:2500], TwoThreads(rank, barrier, shared)) for rank in range(2)]
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda head: head(x), heads)
    assert torch.equal(first, second)
    exact = F.linear(x, weight.float())
    torch.testing.assert_close(first, exact, atol=0.5, rtol=0.02)
    plain = F.linear(x.bfloat16(), weight)
    wrong = int((plain.argmax(-1) != exact.argmax(-1)).sum())
    assert wrong > 4
    assert int((first.argmax(-1) != exact.argmax(-1)).sum()) < wrong / 4


def test_rivals_are_told_apart_alike_without_a_wait_when_two_ranks_have_the_vocabulary() -> None:
    torch.manual_seed(0)
    weight = torch.randn(200, 64).bfloat16()
    weight[[98, 99, 100, 101]] = weight[7] * 1.001  # next to equal, on both
    x = torch.randn(5, 64)
    x[2] = weight[7].float()
    rough = F.linear(x.bfloat16(), weight).float()
    right = rough.clone()
    Head(weight).settle_queued(x, right)
    assert not torch.equal(rough, right)
    barrier, shared = threading.Barrier(2), [torch.empty(0)] * 2
    heads = [Head(part, TwoThreads(rank, barrier, shared)) for rank, part in enumerate(weight.chunk(2))]
    ours = [rough.clone(), rough.clone()]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda head, logits: head.settle_queued(x, logits), heads, ours))
    assert torch.equal(ours[0], ours[1])
    torch.testing.assert_close(ours[0], right)
    assert torch.equal(ours[0].argmax(-1), right.argmax(-1))


def test_steps_launched_ahead_on_two_ranks_read_on_each_what_rank_0_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    model = llama(vocab_size=152, num_attention_heads=4)
    right = generate(runner_of(model, tmp_path).launch, ahead=False)
    barrier, shared = threading.Barrier(2), [torch.empty(0)] * 2
    steps: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    pools: list[torch.Tensor] = [torch.empty(0)] * 2

    def runner(rank: int) -> ModelRunner:
        group = TwoThreads(rank, barrier, shared)
        made = ModelRunner(tmp_path, dtype="float32", device="cpu", page_size=4, pages=256, group=group)
        event = device([0.0])[1]
        made._launcher = GpuLauncher(
            made._model,
            made._attention,
            made.device,
            made.config.layers,
            event,
            group=group,  # type: ignore[arg-type]
        )
        pools[rank] = made.pool.tensor
        return made

    def leader() -> dict[int, list[int]]:
        made = runner(0)

        def launch(batch: ForwardBatch, places: list[int], requests: Any) -> Any:
            steps.put(rank_protocol.encode(StepFrame.of(batch, [], [], len(places))))
            return made.launch(batch, places, requests)

        tokens = generate(launch, ahead=True)
        steps.put(None)
        return tokens

    def follower() -> int:
        made, count = runner(1), 0
        while (data := steps.get(timeout=60)) is not None:
            step = rank_protocol.decode_to_main(data)
            assert isinstance(step, StepFrame)
            count += len(step.awaited)
            made.follow(step.batch(), step.sampled)
        return count

    with ThreadPoolExecutor(2) as pool:
        ours, awaited = pool.submit(leader), pool.submit(follower)
        assert ours.result(60) == right
        assert awaited.result(60) == 5
    assert all(pool.isfinite().all() for pool in pools)


def test_ranks_wait_for_one_another_to_load_longer_than_for_anything_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_parallel, "CONNECT_SECONDS", 0.01)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: None)
    store = torch.distributed.HashStore()
    store.set_timeout(timedelta(seconds=0.01))
    first, second = (
        tensor_parallel.Ranks(rank, 2, "file:///nowhere", torch.device("cpu"), 1, store) for rank in range(2)
    )
    for _ in range(2):  # of two models, one after the other
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(first.loaded)
            with pytest.raises(TimeoutError):
                waiting.result(0.1)
            second.loaded()
            waiting.result(60)


class Slow:
    """A group of one that says when its ranks have loaded."""

    rank, size, here = 0, 1, 1

    def __init__(self) -> None:
        self.said: list[str] = []

    def loaded(self) -> None:
        self.said.append("loaded")

    def all_reduce(self, x: torch.Tensor) -> None:
        self.said.append("reduce")

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        self.said.append("gather")
        return x


def test_the_first_exchange_is_when_all_have_loaded(tmp_path: Path) -> None:
    llama(**EVEN).save_pretrained(tmp_path)
    group = Slow()
    ModelRunner(tmp_path, dtype="float32", device="cpu", kv_memory=1 << 20, group=group)
    assert group.said[:2] == ["loaded", "gather"]


def test_a_rank_whose_peers_do_not_come_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_parallel, "CONNECT_SECONDS", 0.2)
    with pytest.raises(ModelError, match=r"rank 0 of 2 cannot connect to the others at file://.*/meeting"):
        tensor_parallel.Ranks(0, 2, f"file://{tmp_path}/meeting", torch.device("cpu"))


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

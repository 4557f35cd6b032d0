"""Decode steps replayed from what was captured, padded, on tensors that stay, beside the same computed anew."""

import random
from pathlib import Path
from typing import Any

import fake_flashinfer
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from recorded import Recorder, Recording
from sequences import random_tokens
from test_gpu_launch import device
from tiny_models import gemma3, llama, qwen3_moe, runner_of

from kvasir_engine.attention.base import AttentionSpec
from kvasir_engine.attention.flashinfer_backend import FlashInferBackend
from kvasir_engine.config import EngineConfig
from kvasir_engine.core.engine import Engine
from kvasir_engine.core.metrics import EngineCollector
from kvasir_engine.core.scheduler import Limits
from kvasir_engine.errors import ModelError
from kvasir_engine.executor.cuda_graphs import DecodeGraphs, capture_sizes, why_not
from kvasir_engine.executor.gpu_launcher import GpuLauncher
from kvasir_engine.executor.model_runner import ModelRunner
from kvasir_engine.forward_batch import ForwardBatch, decodes_only, padded
from kvasir_engine.kv.pool import KVPool, PoolShape
from kvasir_engine.protocol import Delta, Role, Sampling, Submit
from kvasir_engine.sampling.sampler import SampleRequest

CPU = torch.device("cpu")
SIZES = [1, 2, 4, 7]
PAGES = 64
KINDS = {"llama": llama, "gemma3": gemma3}  # one window for all layers, and two


# -- which sizes, and how a batch is padded


@given(st.integers(1, 2000))
def test_every_batch_up_to_the_largest_has_a_size_that_is_not_much_larger(most: int) -> None:
    sizes = capture_sizes(most)
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == most
    for count in range(1, most + 1):
        size = next(size for size in sizes if size >= count)
        assert size - count < max(count, 1) if count <= 8 else size - count < 16


def test_sizes_are_the_fields() -> None:
    assert capture_sizes(1) == [1]
    assert capture_sizes(3) == [1, 2, 3]
    assert capture_sizes(24) == [1, 2, 4, 8, 16, 24]
    assert capture_sizes(300)[-6:] == [240, 248, 256, 272, 288, 300]
    assert len(capture_sizes(512)) == 51
    assert capture_sizes(1024)[-2:] == [1008, 1024]


def decode_batch() -> ForwardBatch:
    table = torch.tensor([[3, 1, 0], [5, 6, 7]])
    return ForwardBatch(torch.tensor([8, 0]), torch.tensor([5, 11]), [1, 1], [6, 12], table, ((1, 4),))


def test_padding_adds_first_tokens_in_the_scratch_page_and_leaves_the_rest_as_it_is() -> None:
    whole = padded(decode_batch(), 4, 9)
    assert whole.tokens.tolist() == [8, 0, 0, 0]
    assert whole.positions.tolist() == [5, 11, 0, 0]
    assert (whole.query_lens, whole.context_lens) == ([1] * 4, [6, 12, 1, 1])
    assert whole.page_table.tolist() == [[3, 1, 0], [5, 6, 7], [9, 9, 9], [9, 9, 9]]
    assert whole.awaited == ((1, 4),)
    batch = decode_batch()
    assert padded(batch, 2, 9) is batch


def test_only_steps_of_one_new_token_a_sequence_are_decodes() -> None:
    batch = decode_batch()
    assert decodes_only(batch)
    chunk = ForwardBatch(torch.zeros(3), torch.tensor([0, 1, 2]), [1, 2], [1, 3], torch.zeros(2, 1))
    assert not decodes_only(chunk)


# -- replays beside steps computed anew


class Graphed:
    """A small model on the CPU whose launcher replays what was recorded."""

    def __init__(self, kind: str, folder: Path, sizes: list[int] = SIZES, pages: int = PAGES) -> None:
        self.plain = runner_of(KINDS[kind](), folder, pages=pages)
        self.runner = runner = ModelRunner(folder, dtype="float32", device="cpu", page_size=4, pages=1)
        runner.pool = KVPool(runner.pool.shape, pages, CPU, scratch=True)
        config = runner.config
        spec = AttentionSpec(config.heads, config.attention_scale, config.windows)
        self.attention = FlashInferBackend(runner.pool, spec, fake_flashinfer, 16)
        self.recorder = Recorder()
        self.waited: list[int] = []
        self.told: list[tuple[str, int, int]] = []
        self.graphs = DecodeGraphs(
            runner._model,
            self.attention,
            CPU,
            sizes,
            runner.vocab,
            config.max_positions,
            self.recorder,
            lambda: self.waited.append(len(self.recorder.recordings)),
            lambda *said: self.told.append(said),
        )
        self.event = device([0.0])[1]
        runner._launcher = GpuLauncher(
            runner._model,
            self.attention,
            CPU,
            config.layers,
            self.event,  # type: ignore[arg-type]
            self.graphs,
        )


@pytest.fixture(scope="module", params=list(KINDS))
def graphed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Graphed:
    return Graphed(request.param, tmp_path_factory.mktemp(request.param))


class Schedule:
    """Sequences that come, are computed in batches of any order, and go; whose pages others get then."""

    def __init__(self, seed: int, pages: int, vocab: int, most: int) -> None:
        self._choice, self._most, self._vocab = random.Random(seed), most, vocab
        self._free = list(range(pages))
        self.running: dict[int, tuple[list[int], int, list[int]]] = {}  # tokens, how many computed, pages
        self._count = 0

    def batch(self) -> ForwardBatch:
        choice = self._choice
        while len(self.running) < choice.randint(1, self._most):
            tokens = random_tokens(choice.randint(1, 30), self._vocab, self._count)
            pages = [self._free.pop(choice.randrange(len(self._free))) for _ in range(8)]
            self.running[self._count] = (tokens, 0 if choice.random() < 0.5 else len(tokens) - 1, pages)
            self._count += 1
        if choice.random() < 0.3:  # it is aborted
            gone = choice.choice(list(self.running))
            self._free += self.running.pop(gone)[2]
        if not self.running:
            return self.batch()
        rows = choice.sample(list(self.running), choice.randint(1, len(self.running)))
        decode = choice.random() < 0.8
        tokens, positions, counts, contexts, table = [], [], [], [], []
        for row in rows:
            known, done, pages = self.running[row]
            done = min(done, 30)
            count = 1 if decode else min(3, max(1, len(known) - done))
            tokens += [*known, *[5] * 34][done : done + count]
            positions += range(done, done + count)
            counts.append(count)
            contexts.append(done + count)
            table.append(pages)
            self.running[row] = (known, min(done + count, 30), pages)
        widest = max(-(-length // 4) for length in contexts)
        return ForwardBatch(
            torch.tensor(tokens),
            torch.tensor(positions),
            counts,
            contexts,
            torch.tensor(table)[:, :widest],
        )


@pytest.mark.parametrize("seed", range(3))
def test_logits_and_kv_of_replayed_steps_are_those_of_steps_computed_anew(graphed: Graphed, seed: int) -> None:
    launcher, pool = graphed.runner._launcher, graphed.runner.pool
    assert launcher is not None
    start = torch.randn(pool.tensor.shape, generator=torch.Generator().manual_seed(seed))
    pool.tensor.copy_(start)
    graphed.plain.pool.tensor.copy_(start[:PAGES])
    schedule, kinds = Schedule(seed, PAGES, graphed.runner.vocab, SIZES[-1]), set()
    for _ in range(25):
        batch = schedule.batch()
        with torch.inference_mode():
            prepared = launcher.prepare(batch)
            ours = prepared.compute()
        assert prepared.replayed == decodes_only(batch)
        kinds.add((prepared.replayed, len(batch.query_lens)))
        torch.testing.assert_close(ours, graphed.plain.forward(batch), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(pool.tensor[:PAGES], graphed.plain.pool.tensor, rtol=1e-4, atol=1e-4)
    replayed = {count for was, count in kinds if was}
    assert len(replayed) > 3
    assert replayed - set(SIZES), "no batch was padded"


def test_padding_writes_into_the_scratch_page_only(graphed: Graphed) -> None:
    launcher, pool = graphed.runner._launcher, graphed.runner.pool
    assert launcher is not None
    pool.tensor.fill_(0.25)
    before = pool.tensor.clone()
    table = torch.tensor([[3, 1], [5, 6], [7, 8], [9, 10], [11, 12]])
    batch = ForwardBatch(torch.arange(5), torch.full((5,), 6), [1] * 5, [7] * 5, table)
    with torch.inference_mode():
        assert launcher.prepare(batch).compute().shape == (5, graphed.runner.vocab)
    changed = (pool.tensor != before).flatten(3).any(-1)  # [pages, layers, 2]
    assert changed[:PAGES].any(-1).any(-1).nonzero().flatten().tolist() == [1, 6, 8, 10, 12]
    assert bool(changed[pool.scratch].all())
    for page in (1, 6, 8, 10, 12):
        assert not (pool.tensor[page] != before[page])[:, :, :, [0, 1, 3]].any()  # the other slots of the page


def test_a_step_reads_nothing_but_what_it_read_when_it_was_captured(graphed: Graphed) -> None:
    """Whatever is made for one step alone has another address at the next."""
    schedule = Schedule(11, PAGES, graphed.runner.vocab, SIZES[-1])
    seen = 0
    captured = dict(zip(reversed(SIZES), graphed.recorder.recordings, strict=True))
    while seen < 12:
        batch = schedule.batch()
        if not decodes_only(batch):
            continue
        seen += 1
        size = next(size for size in SIZES if size >= len(batch.query_lens))
        with torch.inference_mode():
            graphed.graphs.stage(batch, None)
            with Recording() as now:
                graphed.graphs._forward(size)
        right = captured[size]
        # The row of 0, 1, 2, ... is a wrapper's own and never changes; the one that was captured is read.
        fresh = [tensor for at, tensor in now.given().items() if at not in right.given()]
        assert all(torch.equal(tensor, torch.arange(size + 1)) for tensor in fresh), fresh
        assert [func for func, *_ in now.calls] == [func for func, *_ in right.calls]


def test_the_largest_is_captured_first_and_each_is_told_of(graphed: Graphed) -> None:
    assert graphed.told == [("capture", i, len(SIZES)) for i in range(1, len(SIZES) + 1)]
    embeddings = [
        next(args for func, args, *_ in recording.calls if func is torch.ops.aten.embedding.default)
        for recording in graphed.recorder.recordings
    ]
    assert [len(tokens) for _, tokens in embeddings] == SIZES[::-1]
    assert graphed.waited == [0], "ranks wait for one another before the first exchange, and once"


def test_what_is_told_of_its_layers_or_is_too_large_is_not_replayed(graphed: Graphed) -> None:
    launcher, before = graphed.runner._launcher, graphed.recorder.replays
    assert launcher is not None
    batch = ForwardBatch(torch.tensor([4]), torch.tensor([0]), [1], [1], torch.tensor([[2]]))
    heard: list[int] = []
    step = launcher.launch(batch, [0], [SampleRequest(Sampling(9), 1)], heard.append)
    step.wait()
    assert (step.replayed, heard) == (False, list(range(graphed.runner.config.layers)))
    many = ForwardBatch(torch.ones(8).long(), torch.zeros(8).long(), [1] * 8, [1] * 8, torch.arange(8)[:, None])
    assert not launcher.launch(many, [], []).replayed
    assert graphed.recorder.replays == before
    assert launcher.launch(batch, [0], [SampleRequest(Sampling(9), 1)]).replayed


def run_engine(runner: ModelRunner, overlap: bool, seed: int) -> tuple[dict[str, list[int]], Engine]:
    """Requests of all kinds come to an engine, and some are aborted in between; their tokens."""
    choice = random.Random(seed)
    engine = Engine(runner, "both", Limits(40, 6, 4), 60, 1, None, overlap=overlap)
    tokens: dict[str, list[int]] = {}
    waiting = []
    for i in range(14):
        sampling = Sampling(choice.randint(1, 12), temperature=choice.choice([0.0, 1.0]), top_p=0.9, seed=i)
        waiting.append(Submit(str(i), random_tokens(choice.randint(1, 20), runner.vocab, i), sampling))
    aborts = {str(i): choice.randint(1, 6) for i in range(0, 14, 4)}
    steps = 0
    while waiting or engine.busy:
        if waiting and choice.random() < 0.5:
            engine.submit(1, waiting.pop(0))
        engine.step()
        engine.check()
        steps += 1
        for delta in engine.drain().get(1, []):
            assert isinstance(delta, Delta)
            assert delta.failure is None
            tokens.setdefault(delta.id, []).extend(delta.tokens)
            if aborts.get(delta.id, 99) <= len(tokens[delta.id]):
                engine.abort(1, delta.id)
        assert steps < 1000
    return tokens, engine


@pytest.mark.parametrize("overlap", [False, True])
def test_an_engine_generates_the_same_tokens_by_graphs_also_when_requests_are_aborted(
    graphed: Graphed, overlap: bool
) -> None:
    right, plain = run_engine(graphed.plain, False, 3)
    ours, engine = run_engine(graphed.runner, overlap, 3)
    assert set(ours) == set(right)
    for request, tokens in right.items():
        both = min(len(tokens), len(ours[request]))  # an aborted one may have got a token more
        assert ours[request][:both] == tokens[:both]
        assert both > 0
    assert engine.stats.replayed_steps > 10
    assert engine.stats.eager_steps > 3
    exported = next(each for each in EngineCollector(engine).collect() if each.name == "kvasir_steps")
    assert {sample.labels["mode"]: sample.value for sample in exported.samples} == {
        "graph": engine.stats.replayed_steps,
        "eager": engine.stats.eager_steps,
    }
    assert (plain.stats.replayed_steps, plain.stats.eager_steps > 10) == (0, True)


# -- FlashInfer's wrappers


def test_two_steps_that_follow_each_other_plan_by_different_wrappers_into_the_same_memory(graphed: Graphed) -> None:
    graphs = graphed.attention._graphs
    assert graphs is not None
    batch = padded(decode_batch(), 2, PAGES)
    for size in SIZES:
        for planned in graphs._planned[size].values():
            first, second = planned.wrappers
            assert first is not second
            assert [a.data_ptr() for a in first._buffers[1:]] == [b.data_ptr() for b in second._buffers[1:]]
            assert first._schedule.data_ptr() == second._schedule.data_ptr()
    windows = list(graphs._planned[2].values())
    assert len({each.wrappers[0]._schedule.data_ptr() for each in windows}) == len(windows)
    before = [[wrapper.plans for wrapper in each.wrappers] for each in windows]
    for _ in range(2):
        graphed.attention.plan_graph(batch)
    assert [[wrapper.plans for wrapper in each.wrappers] for each in windows] == [
        [count + 1 for count in counts] for counts in before
    ]


def test_a_schedule_that_a_captured_graph_would_not_follow_is_an_error(graphed: Graphed) -> None:
    graphs = graphed.attention._graphs
    assert graphs is not None
    planned = next(iter(graphs._planned[2].values()))
    layout, planned.layout = planned.layout, [0]
    with pytest.raises(RuntimeError, match="schedules of one batch size differ"):
        graphed.attention.plan_graph(padded(decode_batch(), 2, PAGES))
    planned.layout = layout


# -- what cannot be captured


def test_memory_that_is_lacking_is_said_in_one_line_with_the_flags(tmp_path: Path) -> None:
    graphed = Graphed("llama", tmp_path, [1, 2])

    def record(work: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")

    with pytest.raises(ModelError) as caught:
        DecodeGraphs(graphed.runner._model, graphed.attention, CPU, [1, 2], 151, 512, record, lambda: None)
    assert str(caught.value) == (
        "cannot capture the CUDA graph of 2 sequences: CUDA out of memory. Tried to allocate 2 GiB.; "
        "lower --kv-cache-memory, lower --cuda-graph-max-bs, or use --enforce-eager"
    )


def test_models_and_backends_that_wait_for_the_device_are_named(tmp_path: Path) -> None:
    graphed = Graphed("llama", tmp_path, [1])
    assert why_not(graphed.attention, graphed.runner._model) is None
    assert "attention by torch" in str(why_not(graphed.plain._attention, graphed.runner._model))
    experts = runner_of(qwen3_moe(), tmp_path / "moe")
    assert "mixture of experts" in str(why_not(graphed.attention, experts._model))
    assert graphed.plain.no_graphs == "there are none on cpu"


def test_graphs_are_as_large_as_a_batch_can_be_unless_another_size_is_asked_for() -> None:
    def largest(role: Role, **options: Any) -> int:
        return EngineConfig("file:///model", role=role, **options).largest_graph

    assert largest("decode", max_running=70) == 70
    assert largest("both", max_running=1700) == 1024
    assert largest("both", max_running=700, cuda_graph_max_bs=600) == 600
    assert largest("both", cuda_graph_max_bs=8) == 8
    assert largest("both", enforce_eager=True) == largest("prefill") == 0
    with pytest.raises(ModelError, match="cuda-graph-max-bs 8: a prefill worker's steps are no CUDA graphs"):
        largest("prefill", cuda_graph_max_bs=8)


def test_a_pool_with_a_scratch_page_has_one_page_more_than_it_gives_out() -> None:
    shape = PoolShape.uniform(1, 1, 8, 4, torch.float32)
    pool = KVPool(shape, 3, CPU, scratch=True)
    assert (pool.pages, pool.scratch, len(pool.tensor)) == (3, 3, 4)
    assert KVPool(shape, 3, CPU).scratch is None

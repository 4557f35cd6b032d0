"""What the FlashInfer backend asks of FlashInfer: against a stand-in, and on a GPU the real one."""

import inspect
import re

import fake_flashinfer
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvasir_engine.attention import flashinfer_backend
from kvasir_engine.attention.base import AttentionSpec
from kvasir_engine.attention.flashinfer_backend import FlashInferBackend, unsupported
from kvasir_engine.attention.paged import decoding, paged_rows, slots
from kvasir_engine.attention.registry import choose_backend, refuse_missing
from kvasir_engine.attention.torch_backend import TorchBackend
from kvasir_engine.errors import ModelError
from kvasir_engine.forward_batch import ForwardBatch
from kvasir_engine.kv.pool import KVPool, PoolShape

CPU = torch.device("cpu")


@st.composite
def batches(draw: st.DrawFn) -> tuple[ForwardBatch, int]:
    """A batch over pages in random order, decodes mostly first, and its page size."""
    size = draw(st.sampled_from([1, 3, 4, 16]))
    lens = draw(
        st.lists(st.tuples(st.sampled_from([1, 1, 1, 2, 5, 17]), st.integers(0, 40)), min_size=1, max_size=6)
    )
    if draw(st.booleans()):
        lens.sort(key=lambda pair: pair[0] != 1)
    context = [new + before for new, before in lens]
    pages = [-(-length // size) for length in context]
    numbers = draw(st.permutations(range(sum(pages) + 2)))
    table, width = [], max(pages)
    for count in pages:
        table.append([*numbers[:count], *[0] * (width - count)])
        numbers = numbers[count:]
    positions = [torch.arange(length - new, length) for (new, _), length in zip(lens, context, strict=True)]
    new = [count for count, _ in lens]
    return ForwardBatch(torch.zeros(sum(new)), torch.cat(positions), new, context, torch.tensor(table)), size


@settings(max_examples=30, deadline=None)
@given(batches())
def test_the_arrays_name_every_token_of_every_sequence_in_order(case: tuple[ForwardBatch, int]) -> None:
    batch, size = case
    first = decoding(batch)
    assert batch.query_lens[:first] == [1] * first
    assert first == len(batch.query_lens) or batch.query_lens[first] > 1
    for sequences in (range(first), range(first, len(batch.query_lens))):
        rows = paged_rows(batch, size, sequences)
        for place, i in enumerate(sequences):
            begin, end = rows.kv_indptr[place : place + 2].tolist()
            assert rows.kv_indices[begin:end].tolist() == batch.page_table[i, : end - begin].tolist()
            assert (end - begin - 1) * size + int(rows.kv_last_page_len[place]) == batch.context_lens[i]
            assert int(rows.qo_indptr[place + 1] - rows.qo_indptr[place]) == batch.query_lens[i]
    where, start = slots(batch, size).tolist(), 0
    for i, (new, context) in enumerate(zip(batch.query_lens, batch.context_lens, strict=True)):
        for place, position in enumerate(range(context - new, context), start):
            assert where[place] == int(batch.page_table[i, position // size]) * size + position % size
        start += new


def pool_of(pages: int, size: int, layers: int = 2, dtype: torch.dtype = torch.float32) -> KVPool:
    pool = KVPool(PoolShape.uniform(layers, 2, 8, size, dtype), pages, CPU)
    pool.tensor.normal_(generator=torch.Generator().manual_seed(1))
    return pool


@settings(max_examples=30, deadline=None)
@given(batches(), st.sampled_from([None, 1, 5, 100]), st.sampled_from([2, 6]))
def test_attention_and_what_is_written_are_the_torch_backends(
    case: tuple[ForwardBatch, int], window: int | None, heads: int
) -> None:
    batch, size = case
    pages = int(batch.page_table.max()) + 2
    spec = AttentionSpec(heads, 0.3, (window, None))
    pools = [pool_of(pages, size) for _ in range(2)]
    right, ours = TorchBackend(pools[0], spec), FlashInferBackend(pools[1], spec, fake_flashinfer, 16)
    right.plan(batch)
    ours.plan(batch)
    count = len(batch.positions)
    qkv = torch.randn(2, count, heads + 4, 8, generator=torch.Generator().manual_seed(2))
    for layer in range(2):
        q, k, v = torch.split(qkv[layer], [heads, 2, 2], 1)
        torch.testing.assert_close(ours.run(layer, q, k, v), right.run(layer, q, k, v), rtol=2e-5, atol=2e-5)
    assert torch.equal(pools[0].tensor, pools[1].tensor)


def test_two_plans_that_follow_each_other_use_different_wrappers() -> None:
    backend = FlashInferBackend(pool_of(4, 4), AttentionSpec(2, 1.0, (None, 3)), fake_flashinfer, 16)
    batch = ForwardBatch(torch.zeros(1), torch.tensor([2]), [1], [3], torch.tensor([[1]]))
    for steps in range(1, 6):
        backend.plan(batch)
        plans = [[wrappers.decode.plans for wrappers in each.values()] for each in backend._sets]
        assert sorted(plans) == sorted([[steps // 2] * 2, [steps - steps // 2] * 2])


def test_flashinfer_is_refused_in_one_line_where_it_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelError, match=r"^no attention backend flashinfer: CUDA is not available$"):
        refuse_missing("flashinfer")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(flashinfer_backend.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"^no attention backend flashinfer: the package flashinfer-python is not"):
        refuse_missing("flashinfer")
    refuse_missing("auto")
    refuse_missing("torch")


def test_auto_is_torch_where_there_is_no_gpu_and_flashinfer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flashinfer_backend, "missing", lambda: None)
    pool, spec = pool_of(2, 4), AttentionSpec(2, 1.0, (None, None))
    assert isinstance(choose_backend("auto", pool, spec), TorchBackend)
    with pytest.raises(ModelError, match="the pool is on cpu, not on a GPU"):
        choose_backend("flashinfer", pool, spec)


@pytest.mark.parametrize(
    ("head_dim", "dtype", "heads", "why"),
    [
        (80, torch.bfloat16, 4, "head size 80 is none of 64, 128, 256"),
        (64, torch.float32, 4, "dtype float32 is none of bfloat16, float16"),
        (64, torch.bfloat16, 3, "3 heads are no multiple of 2 KV heads"),
        (64, torch.bfloat16, 4, None),
    ],
)
def test_a_pool_that_flashinfer_cannot_read_is_named(
    head_dim: int, dtype: torch.dtype, heads: int, why: str | None
) -> None:
    class OnGpu:
        shape = PoolShape.uniform(1, 2, head_dim, 4, dtype)
        memory = type("Memory", (), {"device": torch.device("cuda", 0)})()

    assert unsupported(OnGpu(), AttentionSpec(heads, 1.0, (None,))) == why  # type: ignore[arg-type]


def test_the_stand_in_takes_what_the_real_wrappers_take() -> None:
    """Where FlashInfer is installed: every argument that the stand-in knows is the real one's, in its place."""
    flashinfer = pytest.importorskip("flashinfer")
    for name in ("BatchDecodeWithPagedKVCacheWrapper", "BatchPrefillWithPagedKVCacheWrapper"):
        mine, real = getattr(fake_flashinfer, name), getattr(flashinfer, name)
        planned = getattr(real, "_plan_impl", real.plan)
        mine_names, real_names = (list(inspect.signature(each).parameters) for each in (mine.plan, planned))
        positional = [
            n for n, p in inspect.signature(mine.plan).parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD
        ]
        assert real_names[: len(positional)] == positional
        assert set(mine_names) <= set(real_names)
        assert re.search(r"\bout\b", str(inspect.signature(real.run)))
    mine, real = (each.BatchDecodeWithPagedKVCacheWrapper for each in (fake_flashinfer, flashinfer))
    made, really = (inspect.signature(each.__init__).parameters.values() for each in (mine, real))
    assert {p.name for p in made if p.kind is p.KEYWORD_ONLY} <= {p.name for p in really}
    assert len(inspect.signature(real.reset_workspace_buffer).parameters) == 3


@pytest.mark.cuda
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 64), (8, 2, 128), (32, 8, 128)])
def test_on_a_gpu_flashinfer_attends_as_torch_does_in_float32(
    heads: int, kv_heads: int, head_dim: int, window: int | None
) -> None:
    cuda, size = torch.device("cuda"), 16
    shape = PoolShape.uniform(3, kv_heads, head_dim, size, torch.bfloat16)
    spec = AttentionSpec(heads, head_dim**-0.5, (window, None, window))
    ours = KVPool(shape, 64, cuda)
    ours.tensor.normal_()
    exact = KVPool(PoolShape.uniform(3, kv_heads, head_dim, size, torch.float32), 64, CPU)
    exact.tensor.copy_(ours.tensor)
    lens = [(1, 40), (1, 0), (1, 333), (17, 0), (33, 100), (1, 15)]
    context = [new + before for new, before in lens]
    pages = torch.randperm(64)
    table = torch.zeros(len(lens), 22, dtype=torch.int64)
    for i, length in enumerate(context):
        count = -(-length // size)
        table[i, :count], pages = pages[:count], pages[count:]
    positions = torch.cat(
        [torch.arange(length - new, length) for (new, _), length in zip(lens, context, strict=True)]
    )
    batch = ForwardBatch(torch.zeros(len(positions)), positions, [new for new, _ in lens], context, table)
    backend, right = choose_backend("flashinfer", ours, spec), TorchBackend(exact, spec)
    backend.plan(batch)
    right.plan(batch)
    for layer in range(3):
        q, k, v = (
            torch.randn(len(positions), heads + 2 * kv_heads, head_dim)
            .bfloat16()
            .split([heads, kv_heads, kv_heads], 1)
        )
        got = backend.run(layer, q.to(cuda), k.to(cuda), v.to(cuda)).float().cpu()
        wanted = right.run(layer, q.float(), k.float(), v.float())
        assert float((got - wanted).norm() / wanted.norm()) < 1e-2
    assert torch.equal(ours.tensor.float().cpu(), exact.tensor)

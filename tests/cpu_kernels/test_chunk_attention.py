"""Attention of prefill chunks on CPUs: against the torch backend, and the same bits however a prompt is cut."""

import random
from itertools import pairwise

import pytest
import torch

from kvasir_engine.cpu_kernels import unavailable_reason

if (reason := unavailable_reason()) is not None:
    pytest.skip(f"CPU kernels cannot run here: {reason}", allow_module_level=True)

from kvasir_engine.attention.base import AttentionSpec
from kvasir_engine.attention.cpu_backend import CpuBackend
from kvasir_engine.attention.torch_backend import TorchBackend
from kvasir_engine.cpu_kernels.prefill import KEYS, PagedPrefill
from kvasir_engine.forward_batch import ForwardBatch
from kvasir_engine.kv.pool import KVPool, PoolShape

PAGES = 96
CPU = torch.device("cpu")


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request: pytest.FixtureRequest):  # type: ignore[no-untyped-def]
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    torch.manual_seed(5)
    yield
    torch.set_num_threads(before)


def batch_of(sequences: list[tuple[int, int]], page_size: int) -> ForwardBatch:
    """Sequences of (new tokens, tokens in all) on scattered pages, none on two sequences' table."""
    width = -(-max(context for _, context in sequences) // page_size)
    pages = torch.randperm(PAGES)
    table = torch.zeros(len(sequences), width, dtype=torch.int64)
    used = 0
    for row, (_, context) in zip(table, sequences, strict=True):
        own = -(-context // page_size)
        row[:own], used = pages[used : used + own], used + own
    positions = torch.cat([torch.arange(context - new, context) for new, context in sequences])
    new, contexts = ([of[i] for of in sequences] for i in range(2))
    return ForwardBatch(torch.zeros_like(positions), positions, new, contexts, table)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "page_size"), [(9, 3, 64, 16), (6, 6, 32, 32), (4, 1, 128, 64), (16, 1, 96, 16)]
)
def test_mixed_batches_come_out_as_from_the_torch_backend(
    heads: int, kv_heads: int, dim: int, page_size: int, seed: int
) -> None:
    rng = random.Random(seed)
    windows = (None, 1, rng.randrange(2, KEYS), KEYS + rng.randrange(200))
    edges = [1, 2, page_size - 1, page_size, page_size + 1, KEYS - 1, KEYS, KEYS + 1, 2 * KEYS + 9]
    contexts = rng.sample(edges, 5)
    sequences = [
        (rng.choice([1, min(2, context), rng.randint(1, context), context]), context) for context in contexts
    ]
    batch, shape = (
        batch_of(sequences, page_size),
        PoolShape.uniform(len(windows), kv_heads, dim, page_size, torch.bfloat16),
    )
    spec = AttentionSpec(heads, 1.3 * dim**-0.5, windows)
    pools = [KVPool(shape, PAGES, CPU) for _ in range(2)]
    pools[0].tensor.normal_()
    pools[1].tensor.copy_(pools[0].tensor)
    ours, theirs = CpuBackend(pools[0], spec), TorchBackend(pools[1], spec)
    qkv = torch.randn(len(batch.tokens), heads + 2 * kv_heads, dim).bfloat16()
    q, k, v = qkv.split([heads, kv_heads, kv_heads], 1)
    ours.plan(batch)
    theirs.plan(batch)
    for layer in range(len(windows)):
        # Their scores are rounded to bfloat16, which costs up to a percent of a weight.
        torch.testing.assert_close(ours.run(layer, q, k, v), theirs.run(layer, q, k, v), atol=0.04, rtol=0.04)
    assert torch.equal(pools[0].tensor, pools[1].tensor)


def attended(pages: torch.Tensor, q: torch.Tensor, context: int, window: int) -> torch.Tensor:
    """Of q [new, heads, dim], the last tokens of `context`, in float64, over pages [n, 2, kv_heads, size, dim]."""
    k, v = pages.permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :context].double()
    grouped = q.double().view(len(q), len(k), -1, q.shape[-1]).permute(1, 2, 0, 3)
    age = torch.arange(context - len(q), context)[:, None] - torch.arange(context)
    hidden = (age < 0) | (age >= window) if window else age < 0
    scores = grouped @ k.unsqueeze(1).transpose(2, 3) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return (weights @ v.unsqueeze(1)).permute(2, 0, 1, 3).flatten(1)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("window", [0, 1, 50, KEYS + 31])
def test_only_the_planned_rows_are_written_and_they_are_right(window: int) -> None:
    pool = torch.randn(PAGES, 2, 2, 2, 16, 64).bfloat16()
    counts, contexts = [2, 75, 230], [KEYS + 2, 75, 300]
    rows = [1, 4, 80]
    pages = torch.randint(0, PAGES, (3, 19))
    q = torch.randn(312, 9, 64).bfloat16()[:, :6]  # rows that are apart
    out = torch.full((312, 6 * 64), 7.0).bfloat16()
    kernel = PagedPrefill(pool, 6, 0.125)
    kernel.plan(rows, counts, contexts, pages)
    kernel.run(1, q, out, window)
    others = torch.ones(312, dtype=torch.bool)
    for row, count, context, own in zip(rows, counts, contexts, pages, strict=True):
        right = attended(pool[own, 1], q[row : row + count], context, window)
        torch.testing.assert_close(out[row : row + count].double(), right, atol=0.012, rtol=0.02)
        others[row : row + count] = False
    assert (out[others] == 7).all()


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("window", [0, 70])
def test_a_prompt_has_the_same_bits_however_it_is_cut(window: int) -> None:
    length = 2 * KEYS + 40
    pool = torch.randn(PAGES, 1, 2, 3, 16, 64).bfloat16()
    pages = torch.randint(0, PAGES, (1, -(-length // 16)))
    q = torch.randn(length, 9, 64).bfloat16()
    kernel, whole, parts = PagedPrefill(pool, 9, 0.125), *torch.empty(2, length, 576).bfloat16()
    kernel.plan([0], [length], [length], pages)
    kernel.run(0, q, whole, window)
    cuts = [0, 2, 19, KEYS - 1, KEYS + 3, length - 2, length]
    for start, end in pairwise(cuts):
        kernel.plan([start], [end - start], [end], pages)
        kernel.run(0, q, parts, window)
    assert torch.equal(whole, parts)


@pytest.mark.usefixtures("threads")
def test_what_lies_behind_a_chunks_last_token_cannot_spoil_its_sums() -> None:
    pool = torch.full((3, 1, 2, 1, 16, 32), float("nan")).bfloat16()
    pool[1, 0, :, :, :5] = 1.0
    pool[2] = 1.0
    out = torch.empty(4, 32).bfloat16()
    kernel = PagedPrefill(pool, 1, 1.0)
    kernel.plan([0], [4], [21], torch.tensor([[2, 1]]))
    kernel.run(0, torch.ones(4, 1, 32).bfloat16(), out)
    assert (out == 1.0).all()


@pytest.mark.usefixtures("threads")
def test_scores_that_differ_by_hundreds_leave_the_largest_alone() -> None:
    tokens = 30 * 16
    kv = torch.zeros(2, tokens, 32).bfloat16()
    kv[0, :, 0] = torch.arange(tokens) % 7 * 100.0 - 300.0
    kv[0, 400, 0] = 3000.0
    kv[1, :, 0] = torch.arange(tokens) / 2
    pool = kv.view(2, 30, 16, 32).transpose(0, 1).reshape(30, 1, 2, 1, 16, 32).contiguous()
    kernel, out = PagedPrefill(pool, 1, 1.0), torch.empty(20, 32).bfloat16()
    kernel.plan([0], [20], [411], torch.arange(30)[None])
    q = torch.zeros(20, 1, 32).bfloat16()
    q[:, :, 0] = 1.0
    kernel.run(0, q, out)
    assert (out[9:, 0] == 200.0).all()  # from token 400 on; before it the sixes of 7 share
    assert (out[:9, 0] < 200.0).all()

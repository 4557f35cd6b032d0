"""The pool's layout, and what is said when there is no memory for it."""

from pathlib import Path

import pytest
import torch

from kvasir_engine.errors import ModelError
from kvasir_engine.executor.model_runner import CONTEXT_BYTES, default_kv_memory
from kvasir_engine.kv.pool import KVPool, LayerShape, PoolShape, free_memory, host_free_memory

CPU = torch.device("cpu")
SMOLLM2 = PoolShape.uniform(layers=30, kv_heads=3, head_dim=64, page_size=16, dtype=torch.bfloat16)


def test_a_page_is_contiguous_and_pages_follow_each_other() -> None:
    pool = KVPool(SMOLLM2, 5, CPU)
    assert pool.page_bytes == 16 * 23_040
    assert pool.tensor.shape == (5, 30, 2, 3, 16, 64)
    assert pool.tensor.is_contiguous()
    assert not pool.tensor.any()
    for page in range(5):
        assert pool.tensor[page].data_ptr() == pool.address + page * pool.page_bytes
    assert SMOLLM2.pages_within(5 * pool.page_bytes + 1) == 5


def test_a_page_can_be_copied_outside_inference_mode() -> None:
    pool = KVPool(SMOLLM2, 3, CPU)
    pool.tensor[0] = torch.randn(pool.tensor[0].shape)
    pool.copy_page(0, 2)
    assert torch.equal(pool.tensor[2], pool.tensor[0])
    assert not pool.tensor[1].any()


def test_layers_that_differ_lie_one_after_another_in_a_page() -> None:
    kinds = (
        LayerShape(2, 3, 8, torch.bfloat16),
        LayerShape(1, 1, 20, torch.float32),
        LayerShape(2, 1, 4, torch.int8),
    )
    pool = KVPool(PoolShape(kinds, 16), 3, CPU)
    assert pool.page_bytes == 16 * (2 * 3 * 16 + 80 + 8)
    for number, kind in enumerate(kinds):
        assert pool.layer(number).shape == (3, kind.parts, kind.heads, 16, kind.dim)
        pool.layer(number).fill_(number + 1)
    pool.copy_page(0, 2)
    for number in range(3):
        assert (pool.layer(number) == number + 1).all()
    with pytest.raises(ModelError, match="layers differs"):
        _ = pool.tensor


def test_a_layer_of_a_pool_is_that_of_its_whole_tensor() -> None:
    pool = KVPool(SMOLLM2, 2, CPU)
    pool.tensor.copy_(torch.randn(pool.tensor.shape))
    assert all(torch.equal(pool.layer(number), pool.tensor[:, number]) for number in range(30))


def test_a_pool_larger_than_memory_is_refused_with_both_numbers() -> None:
    pages = free_memory(CPU) * 2 // SMOLLM2.page_bytes
    with pytest.raises(ModelError) as error:
        KVPool(SMOLLM2, pages, CPU)
    assert f"{pages * SMOLLM2.page_bytes:,} bytes asked for" in str(error.value)
    assert "free on cpu" in str(error.value)


def test_a_budget_below_one_page_is_refused() -> None:
    with pytest.raises(ModelError, match="one page takes 368,640 bytes"):
        KVPool(SMOLLM2, SMOLLM2.pages_within(1000), CPU)


MEMINFO = "MemTotal:       16000 kB\nMemFree:        1000 kB\nMemAvailable:   8000 kB\n"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8000 << 10),
        ({"memory.max": "max", "memory.current": "5", "memory.stat": "inactive_file 1"}, 8000 << 10),
        (
            {"memory.max": "1000000", "memory.current": "900000", "memory.stat": "anon 1\ninactive_file 50000"},
            150_000,
        ),
        ({"memory.max": "1000", "memory.current": "5000", "memory.stat": "inactive_file 1"}, 0),
        (
            {
                "memory/memory.limit_in_bytes": "4096000",
                "memory/memory.usage_in_bytes": "1000000",
                "memory/memory.stat": "inactive_file 1\ntotal_inactive_file 4000",
            },
            3_100_000,
        ),
    ],
)
def test_free_memory_is_the_least_that_machine_and_container_allow(
    tmp_path: Path, files: dict[str, str], expected: int
) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text(MEMINFO)
    for name, content in files.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + "\n")
    assert host_free_memory(meminfo, tmp_path / "cgroup") == expected


def test_workers_that_share_a_gpu_take_equal_parts_of_it_whichever_comes_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gib = 1 << 30
    held = {"first": 0, "second": 0}

    def arrive(name: str, weights: int) -> int:
        held[name] = weights
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (80 * gib - sum(held.values()), 80 * gib))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: weights)
        pool = default_kv_memory(torch.device("cuda"), sharers=2)
        held[name] += pool
        return pool

    first = arrive("first", 16 * gib)
    assert first == (40 * gib - 16 * gib - CONTEXT_BYTES) * 9 // 10
    assert arrive("second", 16 * gib) == first, "what the first took is not the second's loss"
    assert sum(held.values()) < 80 * gib
    assert arrive("second", 50 * gib) == 0

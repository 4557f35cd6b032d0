"""A CPU pool's memory asks for huge pages. Whether the kernel has them is not the pool's matter."""

from pathlib import Path

import pytest
import torch

from kvasir_engine.kv.pool import KVPool, PoolShape

ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def mapping(address: int) -> dict[str, str]:
    """What the kernel says of this process's mapping with the address (proc(5), smaps)."""
    found: dict[str, str] = {}
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, _, value = line.partition(":")
        if " " in name:
            begin, end = (int(bound, 16) for bound in line.split()[0].split("-"))
            inside = begin <= address < end
        elif inside:
            found[name] = value.strip()
    return found


@pytest.mark.skipif(
    not ENABLED.exists() or "[never]" in ENABLED.read_text(), reason="this kernel gives no transparent huge pages"
)
def test_a_pool_asks_for_huge_pages() -> None:
    pool = KVPool(PoolShape.uniform(4, 2, 64, 16, torch.bfloat16), 1024, torch.device("cpu"))
    pool.tensor.fill_(1)
    found = mapping(pool.tensor.data_ptr() + pool.tensor.nbytes // 2)
    assert "hg" in found["VmFlags"].split()

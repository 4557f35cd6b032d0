"""A CPU pool's memory is backed by huge pages where the kernel has them."""

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


def huge_pages_refused() -> int:
    """How many huge pages the kernel had no memory for, in one piece, since the machine started."""
    counters = dict(line.split() for line in Path("/proc/vmstat").read_text().splitlines())
    return int(counters.get("thp_fault_fallback", 0))


@pytest.mark.skipif(
    not ENABLED.exists() or "[never]" in ENABLED.read_text(), reason="this kernel gives no transparent huge pages"
)
def test_a_pool_that_is_written_is_in_huge_pages() -> None:
    refused = huge_pages_refused()
    pool = KVPool(PoolShape.uniform(4, 2, 64, 16, torch.bfloat16), 1024, torch.device("cpu"))
    pool.tensor.fill_(1)
    found = mapping(pool.tensor.data_ptr() + pool.tensor.nbytes // 2)
    assert "hg" in found["VmFlags"].split()
    huge = int(found["AnonHugePages"].split()[0]) << 10
    assert huge > pool.tensor.nbytes // 2 or huge_pages_refused() > refused

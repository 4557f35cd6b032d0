"""A CPU pool's memory is backed by huge pages where the kernel has them."""

import re
from pathlib import Path

import pytest
import torch

from kvasir_engine.kv.pool import KVPool, PoolShape

ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def huge_bytes() -> int:
    """Of this process's anonymous memory."""
    found = re.search(r"^AnonHugePages:\s+(\d+) kB", Path("/proc/self/smaps_rollup").read_text(), re.M)
    assert found is not None
    return int(found[1]) << 10


@pytest.mark.skipif(
    not ENABLED.exists() or "[never]" in ENABLED.read_text(), reason="this kernel gives no transparent huge pages"
)
def test_a_pool_that_is_written_is_in_huge_pages() -> None:
    before = huge_bytes()
    pool = KVPool(PoolShape(4, 2, 64, 16, torch.bfloat16), 1024, torch.device("cpu"))
    pool.tensor.fill_(1)
    assert huge_bytes() - before > pool.tensor.nbytes // 2

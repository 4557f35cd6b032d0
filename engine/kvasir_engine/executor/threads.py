"""How many threads a CPU worker computes with: as many as its container may keep busy."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch

T = TypeVar("T")


def use_own_cores(ranks: int = 1, device: str = "cpu") -> int:
    """Keep torch to the cores that this process may use, its cgroup's quota included. OMP_NUM_THREADS wins.

    `ranks` processes share them. Where a GPU computes, one thread is enough: what else waits, spins.

    By default torch takes a thread for every core of the node, which throttles a container with a CPU limit.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        cores = 1 if device == "cuda" else own_cores(len(os.sched_getaffinity(0)), Path("/sys/fs/cgroup"))
        torch.set_num_threads(max(1, cores // ranks))
    return torch.get_num_threads()


def apart(work: Callable[[], T]) -> T:
    """What `work` returns, done in a thread that ends with it, and with it the pool of threads that torch gave it.

    libgomp keeps a pool for each thread that computed, and once all pools together have more threads than the
    machine has cores, threads that wait for one another go to sleep at once: that makes a decode step 1.6 times as
    long. So only the engine's thread may have a pool.
    """
    with ThreadPoolExecutor(1, "kvasir-apart") as thread:
        return thread.submit(work).result()


def own_cores(cores: int, cgroup: Path) -> int:
    """`cores`, or fewer where the cgroup (v2 or v1) has a quota; a started core counts."""
    for files in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            quota, period = " ".join((cgroup / file).read_text().strip() for file in files).split()
        except (OSError, ValueError):
            continue
        if quota not in ("max", "-1"):
            return max(1, min(cores, -(-int(quota) // int(period))))
    return cores

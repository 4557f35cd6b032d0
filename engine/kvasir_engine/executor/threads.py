"""The number of threads with which a CPU worker computes: as many as its container has cores."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch

T = TypeVar("T")


def use_own_cores(ranks: int = 1, device: str = "cpu") -> int:
    """Limit torch to the cores that this process may use, with its cgroup's quota. OMP_NUM_THREADS takes
    precedence.

    `ranks` processes share the cores. With a GPU one thread is enough, since further threads would spin.

    By default torch has a thread for every core of the node, and a container with a CPU limit is throttled.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        cores = 1 if device == "cuda" else own_cores(len(os.sched_getaffinity(0)), Path("/sys/fs/cgroup"))
        torch.set_num_threads(max(1, cores // ranks))
    return torch.get_num_threads()


def apart(work: Callable[[], T]) -> T:
    """Run `work` in a thread of its own and return its result. The thread's pool of torch threads ends with it.

    libgomp keeps a pool for each thread that has computed. When all pools together have more threads than the
    machine has cores, threads that wait for each other go to sleep at once, and a decode step takes 1.6 times as
    long. So only the engine's thread may keep a pool.
    """
    with ThreadPoolExecutor(1, "kvasir-apart") as thread:
        return thread.submit(work).result()


def own_cores(cores: int, cgroup: Path) -> int:
    """`cores`, or fewer if the cgroup (v2 or v1) has a quota, rounded up to whole cores."""
    for files in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            quota, period = " ".join((cgroup / file).read_text().strip() for file in files).split()
        except (OSError, ValueError):
            continue
        if quota not in ("max", "-1"):
            return max(1, min(cores, -(-int(quota) // int(period))))
    return cores

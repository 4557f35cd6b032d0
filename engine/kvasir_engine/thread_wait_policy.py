"""How threads of OpenMP wait where a GPU computes. OpenMP reads it when torch is imported: this imports none."""

import os
from collections.abc import MutableMapping
from pathlib import Path

CUDA_DEVICE = Path("/dev/nvidiactl")
PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}
"""GCC's OpenMP, and Intel's."""


def let_threads_sleep(
    device: str, environment: MutableMapping[str, str] = os.environ, driver: Path = CUDA_DEVICE
) -> bool:
    """Have threads that wait for work sleep where `device` (cpu, cuda, auto) will be a GPU. Returns whether it is.

    While a GPU computes, the host's threads only wait: left to spin they kept 6 of 16 cores busy. On a CPU they
    spin, as a step's kernels follow one another within microseconds. What the user set stays.
    """
    gpu = device == "cuda" or (device == "auto" and driver.exists())
    if gpu:
        for name, value in PASSIVE.items():
            environment.setdefault(name, value)
    return gpu

"""Kernels for CPUs in numba, where torch's and oneDNN's leave much of the machine unused.

They need AVX-512 with bfloat16 (AMD Zen 4, Intel Cooper Lake and Sapphire Rapids, and later) and a torch that runs
on GCC's OpenMP, as its Linux builds do. Elsewhere, and for float32, the model uses torch's own operators.
"""

from functools import cache
from pathlib import Path

FLAG = "avx512_bf16"


@cache
def unavailable_reason() -> str | None:
    """Why these kernels cannot run here, or None."""
    try:
        if f" {FLAG} " not in Path("/proc/cpuinfo").read_text().replace("\n", " "):
            return f"the processor has no {FLAG}"
    except OSError:
        return "there is no /proc/cpuinfo"
    try:
        from kvasir_engine.cpu_kernels import team
    except ImportError as error:
        return f"numba cannot be imported: {error}"
    return team.unavailable_reason()

"""FlashInfer's modules that the engine uses: compiled ahead, without a GPU, and found again at start.

FlashInfer compiles a module when it is first used (nvcc and ninja, a minute or two), except for what lies in its
own `data/aot/`. Both wrappers (`flashinfer_backend.py`) use one module a window, size of heads and dtype.
"""

import importlib
import logging
import shutil
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from kvasir_engine.attention.flashinfer_choice import PrefillBackend

log = logging.getLogger("model")


def specs(
    head_dim: int, dtype: torch.dtype, windows: Collection[bool], backend: PrefillBackend = "fa2"
) -> list[Any]:
    """FlashInfer's own descriptions of the modules for heads of this size, with windows, without, or both."""
    generate = importlib.import_module("flashinfer.prefill")._gen_batch_prefill_primary_module
    return [
        generate(backend, dtype, dtype, dtype, torch.int32, head_dim, head_dim, 0, window, False, False)
        for window in sorted(windows)
    ]


def ahead_folder() -> Path:
    """Where FlashInfer looks for what needs no compiling."""
    return Path(importlib.import_module("flashinfer.jit.env").FLASHINFER_AOT_DIR)


def compiled_in(head_dim: int, dtype: torch.dtype, windows: Collection[bool]) -> tuple[list[str], list[str]]:
    """The names of the modules that need no compiling, and of those that do."""
    found: tuple[list[str], list[str]] = [], []
    for spec in specs(head_dim, dtype, windows):
        found[not spec.is_aot].append(spec.name)
    return found


def has_fa3(head_dim: int, dtype: torch.dtype, windows: Collection[bool]) -> bool:
    """Whether FA3's modules need no compiling; not where FlashInfer is another release, with other names."""
    try:
        return all(spec.is_aot for spec in specs(head_dim, dtype, windows, "fa3"))
    except Exception as error:
        log.info("FA3 is not looked for reason=%r", f"{type(error).__name__}: {error}")
        return False


def compile_into(
    folder: Path,
    head_dims: Collection[int],
    dtypes: Collection[torch.dtype],
    backends: tuple[PrefillBackend, ...] = ("fa2",),
) -> None:
    """Compile the modules into FOLDER/NAME/NAME.so, for the architectures in $FLASHINFER_CUDA_ARCH_LIST.

    A linker without libcuda needs a stub of it in a folder of $LIBRARY_PATH.
    """
    kinds = [(backend, dtype, dim) for backend in backends for dtype in dtypes for dim in head_dims]
    for spec in [each for backend, dtype, dim in kinds for each in specs(dim, dtype, (False, True), backend)]:
        target = folder / spec.name / f"{spec.name}.so"
        if not target.exists():
            began = time.monotonic()
            spec.build(verbose=False)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(spec.jit_library_path, target)
            log.info("compiled %s seconds=%.0f", spec.name, time.monotonic() - began)

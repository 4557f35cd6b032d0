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

log = logging.getLogger("model")


def specs(head_dim: int, dtype: torch.dtype, windows: Collection[bool]) -> list[Any]:
    """FlashInfer's own descriptions of the modules for heads of this size, with windows, without, or both."""
    generate = importlib.import_module("flashinfer.prefill")._gen_batch_prefill_primary_module
    return [
        generate("fa2", dtype, dtype, dtype, torch.int32, head_dim, head_dim, 0, window, False, False)
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


def compile_into(folder: Path, head_dims: Collection[int], dtypes: Collection[torch.dtype]) -> None:
    """Compile the modules into FOLDER/NAME/NAME.so, for the architectures in $FLASHINFER_CUDA_ARCH_LIST.

    A linker without libcuda needs a stub of it in a folder of $LIBRARY_PATH.
    """
    for spec in [each for dtype in dtypes for dim in head_dims for each in specs(dim, dtype, (False, True))]:
        target = folder / spec.name / f"{spec.name}.so"
        if not target.exists():
            began = time.monotonic()
            spec.build(verbose=False)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(spec.jit_library_path, target)
            log.info("compiled %s seconds=%.0f", spec.name, time.monotonic() - began)

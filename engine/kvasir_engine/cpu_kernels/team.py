"""Kernels on torch's own threads.

Numba's threading layers would bring a second pool of threads, and on few cores the two would spin in each other's
way. So a kernel here is a C function of one pointer, which each thread of a team calls, and a team is what torch's
operators use as well: libgomp's `GOMP_parallel`.
"""

import ctypes
import os
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import llvmlite.binding as llvm
import numba
import numpy as np
import numpy.typing as npt
import torch
from numba import types

from kvasir_engine.errors import UserError
from kvasir_engine.private_folders import private_folder, run_folder

SIGNATURE = types.void(types.CPointer(types.int64))
"""Of a kernel: a pointer to its arguments, addresses and numbers alike.

The first two are always how many threads divide its work and how many tokens (rows, sequences) there are.
"""

thread_number = types.ExternalFunction("kvasir_thread_number", types.int32())
barrier = types.ExternalFunction("kvasir_barrier", types.void())


def _libgomp() -> Any:
    folder = Path(torch.__file__).parent
    found = [*folder.glob("lib/libgomp*.so*"), *folder.parent.glob("torch.libs/libgomp*.so*")]
    return ctypes.CDLL(str(found[0])) if found else None


def _sources() -> str:
    """A digest of all kernels: numba itself looks only at the file of the one it compiles."""
    digest = blake2b(digest_size=8)
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _compiled() -> Path:
    """Where compiled kernels are kept. Raises UserError.

    numba's index of them is a pickle: whoever may write it runs code here. So they are in a folder of this user's
    alone, and never in the models' cache, which may be a claim that others write. Without one nothing is compiled:
    numba would look beside the sources then, and in the home.
    """
    named = os.environ.get("NUMBA_CACHE_DIR")
    try:
        folder = private_folder(Path(named)) if named else private_folder(run_folder() / "kernels")
        return private_folder(folder / _sources())
    except OSError as error:
        raise UserError(f"no folder for compiled kernels: {error}") from error


_gomp = _libgomp()
if _gomp is not None:
    _gomp.GOMP_parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    _gomp.GOMP_parallel.restype = None
    llvm.add_symbol("kvasir_thread_number", ctypes.cast(_gomp.omp_get_thread_num, ctypes.c_void_p).value)
    llvm.add_symbol("kvasir_barrier", ctypes.cast(_gomp.GOMP_barrier, ctypes.c_void_p).value)
numba.config.CACHE_DIR = str(_compiled())


def unavailable_reason() -> str | None:
    """Why there are no teams here, or None."""
    return None if _gomp is not None else "torch was built with another OpenMP than libgomp"


def kernel(function: Any) -> int:
    """Compile `function(arguments)` with `SIGNATURE`, or take it from the cache; its address."""
    # Sums may be reordered and no number is NaN: else loops that sum or seek a largest stay scalar.
    relaxed = {"nnan", "nsz", "arcp", "contract", "reassoc"}
    options = {"fastmath": relaxed, "error_model": "numpy"}
    try:
        compiled = numba.cfunc(SIGNATURE, cache=True, **options)(function)
    except RuntimeError:  # the cache cannot be written; this takes a second
        compiled = numba.cfunc(SIGNATURE, **options)(function)
    address: int = compiled.address
    return address


Arguments = npt.NDArray[np.int64]


def run(kernel: int, arguments: Arguments) -> None:
    """Call `kernel(arguments)` once on each of `arguments[0]` threads, the calling one among them."""
    _gomp.GOMP_parallel(kernel, arguments.ctypes.data, int(arguments[0]), 0)


@dataclass(frozen=True, eq=False)
class Call:
    """A kernel and its arguments, to be run by itself or in a Program."""

    kernel: int
    arguments: Arguments

    @staticmethod
    def of(kernel: int, *arguments: int) -> "Call":
        """With the arguments from the first on."""
        return Call(kernel, np.array(arguments, dtype=np.int64))

    def run(self) -> None:
        """Run it now."""
        run(self.kernel, self.arguments)

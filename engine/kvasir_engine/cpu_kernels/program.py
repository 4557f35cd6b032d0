"""Many kernels in one go: what would be a launch each is one for all, with a barrier after each kernel.

The calls are prepared once, as a CUDA graph is; what a step changes of their arguments is written into them.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numba import carray

from kvasir_engine.cpu_kernels import simd, team

WIDTH = 24
"""Arguments that a call has at most."""


def _interpret(arguments):  # type: ignore[no-untyped-def]
    a = carray(arguments, (6,))
    threads, calls, kernels, active = a[0], a[2], a[3], a[4]
    number = np.int64(team.thread_number())
    for at in range(a[1], a[5]):
        if carray(simd.i64_at(active), (at + 1,))[at]:
            own = calls + at * WIDTH * 8
            if number < carray(simd.i64_at(own), (1,))[0]:
                simd.call(carray(simd.i64_at(kernels), (at + 1,))[at], own)
            if threads > 1:
                team.barrier()


_kernel = team.kernel(_interpret)


class Program:
    """Calls in order. The memory that they use has to live as long as the program."""

    def __init__(self, calls: Sequence[team.Call]) -> None:
        self._threads = torch.get_num_threads()
        self._kernels = np.array([call.kernel for call in calls], dtype=np.int64)
        self._active = np.ones(len(calls), dtype=np.int64)
        self._calls = np.zeros((len(calls), WIDTH), dtype=np.int64)
        for row, call in zip(self._calls, calls, strict=True):
            row[: len(call.arguments)] = call.arguments

    def set_tokens(self, tokens: int) -> None:
        """All calls are for so many tokens, as far as `set` does not say otherwise afterwards."""
        self._calls[:, 1] = tokens

    def set(self, places: slice, first: team.Arguments | None) -> None:
        """The calls at `places` begin with these arguments from now on; with None they are left out."""
        self._active[places] = first is not None
        if first is not None:
            self._calls[places, : len(first)] = first

    def run(self, first: int, last: int) -> None:
        """Run the calls from place `first` to before `last`."""
        addresses = (each.ctypes.data for each in (self._calls, self._kernels, self._active))
        team.Call.of(_kernel, self._threads, first, *addresses, last).run()

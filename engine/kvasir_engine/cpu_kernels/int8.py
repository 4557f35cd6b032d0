"""Products with int8 weights, a scale for each output, and bfloat16 inputs.

bfloat16 has every int8, so the sums are those of a bfloat16 product of the rounded weights, in the same order. For
a few rows weights are widened in registers, while memory, which has half to bring, brings the next; for more, once
into a core's cache.
"""

import numba
import numpy as np
import torch
from numba import carray

from kvasir_engine.cpu_kernels import simd, team
from kvasir_engine.cpu_kernels.linear import (
    ADD,
    BFLOAT16,
    BLOCK,
    FLOAT32,
    ROWS,
    SCRATCH,
    aligned,
    finish,
    single,
    triple,
)

WIDTH, STREAMS = 3, 8
"""Blocks of a tile, and those of which one or two rows read at once."""

_1x8, _2x8 = (simd.tile(rows, STREAMS, int8=True) for rows in (1, 2))
_3x3, _4x3, _5x3, _6x3, _7x3, _8x3 = (simd.tile(rows, WIDTH, int8=True) for rows in range(3, ROWS + 1))


@numba.njit(inline="always")
def _narrow(rows, weights, block, x, row, pairs, out):  # type: ignore[no-untyped-def]
    if rows == 8:
        _8x3(weights, block, x, row, pairs, out)
    elif rows == 7:
        _7x3(weights, block, x, row, pairs, out)
    elif rows == 6:
        _6x3(weights, block, x, row, pairs, out)
    elif rows == 5:
        _5x3(weights, block, x, row, pairs, out)
    elif rows == 4:
        _4x3(weights, block, x, row, pairs, out)
    elif rows == 3:
        _3x3(weights, block, x, row, pairs, out)
    elif rows == 2:
        _2x8(weights, block, x, row, pairs, out)
    else:
        _1x8(weights, block, x, row, pairs, out)


def _linear(arguments):  # type: ignore[no-untyped-def]
    a = carray(arguments, (14,))
    threads, tokens, weights, x, y, blocks, pairs = a[0], a[1], a[2], a[3], a[4], a[5], a[6]
    x_row, y_row, mode, scratch, size, bias, scales = a[7], a[8], a[9], a[10], a[11], a[12], a[13]
    number = np.int64(team.thread_number())
    sums = scratch + number * size
    wide = sums + SCRATCH
    block = pairs * 32
    element = 2 if mode == BFLOAT16 else 4
    width = STREAMS if tokens <= 2 else WIDTH
    groups = (blocks + width - 1) // width
    at = number * groups // threads * width
    end = min((number + 1) * groups // threads * width, blocks)
    while at < end:
        count = width if at + width <= end else 1
        own = weights + at * block
        out = y + at * BLOCK * element
        factors, added = scales + at * BLOCK * 4, bias + at * BLOCK * 4 if bias else 0
        if tokens <= ROWS and count == width:
            _narrow(tokens, own, block, x, x_row, pairs, sums)
            finish(sums, out, y_row, tokens, count * BLOCK, factors, added, mode)
        else:
            simd.widen(own, pairs * count, wide)
            for done in range(0, tokens, ROWS):
                rows = min(tokens - done, ROWS)
                if count == WIDTH:
                    triple(rows, wide, pairs * 64, x + done * x_row, x_row, pairs, sums)
                else:
                    single(rows, wide, pairs * 64, x + done * x_row, x_row, pairs, sums)
                to = out + done * y_row * element
                finish(sums, to, y_row, rows, count * BLOCK, factors, added, mode)
        at += count


_kernel = team.kernel(_linear)


class Scratch:
    """Memory that the weights of one model share: they are not multiplied with at the same time."""

    def __init__(self) -> None:
        self._size = 0
        self._memory: dict[tuple[int, int], torch.Tensor] = {}  # all, as calls that were prepared may use it

    def need(self, size: int) -> None:
        """Each thread gets at least so many bytes, a multiple of 64."""
        self._size = max(self._size, size)

    def at(self, threads: int) -> tuple[int, int]:
        """Its address and bytes a thread."""
        key = threads, self._size
        if key not in self._memory:
            self._memory[key] = aligned(threads * self._size)
        return self._memory[key].data_ptr(), self._size


class QuantizedWeight:
    """W [out, in] bfloat16 as int8 [out / 16, in / 2, 16, 2] with each output's largest weight as 127."""

    __slots__ = ("_bias", "_packed", "_scales", "_scratch", "columns", "rows")

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, scratch: Scratch) -> None:
        self._bias = None if bias is None else bias.float()
        self.rows, self.columns = weight.shape
        values = weight.float()
        self._scales = values.abs().amax(1) / 127
        self._scales[self._scales == 0] = 1.0  # an output that is always zero
        rounded = (values / self._scales[:, None]).round_().to(torch.int8)
        shape = (self.rows // BLOCK, self.columns // 2, BLOCK, 2)
        self._packed = aligned(rounded.nbytes).view(torch.int8).view(shape)
        self._packed.copy_(rounded.view(shape[0], BLOCK, shape[1], 2).permute(0, 2, 1, 3))
        self._scratch = scratch
        scratch.need(SCRATCH + WIDTH * self.columns * 32)

    def multiply(self, x: torch.Tensor, y: torch.Tensor, add: bool = False) -> torch.Tensor:
        """As PackedWeight's."""
        self.call(x, y, add).run()
        return y

    def call(self, x: torch.Tensor, y: torch.Tensor, add: bool = False) -> team.Call:
        """What `multiply` runs. It reads and writes the memory that x and y have now."""
        threads = torch.get_num_threads()
        mode = ADD if add else BFLOAT16 if y.dtype == torch.bfloat16 else FLOAT32
        bias = 0 if self._bias is None else self._bias.data_ptr()
        addresses = self._packed.data_ptr(), x.data_ptr(), y.data_ptr()
        sizes = self.rows // BLOCK, self.columns // 2, x.stride(0) * 2, y.stride(0)
        scratch, scales = self._scratch.at(threads), self._scales.data_ptr()
        return team.Call.of(_kernel, threads, x.shape[0], *addresses, *sizes, mode, *scratch, bias, scales)

"""Products with bfloat16 weights, from one row to thousands, on weights packed once."""

import numpy as np
import numba
import torch
from numba import carray

from kvasir_engine.kernels import simd, team

BLOCK = simd.LANES
"""Outputs side by side in a register."""

ROWS = 8
"""Rows of a tile: with 3 blocks that is 24 sums in 32 registers."""

SCRATCH = 4096
"""Bytes of a tile's sums, at most."""

BFLOAT16, FLOAT32, ADD = range(3)
"""What becomes of the sums: rounded, stored, or added to what is there."""

_1x8, _2x8 = simd.tile(1, 8), simd.tile(2, 8)
_1x3, _2x3, _3x3, _4x3, _5x3, _6x3, _7x3, _8x3 = (simd.tile(rows, 3) for rows in range(1, 9))
_1x1, _2x1, _3x1, _4x1, _5x1, _6x1, _7x1, _8x1 = (simd.tile(rows, 1) for rows in range(1, 9))


@numba.njit(inline="always")
def _triple(rows, weights, block, x, row, pairs, out):  # type: ignore[no-untyped-def]
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
        _2x3(weights, block, x, row, pairs, out)
    else:
        _1x3(weights, block, x, row, pairs, out)


@numba.njit(inline="always")
def _single(rows, weights, block, x, row, pairs, out):  # type: ignore[no-untyped-def]
    if rows == 8:
        _8x1(weights, block, x, row, pairs, out)
    elif rows == 7:
        _7x1(weights, block, x, row, pairs, out)
    elif rows == 6:
        _6x1(weights, block, x, row, pairs, out)
    elif rows == 5:
        _5x1(weights, block, x, row, pairs, out)
    elif rows == 4:
        _4x1(weights, block, x, row, pairs, out)
    elif rows == 3:
        _3x1(weights, block, x, row, pairs, out)
    elif rows == 2:
        _2x1(weights, block, x, row, pairs, out)
    else:
        _1x1(weights, block, x, row, pairs, out)


@numba.njit(inline="always")
def _finish(sums, y, row, rows, columns, mode):  # type: ignore[no-untyped-def]
    """Bring [rows, columns] sums to y, whose rows are `row` elements apart."""
    values = carray(simd.f32_at(sums), (rows * columns,))
    bits = carray(simd.i32_at(sums), (rows * columns,))
    for i in range(rows):
        if mode == BFLOAT16:
            rounded = carray(simd.u16_at(y + i * row * 2), (columns,))
            for j in range(columns):
                u = bits[i * columns + j]
                # to the nearest, ties to even
                u += np.int32(0x7FFF) + ((u >> np.int32(16)) & np.int32(1))
                rounded[j] = np.uint16(u >> np.int32(16))
        else:
            out = carray(simd.f32_at(y + i * row * 4), (columns,))
            for j in range(columns):
                out[j] = values[i * columns + j] + (out[j] if mode == ADD else np.float32(0))


def _linear(arguments):  # type: ignore[no-untyped-def]
    a = carray(arguments, (11,))
    weights, x, y, tokens, blocks, pairs = a[0], a[1], a[2], a[3], a[4], a[5]
    x_row, y_row, mode, scratch, threads = a[6], a[7], a[8], a[9], a[10]
    number = np.int64(team.thread_number())
    sums = scratch + number * SCRATCH
    block = pairs * 64
    element = 2 if mode == BFLOAT16 else 4
    # One or two rows are bound by memory: more streams of weights, fewer reads of x.
    width = 8 if tokens <= 2 else 3
    groups = (blocks + width - 1) // width
    at = number * groups // threads * width
    end = min((number + 1) * groups // threads * width, blocks)
    while at < end:
        count = width if at + width <= end else (3 if at + 3 <= end else 1)
        own = weights + at * block
        done = 0
        while done < tokens:
            rows = min(tokens - done, ROWS)
            own_x = x + done * x_row
            if count == 8:
                if rows == 1:
                    _1x8(own, block, own_x, x_row, pairs, sums)
                else:
                    _2x8(own, block, own_x, x_row, pairs, sums)
            elif count == 3:
                _triple(rows, own, block, own_x, x_row, pairs, sums)
            else:
                _single(rows, own, block, own_x, x_row, pairs, sums)
            _finish(sums, y + (done * y_row + at * BLOCK) * element, y_row, rows, count * BLOCK, mode)
            done += rows
        at += count


_kernel = team.kernel(_linear)


def aligned(size: int) -> torch.Tensor:
    """[size] uint8, zeroed, at a multiple of 64 bytes."""
    memory = torch.zeros(size + 64, dtype=torch.uint8)
    start = -memory.data_ptr() % 64
    return memory[start : start + size]


def fits(rows: int, columns: int) -> bool:
    """Whether a [rows, columns] matrix can be packed."""
    return rows % BLOCK == 0 and columns % 2 == 0


class PackedWeight:
    """W [out, in] bfloat16, as [out / 16, in / 2, 16, 2]: what 16 outputs need of two inputs is one register."""

    __slots__ = ("_packed", "_scratch", "columns", "rows")

    def __init__(self, weight: torch.Tensor) -> None:
        self.rows, self.columns = weight.shape
        shape = (self.rows // BLOCK, self.columns // 2, BLOCK, 2)
        self._packed = aligned(weight.nbytes).view(torch.bfloat16).view(shape)
        self._packed.copy_(weight.view(shape[0], BLOCK, shape[1], 2).permute(0, 2, 1, 3))
        self._scratch = aligned(0)

    def multiply(self, x: torch.Tensor, y: torch.Tensor, add: bool = False) -> torch.Tensor:
        """y = x W^T for x [T, in] bfloat16 and y [T, out] bfloat16 or float32; `add`: y += x W^T, in float32.

        The last dimensions are contiguous. An element's sum is over the inputs in order, whatever T is.
        """
        threads = torch.get_num_threads()
        if len(self._scratch) < threads * SCRATCH:
            self._scratch = aligned(threads * SCRATCH)
        mode = ADD if add else BFLOAT16 if y.dtype == torch.bfloat16 else FLOAT32
        arguments = np.array(
            [
                self._packed.data_ptr(),
                x.data_ptr(),
                y.data_ptr(),
                x.shape[0],
                self.rows // BLOCK,
                self.columns // 2,
                x.stride(0) * 2,
                y.stride(0),
                mode,
                self._scratch.data_ptr(),
                threads,
            ],
            dtype=np.int64,
        )
        team.run(_kernel, arguments, threads)
        return y

    def row(self, rows: torch.Tensor) -> torch.Tensor:
        """[R, in] of the given rows."""
        return self._packed[rows // BLOCK, :, rows % BLOCK].reshape(len(rows), self.columns)

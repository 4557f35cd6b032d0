"""Products with bfloat16 weights, from one row to thousands, on weights packed once."""

import numba
import numpy as np
import torch
from numba import carray

from kvasir_engine.cpu_kernels import maths, simd, team
from kvasir_engine.cpu_kernels.lanes import LANES

BLOCK = LANES
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
def triple(rows, weights, block, x, row, pairs, out):  # type: ignore[no-untyped-def]
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
def single(rows, weights, block, x, row, pairs, out):  # type: ignore[no-untyped-def]
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
def finish(sums, y, row, rows, columns, scales, bias, mode):  # type: ignore[no-untyped-def]
    """Bring [rows, columns] sums, times `scales` [columns] and with `bias` [columns], to y.

    Its rows are `row` elements apart. Both may be 0: none.
    """
    for i in range(rows):
        values = carray(simd.f32_at(sums + i * columns * 4), (columns,))
        if scales:
            factors = carray(simd.f32_at(scales), (columns,))
            for j in range(columns):
                values[j] *= factors[j]
        if bias:
            added = carray(simd.f32_at(bias), (columns,))
            for j in range(columns):
                values[j] += added[j]
        if mode == BFLOAT16:
            rounded = carray(simd.u16_at(y + i * row * 2), (columns,))
            for j in range(columns):
                rounded[j] = maths.narrow(values[j])
        elif mode == ADD:
            out = carray(simd.f32_at(y + i * row * 4), (columns,))
            for j in range(columns):
                out[j] += values[j]
        else:
            out = carray(simd.f32_at(y + i * row * 4), (columns,))
            for j in range(columns):
                out[j] = values[j]


def _linear(arguments):  # type: ignore[no-untyped-def]
    a = carray(arguments, (12,))
    threads, tokens, weights, x, y, blocks, pairs = a[0], a[1], a[2], a[3], a[4], a[5], a[6]
    x_row, y_row, mode, scratch, bias = a[7], a[8], a[9], a[10], a[11]
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
                triple(rows, own, block, own_x, x_row, pairs, sums)
            else:
                single(rows, own, block, own_x, x_row, pairs, sums)
            out = y + (done * y_row + at * BLOCK) * element
            finish(sums, out, y_row, rows, count * BLOCK, 0, bias + at * BLOCK * 4 if bias else 0, mode)
            done += rows
        at += count


_kernel = team.kernel(_linear)


def _settle(arguments):  # type: ignore[no-untyped-def]
    a = carray(arguments, (9,))
    threads, tokens, logits, x, packed, vocab, pairs, most = a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7]
    rounding = carray(simd.f32_at(a[8]), (1,))[0]
    number = np.int64(team.thread_number())
    for token in range(number * tokens // threads, (number + 1) * tokens // threads):
        row = carray(simd.f32_at(logits + token * vocab * 4), (vocab,))
        state = carray(simd.f32_at(x + token * pairs * 8), (2 * pairs,))
        top = row[0]
        for i in range(vocab):
            top = max(top, row[i])
        least = top - abs(top) * rounding
        rivals = 0
        for i in range(vocab):
            rivals += row[i] >= least
        if 1 < rivals <= most:
            for i in range(vocab):
                if row[i] >= least:
                    weights = carray(
                        simd.u16_at(packed + (i // BLOCK * pairs * BLOCK + i % BLOCK) * 4), (pairs * 32,)
                    )
                    total = np.float32(0)
                    for pair in range(pairs):
                        total += state[2 * pair] * maths.widen(weights[32 * pair])
                        total += state[2 * pair + 1] * maths.widen(weights[32 * pair + 1])
                    row[i] = total


_settle_kernel = team.kernel(_settle)


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

    __slots__ = ("_bias", "_packed", "_scratch", "columns", "rows")

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self._bias = None if bias is None else bias.float()
        self.rows, self.columns = weight.shape
        shape = (self.rows // BLOCK, self.columns // 2, BLOCK, 2)
        self._packed = aligned(weight.nbytes).view(torch.bfloat16).view(shape)
        self._packed.copy_(weight.view(shape[0], BLOCK, shape[1], 2).permute(0, 2, 1, 3))
        self._scratch = aligned(0)

    def multiply(self, x: torch.Tensor, y: torch.Tensor, add: bool = False) -> torch.Tensor:
        """y = x W^T + b for x [T, in] bfloat16, y [T, out] bfloat16 or float32; `add`: y += all that, in float32.

        The last dimensions are contiguous. An element's sum is over the inputs in order, whatever T is.
        """
        self.call(x, y, add).run()
        return y

    def call(self, x: torch.Tensor, y: torch.Tensor, add: bool = False) -> team.Call:
        """What `multiply` runs. It reads and writes the memory that x and y have now."""
        threads = torch.get_num_threads()
        if len(self._scratch) < threads * SCRATCH:
            self._scratch = aligned(threads * SCRATCH)
        mode = ADD if add else BFLOAT16 if y.dtype == torch.bfloat16 else FLOAT32
        bias = 0 if self._bias is None else self._bias.data_ptr()
        addresses = self._packed.data_ptr(), x.data_ptr(), y.data_ptr()
        sizes = self.rows // BLOCK, self.columns // 2, x.stride(0) * 2, y.stride(0)
        return team.Call.of(_kernel, threads, x.shape[0], *addresses, *sizes, mode, self._scratch.data_ptr(), bias)

    def settle(self, logits: torch.Tensor, x: torch.Tensor, rounding: float, most: int) -> None:
        """Compute the largest of `logits` [T, out] again from x [T, in], both float32 and contiguous.

        Those within `rounding`, relatively, of a row's largest, unless they are more than `most` or only itself.
        """
        share = np.array([rounding], dtype=np.float32)
        addresses = logits.data_ptr(), x.data_ptr(), self._packed.data_ptr()
        sizes = self.rows, self.columns // 2, most, share.ctypes.data
        team.Call.of(_settle_kernel, torch.get_num_threads(), len(x), *addresses, *sizes).run()

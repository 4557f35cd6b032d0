"""Rows of logits under masks of bits, 32 tokens a word: the largest allowed logit, or the others made impossible.

One pass over a row, nothing copied; words without an allowed token are passed over. A row without a mask
allows all. Rows are divided among threads.
"""

from collections.abc import Sequence

import numba
import numpy as np
import torch
from numba import carray
from numpy.typing import NDArray

from kvasir_engine.cpu_kernels import simd, team

NONE_ALLOWED = -1


_LEAST = np.int32(-(2**31))
_MINUS_INFINITY = np.int32(np.float32(-np.inf).view(np.int32)) ^ np.int32(0x7FFFFFFF)


@numba.njit(inline="always")
def _ordered(bits):  # type: ignore[no-untyped-def]
    """A float32's bits as a whole number that is ordered as the float is: the largest of such is vector code."""
    bits = np.int32(0) if bits == _LEAST else bits  # both zeros are equal
    return bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF))


def _largest(arguments):  # type: ignore[no-untyped-def]
    a = carray(arguments, (6,))
    threads, rows, columns = a[0], a[1], a[3]
    number = np.int64(team.thread_number())
    masks, out = carray(simd.i64_at(a[4]), (rows, 2)), carray(simd.i64_at(a[5]), (rows,))
    for row in range(number * rows // threads, (number + 1) * rows // threads):
        x = carray(simd.i32_at(a[2] + masks[row, 0] * columns * 4), (columns,))
        free = masks[row, 1] == 0
        words = carray(simd.i32_at(masks[row, 1]), (-(-columns // 32),))
        best, at = _MINUS_INFINITY, -1
        for word in range(columns // 32):
            bits = np.int32(-1) if free else words[word]
            if bits == 0:
                continue
            most = _LEAST
            for i in range(32):
                allowed = np.int32(0) - ((bits >> np.int32(i)) & np.int32(1))
                most = max(most, (_ordered(x[word * 32 + i]) & allowed) | (_LEAST & ~allowed))
            if most > best:
                best, at = most, word
        last = columns // 32
        for i in range(columns - last * 32):
            if (free or (words[last] >> np.int32(i)) & np.int32(1)) and _ordered(x[last * 32 + i]) > best:
                best, at = _ordered(x[last * 32 + i]), last
        out[row] = -1
        if at >= 0:
            for i in range(min(32, columns - at * 32)):
                if (free or (words[at] >> np.int32(i)) & np.int32(1)) and _ordered(x[at * 32 + i]) == best:
                    out[row] = at * 32 + i
                    break


def _forbid(arguments):  # type: ignore[no-untyped-def]
    a = carray(arguments, (5,))
    threads, rows, columns = a[0], a[1], a[3]
    number = np.int64(team.thread_number())
    masks = carray(simd.i64_at(a[4]), (rows, 2))
    never = np.float32(-np.inf)
    for row in range(number * rows // threads, (number + 1) * rows // threads):
        x = carray(simd.f32_at(a[2] + masks[row, 0] * columns * 4), (columns,))
        words = carray(simd.i32_at(masks[row, 1]), (-(-columns // 32),))
        for word in range(columns // 32):
            bits = words[word]
            for i in range(32):
                x[word * 32 + i] = x[word * 32 + i] if (bits >> np.int32(i)) & np.int32(1) else never
        last = columns // 32
        for i in range(columns - last * 32):
            if not (words[last] >> np.int32(i)) & np.int32(1):
                x[last * 32 + i] = never


_largest_kernel = team.kernel(_largest)
_forbid_kernel = team.kernel(_forbid)

Masks = Sequence[tuple[int, NDArray[np.int32] | None]]
"""The number of a row, and the `ceil(vocab / 32)` words of what may come in it; None where all may."""


def _table(masks: Masks) -> NDArray[np.int64]:
    return np.array([(row, 0 if words is None else words.ctypes.data) for row, words in masks], np.int64)


def _threads(rows: int) -> int:
    return min(rows, torch.get_num_threads())


def largest(logits: torch.Tensor, masks: Masks) -> torch.Tensor:
    """Of `logits` [S, vocab], float32 and contiguous, the allowed token with the largest in each of the rows named,
    the first of equals; NONE_ALLOWED where none is above minus infinity.
    """
    table, found = _table(masks), torch.empty(len(masks), dtype=torch.int64)
    addresses = logits.data_ptr(), logits.shape[1], table.ctypes.data, found.data_ptr()
    team.Call.of(_largest_kernel, _threads(len(masks)), len(masks), *addresses).run()
    return found


def forbid(logits: torch.Tensor, masks: Sequence[tuple[int, NDArray[np.int32]]]) -> None:
    """Make minus infinity of what the masks lack in `logits` [S, vocab], float32 and contiguous, in place."""
    if not masks:
        return
    table = _table(masks)
    addresses = logits.data_ptr(), logits.shape[1], table.ctypes.data
    team.Call.of(_forbid_kernel, _threads(len(masks)), len(masks), *addresses).run()

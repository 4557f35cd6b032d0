"""Attention of prefill chunks over the paged pool, read where it lies.

Flash attention (Dao et al. 2022): keys are taken a block at a time, and the softmax is kept as a running largest
score, sum and weighted sum. Blocks begin at fixed places of a sequence and a row's sums run in one order, so a
token has the same bits however its prompt is cut into chunks, and beside any other sequence.
"""

from collections.abc import Sequence

import numba
import numpy as np
import torch
from numba import carray

from kvasir_engine.cpu_kernels import maths, simd, simd_attention, team
from kvasir_engine.cpu_kernels.attention import LEAST, LN2, LOG2E, STEP, WIDTH
from kvasir_engine.cpu_kernels.linear import aligned

KEYS = 192
"""Tokens of a block. Its K and V, packed, stay in a core's cache for all rows of an item."""

SPAN = 64
"""Tokens whose scores a tile computes; a block has a multiple of them."""

ROWS = 6
"""Rows of a tile: with 4 registers of outputs that is 24 sums in 32 registers."""

ITEM = 192
"""Rows (tokens times heads of a group) of an item: more of them share what is packed, fewer divide better."""

LEAST_TOKENS, ITEMS_A_THREAD = 8, 6
"""An item has fewer rows where there would be fewer items than so many a thread, but at least so many tokens."""

_s1, _s2, _s3, _s4, _s5, _s6 = (simd.tile(rows, 4, KEYS * 4) for rows in range(1, ROWS + 1))
_w1, _w2, _w3, _w4, _w5, _w6 = (simd.tile(rows, 4) for rows in range(1, ROWS + 1))
_h1, _h2, _h3, _h4, _h5, _h6 = (simd.tile(rows, 2) for rows in range(1, ROWS + 1))


@numba.njit(inline="always")
def _scores(rows, k, block, q, q_row, pairs, out):  # type: ignore[no-untyped-def]
    if rows == 6:
        _s6(k, block, q, q_row, pairs, out)
    elif rows == 5:
        _s5(k, block, q, q_row, pairs, out)
    elif rows == 4:
        _s4(k, block, q, q_row, pairs, out)
    elif rows == 3:
        _s3(k, block, q, q_row, pairs, out)
    elif rows == 2:
        _s2(k, block, q, q_row, pairs, out)
    else:
        _s1(k, block, q, q_row, pairs, out)


@numba.njit(inline="always")
def _mix4(rows, v, block, weights, row, pairs, out):  # type: ignore[no-untyped-def]
    if rows == 6:
        _w6(v, block, weights, row, pairs, out)
    elif rows == 5:
        _w5(v, block, weights, row, pairs, out)
    elif rows == 4:
        _w4(v, block, weights, row, pairs, out)
    elif rows == 3:
        _w3(v, block, weights, row, pairs, out)
    elif rows == 2:
        _w2(v, block, weights, row, pairs, out)
    else:
        _w1(v, block, weights, row, pairs, out)


@numba.njit(inline="always")
def _mix2(rows, v, block, weights, row, pairs, out):  # type: ignore[no-untyped-def]
    if rows == 6:
        _h6(v, block, weights, row, pairs, out)
    elif rows == 5:
        _h5(v, block, weights, row, pairs, out)
    elif rows == 4:
        _h4(v, block, weights, row, pairs, out)
    elif rows == 3:
        _h3(v, block, weights, row, pairs, out)
    elif rows == 2:
        _h2(v, block, weights, row, pairs, out)
    else:
        _h1(v, block, weights, row, pairs, out)


def _prefill(arguments):  # type: ignore[no-untyped-def]
    a = carray(arguments, (20,))
    count, items, tables, columns, most, scratch, size = a[1], a[2], a[3], a[4], a[5], a[6], a[7]
    group, kv_heads, dim, page_size, page_bytes = a[8], a[9], a[10], a[11], a[12]
    scale = carray(simd.f32_at(a[13]), (1,))[0]
    counter, q, out, pool, q_row, window = a[14], a[15], a[16], a[17], a[18], a[19]

    number = np.int64(team.thread_number())
    pairs = dim // 2
    v_offset = kv_heads * page_size * dim * 2
    keys_block, values_block = pairs * 64, KEYS * 32
    k_at = scratch + number * size
    v_at = k_at + KEYS * dim * 2
    scores_at = v_at + KEYS * dim * 2
    weights_at = scores_at + ROWS * KEYS * 4
    mixed_at = weights_at + ROWS * KEYS * 2
    sums_at = mixed_at + ROWS * SPAN * 4
    q_at = sums_at + most * dim * 4
    tops = carray(simd.f32_at(q_at + most * dim * 2), (most,))
    totals = carray(simd.f32_at(q_at + most * dim * 2 + most * 4), (most,))

    while True:
        taken = simd.take(counter)
        if taken >= count * kv_heads:
            break
        item = carray(simd.i64_at(items + taken // kv_heads * 32), (4,))
        head = taken % kv_heads
        # The sequence, its first token's row in q, that token's place in the sequence, and how many tokens.
        sequence, first_row, position, tokens = item[0], item[1], item[2], item[3]
        rows = tokens * group
        table = carray(simd.i64_at(tables + sequence * columns * 8), (columns,))
        base = pool + head * page_size * dim * 2
        for token in range(tokens):
            source = carray(simd.u16_at(q + ((first_row + token) * q_row + head * group * dim) * 2), (group * dim,))
            target = carray(simd.u16_at(q_at + token * group * dim * 2), (group * dim,))
            for i in range(group * dim):
                target[i] = source[i]
        for row in range(rows):
            tops[row], totals[row] = LEAST, np.float32(0)
        sums = carray(simd.f32_at(sums_at), (rows * dim,))
        for i in range(rows * dim):
            sums[i] = np.float32(0)

        end = position + tokens
        begin = max(0, position + 1 - window) if window else 0
        for first in range(begin // KEYS * KEYS, end, KEYS):
            held = min(KEYS, end - first)
            for at in range(max(0, begin - first) // STEP * STEP, held, STEP):
                token = first + at
                k = base + table[token // page_size] * page_bytes + token % page_size * dim * 2
                simd_attention.pack_keys(k, dim * 2, pairs, k_at + at // STEP * keys_block)
                for d in range(0, dim, WIDTH):
                    to = v_at + d // STEP * values_block + at // 2 * 64
                    simd_attention.pack_values(k + v_offset + d * 2, dim * 2, held - at, to, values_block)

            for done in range(0, rows, ROWS):
                own = min(ROWS, rows - done)
                last = position + (done + own - 1) // group
                seen = min(held, last + 1 - first)
                if seen <= 0:
                    continue
                hidden = max(0, position + done // group + 1 - window - first) // STEP * STEP if window else 0
                if hidden >= seen:
                    continue
                for at in range(hidden // SPAN * SPAN, seen, SPAN):
                    _scores(
                        own,
                        k_at + at // STEP * keys_block,
                        keys_block,
                        q_at + done * dim * 2,
                        dim * 2,
                        pairs,
                        scores_at + at * 4,
                    )
                span = (seen + STEP - 1) // STEP * STEP
                for i in range(own):
                    row = done + i
                    place = position + row // group
                    start = max(0, place + 1 - window - first) if window else 0
                    stop = min(held, place + 1 - first)
                    weights = carray(simd.u16_at(weights_at + i * KEYS * 2), (KEYS,))
                    values = carray(simd.f32_at(sums_at + row * dim * 4), (dim,))
                    if stop <= start:
                        for j in range(hidden, span):
                            weights[j] = np.uint16(0)
                        continue
                    scores = carray(simd.f32_at(scores_at + i * KEYS * 4), (KEYS,))
                    for j in range(hidden, start):
                        scores[j] = LEAST
                    for j in range(stop, span):
                        scores[j] = LEAST
                    bytes_seen, of = (span - hidden) * 4, scores_at + (i * KEYS + hidden) * 4
                    top = max(tops[row], simd_attention.largest(of, bytes_seen) * scale)
                    to = weights_at + (i * KEYS + hidden) * 2
                    total = simd_attention.weigh(of, bytes_seen, scale, top, to)
                    if top > tops[row]:
                        factor = maths.exp((tops[row] - top) * LN2)
                        total += totals[row] * factor
                        for d in range(dim):
                            values[d] *= factor
                        tops[row], totals[row] = top, total
                    else:
                        totals[row] += total
                of = weights_at + hidden * 2
                for d in range(0, dim, SPAN):
                    v = v_at + d // STEP * values_block + hidden * 32
                    width = min(SPAN, dim - d)
                    if width == SPAN:
                        _mix4(own, v, values_block, of, KEYS * 2, (span - hidden) // 2, mixed_at)
                    else:
                        _mix2(own, v, values_block, of, KEYS * 2, (span - hidden) // 2, mixed_at)
                    for i in range(own):
                        mixed = carray(simd.f32_at(mixed_at + i * width * 4), (width,))
                        values = carray(simd.f32_at(sums_at + ((done + i) * dim + d) * 4), (width,))
                        for j in range(width):
                            values[j] += mixed[j]

        for row in range(rows):
            values = carray(simd.f32_at(sums_at + row * dim * 4), (dim,))
            place = ((first_row + row // group) * kv_heads + head) * group + row % group
            y = carray(simd.u16_at(out + place * dim * 2), (dim,))
            for d in range(dim):
                y[d] = maths.narrow(values[d] / totals[row])


_kernel = team.kernel(_prefill)


class PagedPrefill:
    """Attention of several new tokens each of some sequences; planned once a step.

    `pool` is [pages, layers, 2, kv_heads, page_size, head_dim] bfloat16; the new tokens' KV is in it already. Sizes
    are those that `attention.fits` takes. `planned` are the first arguments of a call, which `plan` changes.
    """

    def __init__(self, pool: torch.Tensor, heads: int, scale: float) -> None:
        _, _, _, self._kv_heads, self._page_size, self._dim = pool.shape
        self._group = heads // self._kv_heads
        self._pool = pool
        self._layer_bytes = pool.stride(1) * 2
        self._page_bytes = pool.stride(0) * 2
        self._tokens = max(1, ITEM // self._group)
        self._scratch = aligned(0)
        self._plan: tuple[np.ndarray, ...] = ()
        self._scale = np.array([scale * LOG2E], dtype=np.float32)
        self._counters = np.zeros(pool.shape[1], dtype=np.int64)
        sizes = self._group, self._kv_heads, self._dim, self._page_size, self._page_bytes
        self.planned = np.array([0] * 8 + [*sizes, self._scale.ctypes.data], dtype=np.int64)

    def plan(
        self, rows: Sequence[int], counts: Sequence[int], contexts: Sequence[int], page_table: torch.Tensor
    ) -> None:
        """The sequences: first rows in q and out, new tokens, tokens in all, and pages [S, columns] int64."""
        # Enough items for all threads to end at about the same time.
        parts = ITEMS_A_THREAD * torch.get_num_threads()
        tokens = min(self._tokens, max(LEAST_TOKENS, sum(counts) * self._kv_heads // parts))
        items = [
            (sequence, row + done, context - count + done, min(tokens, count - done))
            for sequence, (row, count, context) in enumerate(zip(rows, counts, contexts, strict=True))
            for done in range(0, count, tokens)
        ]
        items.sort(key=lambda item: -item[3] * (item[2] + item[3]))  # what takes longest first
        order = np.array(items, dtype=np.int64)
        table = np.ascontiguousarray(page_table.numpy())
        most = self._tokens * self._group
        size = KEYS * self._dim * 4 + ROWS * (KEYS * 6 + SPAN * 4) + most * (self._dim * 6 + 8)
        size = -(-size // 64) * 64
        threads = torch.get_num_threads()
        if len(self._scratch) < threads * size:
            self._scratch = aligned(threads * size)
        self._plan = (order, table)  # alive while the kernel reads them
        numbers = len(order), order.ctypes.data, table.ctypes.data, table.shape[1]
        self.planned[:8] = [threads, *numbers, most, self._scratch.data_ptr(), size]
        self._counters[:] = 0  # each layer's calls take items from their own

    def call(self, layer: int, q: torch.Tensor, out: torch.Tensor, window: int = 0) -> team.Call:
        """What `run` runs."""
        counter = self._counters[layer:].ctypes.data
        pool = self._pool.data_ptr() + layer * self._layer_bytes
        own = q.data_ptr(), out.data_ptr(), pool, q.stride(0), window
        return team.Call.of(_kernel, *self.planned, counter, *own)

    def run(self, layer: int, q: torch.Tensor, out: torch.Tensor, window: int = 0) -> None:
        """Attend in `layer`: q [T, heads, head_dim] bfloat16, out [T, heads * head_dim], contiguous.

        Once after a plan. Only the planned rows of `out` are written. With `window`, a token sees only so many,
        itself included.
        """
        self.call(layer, q, out, window).run()

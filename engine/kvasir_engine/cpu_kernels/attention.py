"""Attention of decoding sequences over the paged pool, read where it lies.

The context is divided into segments of a fixed length, and the parts of a segmented softmax are joined at the end
(flash-decoding: Dao et al. 2023). Segments are worked on in the order of their place in the sequences, so what
sequences share of their beginning is read from memory once for all of them.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numba import carray

from kvasir_engine.cpu_kernels import maths, simd, simd_attention, team
from kvasir_engine.cpu_kernels.lanes import LANES
from kvasir_engine.cpu_kernels.linear import aligned

SEGMENT = 256
"""Tokens of a segment: a head's KV of them stays in a core's cache for the next sequence that has it too."""

STEP = LANES
"""Tokens whose scores are one register; a page has a multiple of them."""

WIDTH = 2 * STEP
"""Dimensions that `mix` takes at once; a head has a multiple of them."""

AHEAD = 2 * STEP
"""Tokens from the one whose scores are computed to the one whose K is asked for."""

LEAST = np.float32(-1e30)
"""Stands for minus infinity; its weight beside any score is zero."""

LOG2E, LN2 = 1.4426950408889634, np.float32(0.6931471805599453)
"""Scores are weighed by powers of 2."""

_MIXED = np.array(simd_attention.MIXED, dtype=np.int64)


def _attend(arguments):  # type: ignore[no-untyped-def]
    a = carray(arguments, (23,))
    threads, sequences, tables, columns, segments, parts, scratch = a[0], a[1], a[2], a[3], a[4], a[5], a[6]
    rows = carray(simd.i64_at(a[7]), (sequences,))
    contexts = carray(simd.i64_at(a[8]), (sequences,))
    starts = carray(simd.i64_at(a[9]), (segments + 1,))
    active = carray(simd.i64_at(a[10]), (segments,))
    group, kv_heads, dim, page_size, page_bytes = a[11], a[12], a[13], a[14], a[15]
    mixed = carray(simd.i64_at(a[16]), (WIDTH,))
    q, out, pool, q_row, window = a[18], a[19], a[20], a[21], a[22]

    number = np.int64(team.thread_number())
    scale = carray(simd.f32_at(a[17]), (1,))[0]
    v_offset = kv_heads * page_size * dim * 2
    part_row = (dim + STEP) * 4
    part = group * part_row
    own = scratch + number * (group * SEGMENT * 6 + STEP * dim * 2 + dim * 4)
    weights_at = own + group * SEGMENT * 4
    tail_at = weights_at + group * SEGMENT * 2
    sums = carray(simd.f32_at(tail_at + STEP * dim * 2), (dim,))

    items = starts[segments]
    segment, end = 0, (number + 1) * items // threads
    asked = 0  # up to where the item's K has been asked for
    for item in range(number * items // threads, end):
        while item >= starts[segment + 1]:
            segment += 1
        head = (item - starts[segment]) // active[segment]
        rank = (item - starts[segment]) % active[segment]
        first = segment * SEGMENT
        count = min(SEGMENT, contexts[rank] - first)
        hidden = max(0, contexts[rank] - window - first) if window else 0
        result = parts + item * part
        for g in range(group):
            values = carray(simd.f32_at(result + g * part_row), (dim + STEP,))
            for i in range(dim):
                values[i] = np.float32(0)
            values[dim], values[dim + 1] = LEAST, np.float32(0)
        if hidden >= count:
            asked = 0
            continue
        begin = hidden // STEP * STEP
        table = carray(simd.i64_at(tables + rank * columns * 8), (columns,))
        queries = q + (rows[rank] * q_row + head * group * dim) * 2
        base = pool + head * page_size * dim * 2
        for at in range(begin, count, STEP):
            token = first + at
            k = base + table[token // page_size] * page_bytes + token % page_size * dim * 2
            simd.prefetch(k + v_offset, STEP * dim * 2)
            if asked <= at + AHEAD < count:
                later = token + AHEAD
                simd.prefetch(
                    base + table[later // page_size] * page_bytes + later % page_size * dim * 2, STEP * dim * 2
                )
            for g in range(group):
                simd_attention.scores(queries + g * dim * 2, k, dim // 2, own + (g * SEGMENT + at) * 4)
        length = (count - begin + STEP - 1) // STEP * STEP
        for g in range(group):
            scores = carray(simd.f32_at(own + g * SEGMENT * 4), (SEGMENT,))
            for i in range(begin, hidden):
                scores[i] = LEAST
            for i in range(count, begin + length):
                scores[i] = LEAST
            top = simd_attention.largest(own + (g * SEGMENT + begin) * 4, length * 4) * scale
            to = weights_at + (g * SEGMENT + begin) * 2
            values = carray(simd.f32_at(result + g * part_row), (dim + STEP,))
            values[dim + 1] = simd_attention.weigh(own + (g * SEGMENT + begin) * 4, length * 4, scale, top, to)
            values[dim] = top
        # While V is summed up the next item's K is brought near: else memory would rest.
        asked = coming = 0
        if item + 1 < end:
            following = segment
            while item + 1 >= starts[following + 1]:
                following += 1
            place = item + 1 - starts[following]
            rank = place % active[following]
            next_first = following * SEGMENT
            coming = min(SEGMENT, contexts[rank] - next_first)
            asked = max(0, contexts[rank] - window - next_first) // STEP * STEP if window else 0
            next_table = carray(simd.i64_at(tables + rank * columns * 8), (columns,))
            next_base = pool + place // active[following] * page_size * dim * 2
        for at in range(begin, count, STEP):
            if asked < coming:
                later = next_first + asked
                simd.prefetch(
                    next_base + next_table[later // page_size] * page_bytes + later % page_size * dim * 2,
                    STEP * dim * 2,
                )
                asked += STEP
            token = first + at
            v = base + v_offset + table[token // page_size] * page_bytes + token % page_size * dim * 2
            if at + STEP > count:
                # What is beyond the last token is not ours, and zero times a stray NaN would not be zero.
                last = carray(simd.u16_at(v), (STEP * dim,))
                tail = carray(simd.u16_at(tail_at), (STEP * dim,))
                for i in range(STEP * dim):
                    tail[i] = np.uint16(0)
                for i in range((count - at) * dim):
                    tail[i] = last[i]
                v = tail_at
            for g in range(group):
                for chunk in range(0, dim, WIDTH):
                    of = weights_at + (g * SEGMENT + at) * 2
                    simd_attention.mix(of, v + chunk * 2, dim * 2, result + g * part_row + chunk * 4)

    team.barrier()
    pairs = sequences * kv_heads
    for pair in range(number * pairs // threads, (number + 1) * pairs // threads):
        rank, head = pair // kv_heads, pair % kv_heads
        count = (contexts[rank] + SEGMENT - 1) // SEGMENT
        for g in range(group):
            top = LEAST
            for i in range(count):
                at = parts + (starts[i] + head * active[i] + rank) * part + g * part_row
                top = max(top, carray(simd.f32_at(at), (dim + STEP,))[dim])
            total = np.float32(0)
            for d in range(dim):
                sums[d] = np.float32(0)
            for i in range(count):
                at = parts + (starts[i] + head * active[i] + rank) * part + g * part_row
                values = carray(simd.f32_at(at), (dim + STEP,))
                weight = maths.exp((values[dim] - top) * LN2)
                total += weight * values[dim + 1]
                for d in range(dim):
                    sums[d] += weight * values[d]
            y = carray(simd.u16_at(out + ((rows[rank] * kv_heads + head) * group + g) * dim * 2), (dim,))
            for chunk in range(0, dim, WIDTH):
                for i in range(WIDTH):
                    y[chunk + mixed[i]] = maths.narrow(sums[chunk + i] / total)


_kernel = team.kernel(_attend)


def fits(group: int, head_dim: int, page_size: int) -> bool:
    """Whether heads and pages of these sizes can be read in whole registers."""
    return head_dim % WIDTH == 0 and page_size % STEP == 0 and SEGMENT % page_size == 0 and group <= 16


class PagedDecode:
    """Attention of one new token each of some sequences; planned once a step.

    `pool` is [pages, layers, 2, kv_heads, page_size, head_dim] bfloat16; the new tokens' KV is in it already.
    `planned` are the first arguments of a call, which `plan` changes.
    """

    def __init__(self, pool: torch.Tensor, heads: int, scale: float) -> None:
        _, _, _, self._kv_heads, self._page_size, self._dim = pool.shape
        self._group = heads // self._kv_heads
        self._pool = pool
        self._layer_bytes = pool.stride(1) * 2
        self._page_bytes = pool.stride(0) * 2
        self._parts = self._scratch = aligned(0)
        self._plan: tuple[np.ndarray, ...] = ()
        self._scale = np.array([scale * LOG2E], dtype=np.float32)
        addresses = _MIXED.ctypes.data, self._scale.ctypes.data
        sizes = self._group, self._kv_heads, self._dim, self._page_size, self._page_bytes
        self.planned = np.array([0] * 11 + [*sizes, *addresses], dtype=np.int64)

    def plan(self, rows: Sequence[int], contexts: Sequence[int], page_table: torch.Tensor) -> None:
        """The sequences: their rows in q and out, their tokens so far, and their pages [S, columns] int64."""
        lengths = np.array(contexts, dtype=np.int64)
        longest_first = np.argsort(-lengths, kind="stable")
        lengths = lengths[longest_first]
        parts = -(-lengths // SEGMENT)
        segments = int(parts[0])
        active = (parts[:, None] > np.arange(segments)).sum(0)
        starts = np.concatenate(([0], np.cumsum(active * self._kv_heads)))
        table = np.ascontiguousarray(page_table.numpy()[longest_first])
        order = np.array(rows, dtype=np.int64)[longest_first]
        threads = torch.get_num_threads()
        wanted = int(starts[-1]) * self._group * (self._dim + STEP) * 4
        if len(self._parts) < wanted:
            self._parts = aligned(2 * wanted)
        wanted = threads * (self._group * SEGMENT * 6 + STEP * self._dim * 2 + self._dim * 4)
        if len(self._scratch) < wanted:
            self._scratch = aligned(wanted)
        self._plan = (table, order, lengths, starts, active)  # alive while the kernel reads them
        numbers = len(order), table.ctypes.data, table.shape[1], segments
        memory = self._parts.data_ptr(), self._scratch.data_ptr()
        arrays = (each.ctypes.data for each in (order, lengths, starts, active))
        self.planned[:11] = [threads, *numbers, *memory, *arrays]

    def call(self, layer: int, q: torch.Tensor, out: torch.Tensor, window: int = 0) -> team.Call:
        """What `run` runs."""
        pool = self._pool.data_ptr() + layer * self._layer_bytes
        own = q.data_ptr(), out.data_ptr(), pool, q.stride(0), window
        return team.Call.of(_kernel, *self.planned, *own)

    def run(self, layer: int, q: torch.Tensor, out: torch.Tensor, window: int = 0) -> None:
        """Attend in `layer`: q [T, heads, head_dim] bfloat16, out [T, heads * head_dim], contiguous.

        Only the planned rows of `out` are written. With `window`, a token sees only so many, itself included.
        """
        self.call(layer, q, out, window).run()

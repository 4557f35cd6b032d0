"""What lies between the products: norms, rotary positions and the gate, one pass over memory each.

Rows are divided among threads once they are many enough to be worth waking them.
"""

import numpy as np
import torch
from numba import carray

from kvasir_engine.kernels import maths, simd, team

SERIAL = 1 << 14
"""Elements that one thread does alone."""


def _threads(elements: int) -> int:
    return 1 if elements <= SERIAL else torch.get_num_threads()


def _rms_norm(arguments):  # type: ignore[no-untyped-def]
    a = carray(arguments, (8,))
    rows, columns, threads = a[3], a[4], a[6]
    epsilon = carray(simd.f32_at(a[5]), (1,))[0]
    number = np.int64(team.thread_number())
    weight = carray(simd.f32_at(a[1]), (columns,))
    for row in range(number * rows // threads, (number + 1) * rows // threads):
        x = carray(simd.f32_at(a[0] + row * columns * 4), (columns,))
        total = np.float32(0)
        for i in range(columns):
            total += x[i] * x[i]
        scale = np.float32(1) / np.sqrt(total / np.float32(columns) + epsilon)
        if a[7]:
            half = carray(simd.u16_at(a[2] + row * columns * 2), (columns,))
            for i in range(columns):
                half[i] = maths.narrow(x[i] * scale * weight[i])
        else:
            full = carray(simd.f32_at(a[2] + row * columns * 4), (columns,))
            for i in range(columns):
                full[i] = x[i] * scale * weight[i]


def _rotate(arguments):  # type: ignore[no-untyped-def]
    a = carray(arguments, (8,))
    tokens, heads, dim, stride, threads = a[3], a[4], a[5], a[6], a[7]
    half = dim // 2
    number = np.int64(team.thread_number())
    for token in range(number * tokens // threads, (number + 1) * tokens // threads):
        cos = carray(simd.u16_at(a[1] + token * dim * 2), (dim,))
        sin = carray(simd.u16_at(a[2] + token * dim * 2), (dim,))
        for head in range(heads):
            x = carray(simd.u16_at(a[0] + (token * stride + head * dim) * 2), (dim,))
            for i in range(half):
                left, right = maths.widen(x[i]), maths.widen(x[half + i])
                x[i] = maths.narrow(left * maths.widen(cos[i]) + right * maths.widen(sin[i]))
                x[half + i] = maths.narrow(right * maths.widen(cos[half + i]) + left * maths.widen(sin[half + i]))


def _silu_mul(arguments):  # type: ignore[no-untyped-def]
    a = carray(arguments, (5,))
    rows, columns, threads = a[2], a[3], a[4]
    number = np.int64(team.thread_number())
    for row in range(number * rows // threads, (number + 1) * rows // threads):
        gate = carray(simd.u16_at(a[0] + row * columns * 4), (columns,))
        up = carray(simd.u16_at(a[0] + row * columns * 4 + columns * 2), (columns,))
        out = carray(simd.u16_at(a[1] + row * columns * 2), (columns,))
        for i in range(columns):
            g = maths.widen(gate[i])
            # Beyond 80 the gate is open or shut to the last bit.
            shut = maths.exp(min(-g, np.float32(80.0)))
            out[i] = maths.narrow(g / (np.float32(1) + shut) * maths.widen(up[i]))


def _gelu_mul(arguments):  # type: ignore[no-untyped-def]
    a = carray(arguments, (5,))
    rows, columns, threads = a[2], a[3], a[4]
    number = np.int64(team.thread_number())
    for row in range(number * rows // threads, (number + 1) * rows // threads):
        gate = carray(simd.u16_at(a[0] + row * columns * 4), (columns,))
        up = carray(simd.u16_at(a[0] + row * columns * 4 + columns * 2), (columns,))
        out = carray(simd.u16_at(a[1] + row * columns * 2), (columns,))
        for i in range(columns):
            g = maths.widen(gate[i])
            # (1 + tanh(u)) / 2 is 1 / (1 + exp(-2 u)), with u = sqrt(2 / pi) (g + 0.044715 g^3).
            twice = np.float32(1.5957691) * g * (np.float32(1) + np.float32(0.044715) * g * g)
            shut = maths.exp(min(-twice, np.float32(80.0)))
            out[i] = maths.narrow(g / (np.float32(1) + shut) * maths.widen(up[i]))


def _store(arguments):  # type: ignore[no-untyped-def]
    a = carray(arguments, (11,))
    k, v, pool, slots, tokens = a[0], a[1], a[2], a[3], a[4]
    heads, dim, row, head_bytes, v_offset, threads = a[5], a[6], a[7], a[8], a[9], a[10]
    number = np.int64(team.thread_number())
    places = carray(simd.i64_at(slots), (tokens,))
    for token in range(number * tokens // threads, (number + 1) * tokens // threads):
        for head in range(heads):
            target = pool + places[token] + head * head_bytes
            source = (token * row + head * dim) * 2
            for from_, to in ((k + source, target), (v + source, target + v_offset)):
                values, stored = carray(simd.u16_at(from_), (dim,)), carray(simd.u16_at(to), (dim,))
                for i in range(dim):
                    stored[i] = values[i]


_rms_norm_kernel = team.kernel(_rms_norm)
_rotate_kernel = team.kernel(_rotate)
_silu_mul_kernel = team.kernel(_silu_mul)
_gelu_mul_kernel = team.kernel(_gelu_mul)
_store_kernel = team.kernel(_store)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Root mean square norm of x [T, hidden] float32 by weight [hidden] float32, into out, float32 or bfloat16.

    All contiguous; `epsilon` is one float32.
    """
    rows, columns = x.shape
    threads = _threads(rows * columns)
    narrow = out.dtype == torch.bfloat16
    addresses = x.data_ptr(), weight.data_ptr(), out.data_ptr()
    arguments = np.array([*addresses, rows, columns, epsilon.data_ptr(), threads, narrow], dtype=np.int64)
    team.run(_rms_norm_kernel, arguments, threads)
    return out


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Turn x [T, heads, head_dim] bfloat16 in place by factors [T, 1, head_dim] in the halves layout.

    Tokens of x may be apart; the rest is contiguous. The first half of `sin` is negative.
    """
    tokens, heads, dim = x.shape
    threads = _threads(x.numel())
    addresses = x.data_ptr(), cos.data_ptr(), sin.data_ptr()
    arguments = np.array([*addresses, tokens, heads, dim, x.stride(0), threads], dtype=np.int64)
    team.run(_rotate_kernel, arguments, threads)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of [T, 2 * n] bfloat16, contiguous, gate first; [T, n]."""
    return _gated(_silu_mul_kernel, gate_up)


def gelu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """gelu(gate) * up likewise, by the tanh approximation (Hendrycks and Gimpel 2016)."""
    return _gated(_gelu_mul_kernel, gate_up)


def _gated(kernel: int, gate_up: torch.Tensor) -> torch.Tensor:
    rows, columns = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, columns)
    threads = _threads(rows * columns)
    arguments = np.array([gate_up.data_ptr(), out.data_ptr(), rows, columns, threads], dtype=np.int64)
    team.run(kernel, arguments, threads)
    return out


class KVStore:
    """Brings new tokens' K and V into `pool` [pages, layers, 2, kv_heads, page_size, head_dim] bfloat16."""

    def __init__(self, pool: torch.Tensor) -> None:
        _, _, _, self._heads, self._page_size, self._dim = pool.shape
        self._pool = pool
        self._slots = np.empty(0, dtype=np.int64)

    def plan(self, pages: np.ndarray, offsets: np.ndarray) -> None:
        """The page of each of T tokens and its place in it, both [T] int64."""
        self._slots = pages * (self._pool.stride(0) * 2) + offsets * (self._dim * 2)

    def run(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Store k and v [T, kv_heads, head_dim] bfloat16 in `layer`; tokens of both are equally far apart."""
        threads = _threads(2 * k.numel())
        pool = self._pool.data_ptr() + layer * self._pool.stride(1) * 2
        head = self._page_size * self._dim * 2
        addresses = k.data_ptr(), v.data_ptr(), pool, self._slots.ctypes.data
        sizes = len(self._slots), self._heads, self._dim, k.stride(0), head, self._heads * head, threads
        team.run(_store_kernel, np.array([*addresses, *sizes], dtype=np.int64), threads)

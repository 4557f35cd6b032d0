"""What lies between the products: norms, rotary positions and the gate, one pass over memory each.

Rows are divided among threads once they are many enough to be worth waking them.
"""

import numpy as np
import torch
from numba import carray

from kvasir_engine.cpu_kernels import digest, maths, simd, team
from kvasir_engine.kv.digests import STRIPE, KeptDigests, keys_of

SERIAL = 1 << 14
"""Elements that one thread does alone."""


def _threads(elements: int) -> int:
    return 1 if elements <= SERIAL else torch.get_num_threads()


def _rms_norm(arguments):  # type: ignore[no-untyped-def]
    a = carray(arguments, (8,))
    threads, rows, columns = a[0], a[1], a[5]
    epsilon = carray(simd.f32_at(a[6]), (1,))[0]
    number = np.int64(team.thread_number())
    weight = carray(simd.f32_at(a[3]), (columns,))
    for row in range(number * rows // threads, (number + 1) * rows // threads):
        x = carray(simd.f32_at(a[2] + row * columns * 4), (columns,))
        total = np.float32(0)
        for i in range(columns):
            total += x[i] * x[i]
        scale = np.float32(1) / np.sqrt(total / np.float32(columns) + epsilon)
        if a[7]:
            half = carray(simd.u16_at(a[4] + row * columns * 2), (columns,))
            for i in range(columns):
                half[i] = maths.narrow(x[i] * scale * weight[i])
        else:
            full = carray(simd.f32_at(a[4] + row * columns * 4), (columns,))
            for i in range(columns):
                full[i] = x[i] * scale * weight[i]


def _rotate(arguments):  # type: ignore[no-untyped-def]
    a = carray(arguments, (8,))
    threads, tokens, heads, dim, stride = a[0], a[1], a[5], a[6], a[7]
    half = dim // 2
    number = np.int64(team.thread_number())
    for token in range(number * tokens // threads, (number + 1) * tokens // threads):
        cos = carray(simd.u16_at(a[3] + token * dim * 2), (dim,))
        sin = carray(simd.u16_at(a[4] + token * dim * 2), (dim,))
        for head in range(heads):
            x = carray(simd.u16_at(a[2] + (token * stride + head * dim) * 2), (dim,))
            for i in range(half):
                left, right = maths.widen(x[i]), maths.widen(x[half + i])
                x[i] = maths.narrow(left * maths.widen(cos[i]) + right * maths.widen(sin[i]))
                x[half + i] = maths.narrow(right * maths.widen(cos[half + i]) + left * maths.widen(sin[half + i]))


def _silu_mul(arguments):  # type: ignore[no-untyped-def]
    a = carray(arguments, (5,))
    threads, rows, columns = a[0], a[1], a[4]
    number = np.int64(team.thread_number())
    for row in range(number * rows // threads, (number + 1) * rows // threads):
        gate = carray(simd.u16_at(a[2] + row * columns * 4), (columns,))
        up = carray(simd.u16_at(a[2] + row * columns * 4 + columns * 2), (columns,))
        out = carray(simd.u16_at(a[3] + row * columns * 2), (columns,))
        for i in range(columns):
            g = maths.widen(gate[i])
            # Beyond 80 the gate is open or shut to the last bit.
            shut = maths.exp(min(-g, np.float32(80.0)))
            out[i] = maths.narrow(g / (np.float32(1) + shut) * maths.widen(up[i]))


def _gelu_mul(arguments):  # type: ignore[no-untyped-def]
    a = carray(arguments, (5,))
    threads, rows, columns = a[0], a[1], a[4]
    number = np.int64(team.thread_number())
    for row in range(number * rows // threads, (number + 1) * rows // threads):
        gate = carray(simd.u16_at(a[2] + row * columns * 4), (columns,))
        up = carray(simd.u16_at(a[2] + row * columns * 4 + columns * 2), (columns,))
        out = carray(simd.u16_at(a[3] + row * columns * 2), (columns,))
        for i in range(columns):
            g = maths.widen(gate[i])
            # (1 + tanh(u)) / 2 is 1 / (1 + exp(-2 u)), with u = sqrt(2 / pi) (g + 0.044715 g^3).
            twice = np.float32(1.5957691) * g * (np.float32(1) + np.float32(0.044715) * g * g)
            shut = maths.exp(min(-twice, np.float32(80.0)))
            out[i] = maths.narrow(g / (np.float32(1) + shut) * maths.widen(up[i]))


def _store(arguments):  # type: ignore[no-untyped-def]
    a = carray(arguments, (11,))
    threads, tokens, slots, k, v, pool = a[0], a[1], a[2], a[3], a[4], a[5]
    heads, dim, row, head_bytes, v_offset = a[6], a[7], a[8], a[9], a[10]
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


def _store_digested(arguments):  # type: ignore[no-untyped-def]
    a = carray(arguments, (14,))
    threads, tokens, slots, k, v, pool = a[0], a[1], a[2], a[4], a[5], a[6]
    heads, dim, row, head_bytes, v_offset, keys, digests = a[7], a[8], a[9], a[10], a[11], a[12], a[13]
    number = np.int64(team.thread_number())
    places, cells = carray(simd.i64_at(slots), (tokens,)), carray(simd.i64_at(a[3]), (tokens,))
    memory = np.zeros(digest.SUMS + 8, np.int64)
    sums = -(-memory.ctypes.data // STRIPE) * STRIPE
    for token in range(number * tokens // threads, (number + 1) * tokens // threads):
        target, own = pool + places[token], keys
        for part in range(2):
            source = (v if part else k) + token * row * 2
            for head in range(heads):
                from_, to = source + head * dim * 2, target + part * v_offset + head * head_bytes
                digest.store(from_, to, dim * 2, own, sums)
                own += dim * 2
        carray(simd.i64_at(digests + cells[token]), (1,))[0] = digest.finish(sums)
    memory[0] = 0  # numba frees an array after the last line that names it, and the sums are in this one


_rms_norm_kernel = team.kernel(_rms_norm)
_rotate_kernel = team.kernel(_rotate)
_silu_mul_kernel = team.kernel(_silu_mul)
_gelu_mul_kernel = team.kernel(_gelu_mul)
_store_kernel = team.kernel(_store)
_store_digested_kernel = team.kernel(_store_digested)


class Norm:
    """Root mean square norm by `weight` [hidden] float32."""

    def __init__(self, weight: torch.Tensor, epsilon: float) -> None:
        self._weight, self._epsilon = weight, torch.tensor([epsilon])

    def __call__(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """Of x [T, hidden] float32 into out, float32 or bfloat16, both contiguous."""
        self.call(x, out, _threads(x.numel())).run()
        return out

    def call(self, x: torch.Tensor, out: torch.Tensor, threads: int) -> team.Call:
        """What that runs."""
        addresses = x.data_ptr(), self._weight.data_ptr(), out.data_ptr()
        narrow = out.dtype == torch.bfloat16
        return team.Call.of(
            _rms_norm_kernel, threads, len(x), *addresses, x.shape[1], self._epsilon.data_ptr(), narrow
        )


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Turn x [T, heads, head_dim] bfloat16 in place by factors [T, 1, head_dim] in the halves layout.

    Tokens of x may be apart; the rest is contiguous. The first half of `sin` is negative.
    """
    rotation(x, cos, sin, _threads(x.numel())).run()


def rotation(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, threads: int) -> team.Call:
    """What `rotate` runs."""
    addresses = x.data_ptr(), cos.data_ptr(), sin.data_ptr()
    return team.Call.of(_rotate_kernel, threads, x.shape[0], *addresses, x.shape[1], x.shape[2], x.stride(0))


class Gate:
    """activation(gate) * up."""

    def __init__(self, kernel: int) -> None:
        self._kernel = kernel

    def __call__(self, gate_up: torch.Tensor) -> torch.Tensor:
        """Of [T, 2 * n] bfloat16, contiguous, gate first; [T, n]."""
        out = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
        self.call(gate_up, out, _threads(out.numel())).run()
        return out

    def call(self, gate_up: torch.Tensor, out: torch.Tensor, threads: int) -> team.Call:
        """What that runs, into `out`."""
        return team.Call.of(self._kernel, threads, len(out), gate_up.data_ptr(), out.data_ptr(), out.shape[1])


silu_mul = Gate(_silu_mul_kernel)
gelu_mul = Gate(_gelu_mul_kernel)
"""By the tanh approximation (Hendrycks and Gimpel 2016)."""


class KVStore:
    """Brings new tokens' K and V into `pool` [pages, layers, 2, kv_heads, page_size, head_dim] bfloat16.

    With `kept`, the tokens' digests into that as well, from the same pass over the rows. `planned` are the first
    arguments of a call, which `plan` changes.
    """

    def __init__(self, pool: torch.Tensor, kept: KeptDigests | None = None) -> None:
        _, _, _, self._heads, self._page_size, self._dim = pool.shape
        self._pool = pool
        self._kept = kept
        self._keys = keys_of(2 * self._heads * self._dim * 2)
        self._slots = self._cells = np.empty(0, dtype=np.int64)
        self.planned = np.zeros(3 if kept is None else 4, dtype=np.int64)

    def plan(self, pages: np.ndarray, offsets: np.ndarray) -> None:
        """The page of each of T tokens and its place in it, both [T] int64."""
        self._slots = pages * (self._pool.stride(0) * 2) + offsets * (self._dim * 2)
        elements = 2 * len(pages) * self._heads * self._dim
        self.planned[:3] = [_threads(elements), len(pages), self._slots.ctypes.data]
        if self._kept is not None:
            page, _, token = self._kept.table.strides
            self._cells = pages * page + offsets * token
            self.planned[3] = self._cells.ctypes.data

    def call(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> team.Call:
        """What `run` runs."""
        pool = self._pool.data_ptr() + layer * self._pool.stride(1) * 2
        head = self._page_size * self._dim * 2
        sizes = self._heads, self._dim, k.stride(0), head, self._heads * head
        arguments = *self.planned, k.data_ptr(), v.data_ptr(), pool, *sizes
        if self._kept is None:
            return team.Call.of(_store_kernel, *arguments)
        digests = self._kept.table[:, layer].ctypes.data
        return team.Call.of(_store_digested_kernel, *arguments, self._keys.ctypes.data, digests)

    def run(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Store k and v [T, kv_heads, head_dim] bfloat16 in `layer`; tokens of both are equally far apart."""
        self.call(layer, k, v).run()

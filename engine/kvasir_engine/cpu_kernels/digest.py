"""Digests of tokens (`kv/digests.py` says what they are), of rows that are a multiple of 64 bytes long."""

import ctypes
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from kvasir_engine.cpu_kernels import lanes, simd, team
from kvasir_engine.kv.digests import FOLD, MIX, SHIFT_BYTES, STRIPE, Digests, keys_of, keys_of_places

SUMS = 16
"""Words that the two sums of a token take while they are added up, in 8 lanes each; they begin and end as zero."""

WORDS = ir.VectorType(lanes.I64, 8)


def _adding(stores: bool) -> Any:
    """What adds `size` bytes at `row` to the sums at `sums`, and with `stores` copies them `to` there."""

    @intrinsic
    def add(typing: Any, row: Any, to: Any, size: Any, keys: Any, sums: Any) -> Any:
        def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
            row, to, size, keys, sums = arguments
            low, half = ir.Constant(WORDS, [0xFFFFFFFF] * 8), ir.Constant(WORDS, [32] * 8)
            places = sums, b.add(sums, lanes.const(STRIPE))
            starts = [lanes.load(b, at, WORDS, 8) for at in places]
            before, loop, after = b.block, b.append_basic_block("stripes"), b.append_basic_block("added")
            b.branch(loop)
            b.position_at_end(loop)
            offset, totals = b.phi(lanes.I64), [b.phi(WORDS) for _ in starts]
            data = lanes.load(b, b.add(row, offset), lanes.PAIRS, 4)
            if stores:
                lanes.store(b, data, b.add(to, offset), 4)
            sums_then = []
            for total, shift in zip(totals, (0, SHIFT_BYTES), strict=True):
                key = lanes.load(b, b.add(keys, b.add(offset, lanes.const(shift))), lanes.PAIRS, 4)
                keyed = b.bitcast(b.add(data, key), WORDS)
                sums_then.append(b.add(total, b.mul(b.and_(keyed, low), b.lshr(keyed, half))))
            following = b.add(offset, lanes.const(STRIPE))
            b.cbranch(b.icmp_signed("<", following, size), loop, after)
            offset.add_incoming(lanes.const(0), before)
            offset.add_incoming(following, loop)
            for total, start, then in zip(totals, starts, sums_then, strict=True):
                total.add_incoming(start, before)
                total.add_incoming(then, loop)
            b.position_at_end(after)
            for then, at in zip(sums_then, places, strict=True):
                lanes.store(b, then, at, 8)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5), codegen

    return add


add, store = _adding(False), _adding(True)


@intrinsic
def finish(typing: Any, sums: Any) -> Any:
    """A token's digest from its sums, which are zero then."""

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        (sums,) = arguments
        totals = []
        for at in (sums, b.add(sums, lanes.const(STRIPE))):
            vector = lanes.load(b, at, WORDS, 8)
            totals.append(lanes.instruction(b, "llvm.vector.reduce.add.v8i64", lanes.I64, [vector]))
            lanes.store(b, ir.Constant(WORDS, [0] * 8), at, 8)
        value, second = totals
        for shift, factor in MIX:
            value = b.mul(b.xor(value, b.lshr(value, lanes.const(shift))), lanes.const(factor))
        value = b.add(value, b.mul(second, lanes.const(FOLD)))
        return b.select(b.icmp_unsigned("==", value, lanes.const(0)), lanes.const(1), value)

    return types.int64(types.int64), codegen


def _pieces(arguments):  # type: ignore[no-untyped-def]
    a = carray(arguments, (10,))
    count, parts, heads, tokens, row, head_bytes, part_bytes, keys = a[1], a[3], a[4], a[5], a[6], a[7], a[8], a[9]
    out, places = carray(simd.i64_at(a[0]), (count * tokens,)), carray(simd.i64_at(a[2]), (count,))
    memory = np.zeros(tokens * SUMS + 8, np.int64)
    sums = -(-memory.ctypes.data // STRIPE) * STRIPE
    for piece in range(count):
        for part in range(parts):
            for head in range(heads):
                rows = places[piece] + part * part_bytes + head * head_bytes
                own = keys + (part * heads + head) * row
                for token in range(tokens):
                    add(rows + token * row, np.int64(0), row, own, sums + token * SUMS * 8)
        for token in range(tokens):
            out[piece * tokens + token] = finish(sums + token * SUMS * 8)
    memory[0] = 0  # numba frees an array after the last line that names it, and the sums are in this one


def _fold(arguments):  # type: ignore[no-untyped-def]
    a = carray(arguments, (5,))
    blocks, cells = a[1], a[2]
    out, keys = carray(simd.u64_at(a[0]), (blocks,)), carray(simd.u64_at(a[4]), (cells,))
    for block in range(blocks):
        tokens = carray(simd.u64_at(a[3] + block * cells * 8), (cells,))
        total = np.uint64(0)
        for i in range(cells):
            value = tokens[i] ^ keys[i]
            value = (value ^ (value >> np.uint64(MIX[0][0]))) * np.uint64(MIX[0][1])
            value = (value ^ (value >> np.uint64(MIX[1][0]))) * np.uint64(MIX[1][1])
            total += value ^ (value >> np.uint64(MIX[2][0]))
        out[block] = total


_Kernel = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
"""A call lets go of the GIL."""
_pieces_kernel, _fold_kernel = _Kernel(team.kernel(_pieces)), _Kernel(team.kernel(_fold))


def token_digests(
    places: np.ndarray[Any, np.dtype[np.int64]],
    parts: int,
    heads: int,
    tokens: int,
    row: int,
    head_bytes: int,
    part_bytes: int,
) -> Digests:
    """Of pieces of memory at the addresses `places` [N], each a layer of a block: [N, tokens].

    A piece has `parts` (K, then V), `part_bytes` apart: `heads` heads of each, `head_bytes` apart, of `tokens` rows
    of `row` bytes.
    """
    places = np.ascontiguousarray(places)
    out, keys = np.empty((len(places), tokens), np.uint64), keys_of(parts * heads * row)
    sizes = parts, heads, tokens, row, head_bytes, part_bytes
    addresses = out.ctypes.data, len(places), places.ctypes.data
    arguments = np.array([*addresses, *sizes, keys.ctypes.data], np.int64)
    _pieces_kernel(arguments.ctypes.data)
    return out


def page_digests(tokens: Digests, first: int) -> list[int]:
    """As `kv/digests.py` has it."""
    blocks, layers, size = tokens.shape
    tokens = np.ascontiguousarray(tokens)
    keys, out = keys_of_places(first + layers, size)[first:], np.empty(blocks, np.uint64)
    addresses = tokens.ctypes.data, keys.ctypes.data
    # A name, so that it lives while the kernel reads it.
    arguments = np.array([out.ctypes.data, blocks, layers * size, *addresses], np.int64)
    _fold_kernel(arguments.ctypes.data)
    digests: list[int] = out.tolist()
    return digests

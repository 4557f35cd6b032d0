"""What numba's Python cannot say of attention: scores, their softmax, the sums of V. Addresses are int64."""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from kvasir_engine.cpu_kernels import lanes
from kvasir_engine.cpu_kernels.lanes import LANES


@intrinsic
def scores(typing: Any, q: Any, k: Any, pairs: Any, out: Any) -> Any:
    """Dot products of one q with the k of 16 tokens: (q, k, pairs of a head, out).

    q is [pairs, 2] bfloat16, k is [16, pairs, 2] bfloat16, out becomes [16] float32; `pairs` is a multiple of 16.
    """

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        q, k, pairs, out = arguments
        row = b.mul(pairs, lanes.const(4))
        before, loop, after = b.block, b.append_basic_block("dims"), b.append_basic_block("summed")
        b.branch(loop)
        b.position_at_end(loop)
        offset = b.phi(lanes.I64)
        sums = [b.phi(lanes.FLOATS) for _ in range(LANES)]
        query = lanes.pairs_at(b, b.add(q, offset), 4)
        added = []
        for token in range(LANES):
            key = lanes.pairs_at(b, b.add(b.add(k, b.mul(row, lanes.const(token))), offset), 4)
            added.append(lanes.dot(b, sums[token], query, key))
        following = b.add(offset, lanes.const(64))
        b.cbranch(b.icmp_signed("<", following, row), loop, after)
        offset.add_incoming(lanes.const(0), before)
        offset.add_incoming(following, loop)
        for token in range(LANES):
            sums[token].add_incoming(ir.Constant(lanes.FLOATS, [0.0] * LANES), before)
            sums[token].add_incoming(added[token], loop)
        b.position_at_end(after)
        lanes.store(b, _sum_each(b, added), out, 64)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), codegen


def _sum_each(b: Any, vectors: list[Any]) -> Any:
    """The sums of 16 vectors' lanes, as one vector: neighbours are folded into each other's lanes, four times."""
    width = 1
    while len(vectors) > 1:
        folded = []
        for left, right in zip(vectors[::2], vectors[1::2], strict=True):
            # Lane i of the result has bit `width` of i from which vector it is, and sums two lanes of it.
            low = [(i & ~width) + (LANES if i & width else 0) for i in range(LANES)]
            high = [i + width for i in low]
            folded.append(b.fadd(*(lanes.shuffle(b, left, right, taken) for taken in (low, high))))
        vectors, width = folded, 2 * width
    return vectors[0]


@intrinsic
def mix(typing: Any, weights: Any, v: Any, row: Any, out: Any) -> Any:
    """Add 16 tokens' v, each times its weight, for 32 dimensions: (weights, v, bytes a token of v, out).

    weights is [8, 2] bfloat16, v is [16, 32] bfloat16; out is [32] float32 in the order of `MIXED`.
    """

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        weights, v, row, out = arguments
        words = ir.VectorType(ir.IntType(16), 2 * LANES)
        low = lanes.load(b, out, lanes.FLOATS, 64)
        high = lanes.load(b, b.add(out, lanes.const(64)), lanes.FLOATS, 64)
        # Words of two tokens are paired within each 128 bits, as VPUNPCKLWD and VPUNPCKHWD do.
        order = [[8 * (i // 8) + start + i % 8 // 2 + 2 * LANES * (i % 2) for i in range(32)] for start in (0, 4)]
        for pair in range(LANES // 2):
            weight = lanes.same_pair(b, b.add(weights, lanes.const(4 * pair)))
            first, second = (
                lanes.load(b, b.add(v, b.mul(row, lanes.const(2 * pair + i))), words, 4) for i in range(2)
            )
            masks = (ir.Constant(ir.VectorType(lanes.I32, 2 * LANES), taken) for taken in order)
            lows, highs = (b.bitcast(b.shuffle_vector(first, second, mask), lanes.HALVES) for mask in masks)
            low, high = lanes.dot(b, low, weight, lows), lanes.dot(b, high, weight, highs)
        lanes.store(b, low, out, 64)
        lanes.store(b, high, b.add(out, lanes.const(64)), 64)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), codegen


MIXED = tuple(8 * (i % 16 // 4) + 4 * (i // 16) + i % 4 for i in range(32))
"""The dimension of each element of `mix`'s result."""


@intrinsic
def pack_keys(typing: Any, k: Any, row: Any, pairs: Any, out: Any) -> Any:
    """Turn 16 tokens' k [16, pairs, 2], `row` bytes a token, into [pairs, 16, 2], bfloat16; 16 pairs at a time."""

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        k, row, pairs, out = arguments
        size = b.mul(pairs, lanes.const(4))
        before, loop, after = b.block, b.append_basic_block("pairs"), b.append_basic_block("packed")
        b.branch(loop)
        b.position_at_end(loop)
        offset = b.phi(lanes.I64)
        at = b.add(k, offset)
        vectors = [
            lanes.load(b, b.add(at, b.mul(row, lanes.const(token))), lanes.PAIRS, 4) for token in range(LANES)
        ]
        for vector, pair in zip(_transposed(b, vectors), range(LANES), strict=True):
            lanes.store(b, vector, b.add(out, b.add(b.mul(offset, lanes.const(LANES)), lanes.const(64 * pair))), 64)
        following = b.add(offset, lanes.const(64))
        offset.add_incoming(lanes.const(0), before)
        offset.add_incoming(following, loop)
        b.cbranch(b.icmp_signed("<", following, size), loop, after)
        b.position_at_end(after)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), codegen


def _transposed(b: Any, vectors: list[Any]) -> list[Any]:
    """16 vectors of 16 lanes with lanes and vectors exchanged, a bit of their numbers at a time."""
    for bit in (1, 2, 4, 8):
        kept = [lane + (LANES - bit if lane & bit else 0) for lane in range(LANES)]
        other = [lane + (LANES if lane & bit else bit) for lane in range(LANES)]
        turned = list(vectors)
        for i in range(LANES):
            if not i & bit:
                for place, taken in ((i, kept), (i | bit, other)):
                    turned[place] = lanes.shuffle(b, vectors[i], vectors[i | bit], taken)
        vectors = turned
    return vectors


@intrinsic
def pack_values(typing: Any, v: Any, row: Any, tokens: Any, out: Any, block: Any) -> Any:
    """Pair 16 tokens' v for 32 dimensions: (v, bytes a token of v, tokens that count, out, bytes a block of out).

    v is [16, 32] bfloat16; out becomes two blocks, each [8, 16, 2]: of two tokens, the values of 16 dimensions.
    Tokens from `tokens` on become zero, whatever they hold.
    """

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        v, row, tokens, out, block = arguments
        words = ir.VectorType(ir.IntType(16), 2 * LANES)
        zero = ir.Constant(words, [0] * 2 * LANES)
        rows = []
        for token in range(LANES):
            value = lanes.load(b, b.add(v, b.mul(row, lanes.const(token))), words, 4)
            rows.append(b.select(b.icmp_signed("<", lanes.const(token), tokens), value, zero))
        for pair in range(LANES // 2):
            for half in range(2):
                order = [LANES * half + i // 2 + 2 * LANES * (i % 2) for i in range(2 * LANES)]
                mask = ir.Constant(ir.VectorType(lanes.I32, 2 * LANES), order)
                both = b.shuffle_vector(rows[2 * pair], rows[2 * pair + 1], mask)
                at = b.add(b.add(out, b.mul(block, lanes.const(half))), lanes.const(64 * pair))
                lanes.store(b, b.bitcast(both, lanes.PAIRS), at, 64)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), codegen


@intrinsic
def largest(typing: Any, values: Any, size: Any) -> Any:
    """The largest of float32 values, at an address and `size` bytes long, a multiple of 64; none is NaN."""

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        values, size = arguments

        def larger(left: Any, right: Any) -> Any:
            return b.select(b.fcmp_ordered(">", left, right), left, right)

        before, loop, after = b.block, b.append_basic_block("values"), b.append_basic_block("compared")
        first = lanes.load(b, values, lanes.FLOATS, 64)
        b.branch(loop)
        b.position_at_end(loop)
        offset, top = b.phi(lanes.I64), b.phi(lanes.FLOATS)
        higher = larger(lanes.load(b, b.add(values, offset), lanes.FLOATS, 64), top)
        following = b.add(offset, lanes.const(64))
        for phi, start, then in ((offset, lanes.const(0), following), (top, first, higher)):
            phi.add_incoming(start, before)
            phi.add_incoming(then, loop)
        b.cbranch(b.icmp_signed("<", following, size), loop, after)
        b.position_at_end(after)
        return lanes.folded(b, higher, larger)

    return types.float32(types.int64, types.int64), codegen


# 2 to the x for x in [-0.5, 0.5], within 3e-7 relatively: fitted to the least largest relative error.
_POWERS = (1.327646679e-3, 9.675541293e-3, 5.550713290e-2, 0.2402211972, 0.6931469671, 1.000000072)


@intrinsic
def weigh(typing: Any, values: Any, size: Any, scale: Any, top: Any, out: Any) -> Any:
    """2 to the (value * scale - top) of float32 values, `size` bytes long, as bfloat16 at `out`; their sum.

    The sum is that of the values before they are rounded. What underflows is zero exactly.
    """

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        values, size, scale, top, out = arguments
        scales, tops = lanes.every(b, scale), b.fneg(lanes.every(b, top))
        before, loop, after = b.block, b.append_basic_block("values"), b.append_basic_block("weighed")
        b.branch(loop)
        b.position_at_end(loop)
        offset, total = b.phi(lanes.I64), b.phi(lanes.FLOATS)
        power = lanes.fused(b, lanes.load(b, b.add(values, offset), lanes.FLOATS, 64), scales, tops)
        whole = lanes.instruction(b, "llvm.rint.v16f32", lanes.FLOATS, [power])
        rest = b.fsub(power, whole)
        y = ir.Constant(lanes.FLOATS, [_POWERS[0]] * LANES)
        for coefficient in _POWERS[1:]:
            y = lanes.fused(b, y, rest, ir.Constant(lanes.FLOATS, [coefficient] * LANES))
        all_lanes, current = ir.Constant(ir.IntType(16), -1), ir.Constant(lanes.I32, 4)
        y = lanes.instruction(
            b, "llvm.x86.avx512.mask.scalef.ps.512", lanes.FLOATS, [y, whole, y, all_lanes, current]
        )
        sixteen = ir.VectorType(lanes.BFloat(), LANES)
        rounded = lanes.instruction(b, "llvm.x86.avx512bf16.cvtneps2bf16.512", sixteen, [y])
        stored = b.bitcast(rounded, ir.VectorType(lanes.I32, LANES // 2))
        lanes.store(b, stored, b.add(out, b.lshr(offset, lanes.const(1))), 32)
        more, following = b.fadd(total, y), b.add(offset, lanes.const(64))
        for phi, start, then in (
            (offset, lanes.const(0), following),
            (total, ir.Constant(lanes.FLOATS, [0.0] * LANES), more),
        ):
            phi.add_incoming(start, before)
            phi.add_incoming(then, loop)
        b.cbranch(b.icmp_signed("<", following, size), loop, after)
        b.position_at_end(after)
        return lanes.folded(b, more, b.fadd)

    signature = types.float32(types.int64, types.int64, types.float32, types.float32, types.int64)
    return signature, codegen

"""What numba's Python cannot say: 16 lanes of float32, and products of pairs of bfloat16 summed into them.

Everything takes addresses as int64. `_dot` is AVX-512's VDPBF16PS: each lane adds the products of two bfloat16
pairs to its float32.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

LANES = 16

_I32, _I64 = ir.IntType(32), ir.IntType(64)
_FLOATS = ir.VectorType(ir.FloatType(), LANES)
_PAIRS = ir.VectorType(_I32, LANES)


class _BFloat(ir.types.Type):  # type: ignore[misc]
    """LLVM's bfloat, which llvmlite does not name."""

    intrinsic_name = "bf16"

    def __str__(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


_HALVES = ir.VectorType(_BFloat(), 2 * LANES)


def _const(value: int) -> Any:
    return ir.Constant(_I64, value)


def _load(b: Any, address: Any, kind: Any, align: int) -> Any:
    value = b.load(b.inttoptr(address, kind.as_pointer()))
    value.align = align
    return value


def _store(b: Any, value: Any, address: Any, align: int) -> None:
    b.store(value, b.inttoptr(address, value.type.as_pointer())).align = align


def _pairs(b: Any, address: Any, align: int) -> Any:
    """16 pairs of bfloat16."""
    return b.bitcast(_load(b, address, _PAIRS, align), _HALVES)


def _same_pair(b: Any, address: Any) -> Any:
    """One pair of bfloat16 in every lane."""
    pair = _load(b, address, _I32, 4)
    first = b.insert_element(ir.Constant(_PAIRS, ir.Undefined), pair, ir.Constant(_I32, 0))
    zeros = ir.Constant(_PAIRS, [0] * LANES)
    return b.bitcast(b.shuffle_vector(first, ir.Constant(_PAIRS, ir.Undefined), zeros), _HALVES)


def _dot(b: Any, total: Any, left: Any, right: Any) -> Any:
    name = "llvm.x86.avx512bf16.dpbf16ps.512"
    function = b.module.globals.get(name)
    if function is None:
        function = ir.Function(b.module, ir.FunctionType(_FLOATS, [_FLOATS, _HALVES, _HALVES]), name)
    return b.call(function, [total, left, right])


def tile(rows: int, blocks: int) -> Any:
    """A product of `rows` rows of x with `blocks` blocks of 16 outputs; all sums stay in registers.

    The function takes (weights, bytes a block of weights, x, bytes a row of x, pairs, out). A block of weights is
    [pairs, 16, 2] bfloat16, x is [rows, pairs, 2] bfloat16, out becomes [rows, blocks, 16] float32. Each sum runs
    over the pairs in order, so it does not depend on what else is in the tile.
    """

    @intrinsic
    def multiply(typing: Any, weights: Any, block: Any, x: Any, row: Any, pairs: Any, out: Any) -> Any:
        def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
            weights, block, x, row, pairs, out = arguments
            w_at = [b.add(weights, b.mul(block, _const(i))) for i in range(blocks)]
            x_at = [b.add(x, b.mul(row, _const(i))) for i in range(rows)]
            before, loop, after = b.block, b.append_basic_block("pairs"), b.append_basic_block("stored")
            b.branch(loop)
            b.position_at_end(loop)
            pair = b.phi(_I64)
            sums = [[b.phi(_FLOATS) for _ in range(blocks)] for _ in range(rows)]
            w = [_pairs(b, b.add(at, b.mul(pair, _const(64))), 64) for at in w_at]
            added = []
            for i in range(rows):
                value = _same_pair(b, b.add(x_at[i], b.mul(pair, _const(4))))
                added.append([_dot(b, sums[i][j], w[j], value) for j in range(blocks)])
            following = b.add(pair, _const(1))
            b.cbranch(b.icmp_signed("<", following, pairs), loop, after)
            pair.add_incoming(_const(0), before)
            pair.add_incoming(following, loop)
            for i in range(rows):
                for j in range(blocks):
                    sums[i][j].add_incoming(ir.Constant(_FLOATS, [0.0] * LANES), before)
                    sums[i][j].add_incoming(added[i][j], loop)
            b.position_at_end(after)
            for i in range(rows):
                for j in range(blocks):
                    _store(b, added[i][j], b.add(out, _const(64 * (i * blocks + j))), 64)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 6), codegen

    return multiply


@intrinsic
def scores(typing: Any, q: Any, k: Any, pairs: Any, out: Any) -> Any:
    """Dot products of one q with the k of 16 tokens: (q, k, pairs of a head, out).

    q is [pairs, 2] bfloat16, k is [16, pairs, 2] bfloat16, out becomes [16] float32; `pairs` is a multiple of 16.
    """

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        q, k, pairs, out = arguments
        row = b.mul(pairs, _const(4))
        before, loop, after = b.block, b.append_basic_block("dims"), b.append_basic_block("summed")
        b.branch(loop)
        b.position_at_end(loop)
        offset = b.phi(_I64)
        sums = [b.phi(_FLOATS) for _ in range(LANES)]
        query = _pairs(b, b.add(q, offset), 4)
        added = []
        for token in range(LANES):
            key = _pairs(b, b.add(b.add(k, b.mul(row, _const(token))), offset), 4)
            added.append(_dot(b, sums[token], query, key))
        following = b.add(offset, _const(64))
        b.cbranch(b.icmp_signed("<", following, row), loop, after)
        offset.add_incoming(_const(0), before)
        offset.add_incoming(following, loop)
        for token in range(LANES):
            sums[token].add_incoming(ir.Constant(_FLOATS, [0.0] * LANES), before)
            sums[token].add_incoming(added[token], loop)
        b.position_at_end(after)
        _store(b, _sum_each(b, added), out, 64)
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
            folded.append(b.fadd(*(_shuffle(b, left, right, lanes) for lanes in (low, high))))
        vectors, width = folded, 2 * width
    return vectors[0]


def _shuffle(b: Any, left: Any, right: Any, lanes: list[int]) -> Any:
    return b.shuffle_vector(left, right, ir.Constant(ir.VectorType(_I32, LANES), lanes))


@intrinsic
def prefetch(typing: Any, address: Any, size: Any) -> Any:
    """Ask for `size` bytes, a multiple of 64, at `address` to be brought near; they are only read later."""

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        address, size = arguments
        byte = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, _I32, _I32, _I32])
        function = b.module.globals.get("llvm.prefetch.p0") or ir.Function(b.module, kind, "llvm.prefetch.p0")
        before, loop, after = b.block, b.append_basic_block("lines"), b.append_basic_block("asked")
        b.branch(loop)
        b.position_at_end(loop)
        offset = b.phi(_I64)
        line = b.inttoptr(b.add(address, offset), byte)
        b.call(function, [line, *(ir.Constant(_I32, v) for v in (0, 3, 1))])  # to read, all caches, data
        following = b.add(offset, _const(64))
        offset.add_incoming(_const(0), before)
        offset.add_incoming(following, loop)
        b.cbranch(b.icmp_signed("<", following, size), loop, after)
        b.position_at_end(after)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


def _pointer(kind: Any) -> Any:
    @intrinsic
    def pointer(typing: Any, address: Any) -> Any:
        def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
            return b.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return types.CPointer(kind)(types.int64), codegen

    return pointer


f32_at = _pointer(types.float32)
i32_at = _pointer(types.int32)
u16_at = _pointer(types.uint16)
i64_at = _pointer(types.int64)


@intrinsic
def mix(typing: Any, weights: Any, v: Any, row: Any, out: Any) -> Any:
    """Add 16 tokens' v, each times its weight, for 32 dimensions: (weights, v, bytes a token of v, out).

    weights is [8, 2] bfloat16, v is [16, 32] bfloat16; out is [32] float32 in the order of `MIXED`.
    """

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        weights, v, row, out = arguments
        words = ir.VectorType(ir.IntType(16), 2 * LANES)
        low = _load(b, out, _FLOATS, 64)
        high = _load(b, b.add(out, _const(64)), _FLOATS, 64)
        # Words of two tokens are paired within each 128 bits, as VPUNPCKLWD and VPUNPCKHWD do.
        order = [[8 * (i // 8) + start + i % 8 // 2 + 2 * LANES * (i % 2) for i in range(32)] for start in (0, 4)]
        for pair in range(LANES // 2):
            weight = _same_pair(b, b.add(weights, _const(4 * pair)))
            first, second = (_load(b, b.add(v, b.mul(row, _const(2 * pair + i))), words, 4) for i in range(2))
            lows, highs = (
                b.bitcast(
                    b.shuffle_vector(first, second, ir.Constant(ir.VectorType(_I32, 2 * LANES), lanes)), _HALVES
                )
                for lanes in order
            )
            low, high = _dot(b, low, weight, lows), _dot(b, high, weight, highs)
        _store(b, low, out, 64)
        _store(b, high, b.add(out, _const(64)), 64)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), codegen


MIXED = tuple(8 * (i % 16 // 4) + 4 * (i // 16) + i % 4 for i in range(32))
"""The dimension of each element of `mix`'s result."""

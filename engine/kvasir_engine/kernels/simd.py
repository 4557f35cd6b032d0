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


def _widened(b: Any, address: Any) -> Any:
    """16 pairs of int8 as bfloat16, which has all of them."""
    halves = []
    for half in range(2):
        whole = _load(b, b.add(address, _const(LANES * half)), ir.VectorType(ir.IntType(8), LANES), LANES)
        halves.append(b.sitofp(b.sext(whole, _PAIRS), _FLOATS))
    return _intrinsic(b, "llvm.x86.avx512bf16.cvtne2ps2bf16.512", _HALVES, halves[::-1])


def tile(rows: int, blocks: int, out_row: int = 0, int8: bool = False) -> Any:
    """A product of `rows` rows of x with `blocks` blocks of 16 outputs; all sums stay in registers.

    The function takes (weights, bytes a block of weights, x, bytes a row of x, pairs, out). A block of weights is
    [pairs, 16, 2] bfloat16 (with `int8` int8), x is [rows, pairs, 2] bfloat16, out becomes [rows, blocks, 16]
    float32, its rows `out_row` bytes apart (0: contiguous). Each sum runs over the pairs in order, so it does not
    depend on what else is in the tile.
    """
    out_row = out_row or 64 * blocks

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
            if int8:
                w = [_widened(b, b.add(at, b.mul(pair, _const(32)))) for at in w_at]
            else:
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
                    _store(b, added[i][j], b.add(out, _const(out_row * i + 64 * j)), 64)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 6), codegen

    return multiply


@intrinsic
def widen(typing: Any, weights: Any, pairs: Any, out: Any) -> Any:
    """Turn [pairs, 16, 2] int8 into bfloat16 at `out`."""

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        weights, pairs, out = arguments
        before, loop, after = b.block, b.append_basic_block("pairs"), b.append_basic_block("widened")
        b.branch(loop)
        b.position_at_end(loop)
        pair = b.phi(_I64)
        wide = _widened(b, b.add(weights, b.mul(pair, _const(32))))
        _store(b, b.bitcast(wide, _PAIRS), b.add(out, b.mul(pair, _const(64))), 64)
        following = b.add(pair, _const(1))
        pair.add_incoming(_const(0), before)
        pair.add_incoming(following, loop)
        b.cbranch(b.icmp_signed("<", following, pairs), loop, after)
        b.position_at_end(after)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), codegen


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
        b.call(
            function, [line, *(ir.Constant(_I32, v) for v in (0, 2, 1))]
        )  # to read, from the second cache on, data
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


@intrinsic
def pack_keys(typing: Any, k: Any, row: Any, pairs: Any, out: Any) -> Any:
    """Turn 16 tokens' k [16, pairs, 2], `row` bytes a token, into [pairs, 16, 2], bfloat16; 16 pairs at a time."""

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        k, row, pairs, out = arguments
        size = b.mul(pairs, _const(4))
        before, loop, after = b.block, b.append_basic_block("pairs"), b.append_basic_block("packed")
        b.branch(loop)
        b.position_at_end(loop)
        offset = b.phi(_I64)
        at = b.add(k, offset)
        vectors = [_load(b, b.add(at, b.mul(row, _const(token))), _PAIRS, 4) for token in range(LANES)]
        for vector, pair in zip(_transposed(b, vectors), range(LANES), strict=True):
            _store(b, vector, b.add(out, b.add(b.mul(offset, _const(LANES)), _const(64 * pair))), 64)
        following = b.add(offset, _const(64))
        offset.add_incoming(_const(0), before)
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
                for place, lanes in ((i, kept), (i | bit, other)):
                    turned[place] = _shuffle(b, vectors[i], vectors[i | bit], lanes)
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
            value = _load(b, b.add(v, b.mul(row, _const(token))), words, 4)
            rows.append(b.select(b.icmp_signed("<", _const(token), tokens), value, zero))
        for pair in range(LANES // 2):
            for half in range(2):
                order = [LANES * half + i // 2 + 2 * LANES * (i % 2) for i in range(2 * LANES)]
                mask = ir.Constant(ir.VectorType(_I32, 2 * LANES), order)
                both = b.shuffle_vector(rows[2 * pair], rows[2 * pair + 1], mask)
                at = b.add(b.add(out, b.mul(block, _const(half))), _const(64 * pair))
                _store(b, b.bitcast(both, _PAIRS), at, 64)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5), codegen


def _intrinsic(b: Any, name: str, result: Any, arguments: list[Any]) -> Any:
    function = b.module.globals.get(name)
    if function is None:
        function = ir.Function(b.module, ir.FunctionType(result, [a.type for a in arguments]), name)
    return b.call(function, arguments)


def _fused(b: Any, left: Any, right: Any, added: Any) -> Any:
    """left * right + added, rounded once."""
    return _intrinsic(b, "llvm.fma.v16f32", _FLOATS, [left, right, added])


def _every(b: Any, value: Any) -> Any:
    """A float32 in every lane."""
    nothing = ir.Constant(_FLOATS, ir.Undefined)
    return b.shuffle_vector(
        b.insert_element(nothing, value, ir.Constant(_I32, 0)), nothing, ir.Constant(_PAIRS, [0] * LANES)
    )


def _folded(b: Any, vector: Any, join: Any) -> Any:
    """One of all 16 lanes, joined half by half."""
    for width in (8, 4, 2, 1):
        vector = join(vector, _shuffle(b, vector, vector, [(i + width) % LANES for i in range(LANES)]))
    return b.extract_element(vector, ir.Constant(_I32, 0))


@intrinsic
def largest(typing: Any, values: Any, size: Any) -> Any:
    """The largest of float32 values, at an address and `size` bytes long, a multiple of 64; none is NaN."""

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        values, size = arguments

        def larger(left: Any, right: Any) -> Any:
            return b.select(b.fcmp_ordered(">", left, right), left, right)

        before, loop, after = b.block, b.append_basic_block("values"), b.append_basic_block("compared")
        first = _load(b, values, _FLOATS, 64)
        b.branch(loop)
        b.position_at_end(loop)
        offset, top = b.phi(_I64), b.phi(_FLOATS)
        higher = larger(_load(b, b.add(values, offset), _FLOATS, 64), top)
        following = b.add(offset, _const(64))
        for phi, start, then in ((offset, _const(0), following), (top, first, higher)):
            phi.add_incoming(start, before)
            phi.add_incoming(then, loop)
        b.cbranch(b.icmp_signed("<", following, size), loop, after)
        b.position_at_end(after)
        return _folded(b, higher, larger)

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
        scales, tops = _every(b, scale), b.fneg(_every(b, top))
        before, loop, after = b.block, b.append_basic_block("values"), b.append_basic_block("weighed")
        b.branch(loop)
        b.position_at_end(loop)
        offset, total = b.phi(_I64), b.phi(_FLOATS)
        power = _fused(b, _load(b, b.add(values, offset), _FLOATS, 64), scales, tops)
        whole = _intrinsic(b, "llvm.rint.v16f32", _FLOATS, [power])
        rest = b.fsub(power, whole)
        y = ir.Constant(_FLOATS, [_POWERS[0]] * LANES)
        for coefficient in _POWERS[1:]:
            y = _fused(b, y, rest, ir.Constant(_FLOATS, [coefficient] * LANES))
        all_lanes, current = ir.Constant(ir.IntType(16), -1), ir.Constant(_I32, 4)
        y = _intrinsic(b, "llvm.x86.avx512.mask.scalef.ps.512", _FLOATS, [y, whole, y, all_lanes, current])
        sixteen = ir.VectorType(_BFloat(), LANES)
        rounded = _intrinsic(b, "llvm.x86.avx512bf16.cvtneps2bf16.512", sixteen, [y])
        stored = b.bitcast(rounded, ir.VectorType(_I32, LANES // 2))
        _store(b, stored, b.add(out, b.lshr(offset, _const(1))), 32)
        more, following = b.fadd(total, y), b.add(offset, _const(64))
        for phi, start, then in (
            (offset, _const(0), following),
            (total, ir.Constant(_FLOATS, [0.0] * LANES), more),
        ):
            phi.add_incoming(start, before)
            phi.add_incoming(then, loop)
        b.cbranch(b.icmp_signed("<", following, size), loop, after)
        b.position_at_end(after)
        return _folded(b, more, b.fadd)

    signature = types.float32(types.int64, types.int64, types.float32, types.float32, types.int64)
    return signature, codegen


@intrinsic
def call(typing: Any, function: Any, arguments: Any) -> Any:
    """Call the kernel at address `function` with the address `arguments`."""

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [_I64.as_pointer()])
        b.call(b.inttoptr(arguments[0], kind.as_pointer()), [b.inttoptr(arguments[1], _I64.as_pointer())])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def take(typing: Any, counter: Any) -> Any:
    """Add one to the int64 at `counter`, which threads share; what it was before."""

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        return b.atomic_rmw("add", b.inttoptr(arguments[0], _I64.as_pointer()), _const(1), "monotonic")

    return types.int64(types.int64), codegen


MIXED = tuple(8 * (i % 16 // 4) + 4 * (i // 16) + i % 4 for i in range(32))
"""The dimension of each element of `mix`'s result."""

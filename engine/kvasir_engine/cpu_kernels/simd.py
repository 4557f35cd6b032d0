"""What numba's Python cannot say: products of bfloat16, memory at an address, calls. Addresses are int64."""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from kvasir_engine.cpu_kernels import lanes
from kvasir_engine.cpu_kernels.lanes import LANES


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
            w_at = [b.add(weights, b.mul(block, lanes.const(i))) for i in range(blocks)]
            x_at = [b.add(x, b.mul(row, lanes.const(i))) for i in range(rows)]
            before, loop, after = b.block, b.append_basic_block("pairs"), b.append_basic_block("stored")
            b.branch(loop)
            b.position_at_end(loop)
            pair = b.phi(lanes.I64)
            sums = [[b.phi(lanes.FLOATS) for _ in range(blocks)] for _ in range(rows)]
            if int8:
                w = [lanes.widened(b, b.add(at, b.mul(pair, lanes.const(32)))) for at in w_at]
            else:
                w = [lanes.pairs_at(b, b.add(at, b.mul(pair, lanes.const(64))), 64) for at in w_at]
            added = []
            for i in range(rows):
                value = lanes.same_pair(b, b.add(x_at[i], b.mul(pair, lanes.const(4))))
                added.append([lanes.dot(b, sums[i][j], w[j], value) for j in range(blocks)])
            following = b.add(pair, lanes.const(1))
            b.cbranch(b.icmp_signed("<", following, pairs), loop, after)
            pair.add_incoming(lanes.const(0), before)
            pair.add_incoming(following, loop)
            for i in range(rows):
                for j in range(blocks):
                    sums[i][j].add_incoming(ir.Constant(lanes.FLOATS, [0.0] * LANES), before)
                    sums[i][j].add_incoming(added[i][j], loop)
            b.position_at_end(after)
            for i in range(rows):
                for j in range(blocks):
                    lanes.store(b, added[i][j], b.add(out, lanes.const(out_row * i + 64 * j)), 64)
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
        pair = b.phi(lanes.I64)
        wide = lanes.widened(b, b.add(weights, b.mul(pair, lanes.const(32))))
        lanes.store(b, b.bitcast(wide, lanes.PAIRS), b.add(out, b.mul(pair, lanes.const(64))), 64)
        following = b.add(pair, lanes.const(1))
        pair.add_incoming(lanes.const(0), before)
        pair.add_incoming(following, loop)
        b.cbranch(b.icmp_signed("<", following, pairs), loop, after)
        b.position_at_end(after)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), codegen


@intrinsic
def prefetch(typing: Any, address: Any, size: Any) -> Any:
    """Ask for `size` bytes, a multiple of 64, at `address` to be brought near; they are only read later."""

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        address, size = arguments
        byte = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, lanes.I32, lanes.I32, lanes.I32])
        function = b.module.globals.get("llvm.prefetch.p0") or ir.Function(b.module, kind, "llvm.prefetch.p0")
        before, loop, after = b.block, b.append_basic_block("lines"), b.append_basic_block("asked")
        b.branch(loop)
        b.position_at_end(loop)
        offset = b.phi(lanes.I64)
        line = b.inttoptr(b.add(address, offset), byte)
        b.call(
            function, [line, *(ir.Constant(lanes.I32, v) for v in (0, 2, 1))]
        )  # to read, from the second cache on, data
        following = b.add(offset, lanes.const(64))
        offset.add_incoming(lanes.const(0), before)
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
u64_at = _pointer(types.uint64)


@intrinsic
def call(typing: Any, function: Any, arguments: Any) -> Any:
    """Call the kernel at address `function` with the address `arguments`."""

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [lanes.I64.as_pointer()])
        b.call(b.inttoptr(arguments[0], kind.as_pointer()), [b.inttoptr(arguments[1], lanes.I64.as_pointer())])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@intrinsic
def take(typing: Any, counter: Any) -> Any:
    """Add one to the int64 at `counter`, which threads share; what it was before."""

    def codegen(context: Any, b: Any, signature: Any, arguments: Any) -> Any:
        return b.atomic_rmw("add", b.inttoptr(arguments[0], lanes.I64.as_pointer()), lanes.const(1), "monotonic")

    return types.int64(types.int64), codegen

"""The vectors that kernels compute with, and what is built of them: 16 lanes of float32, pairs of bfloat16.

For code that makes LLVM's instructions with a builder `b`. Addresses are int64. `dot` is AVX-512's VDPBF16PS: each
lane adds the products of two bfloat16 pairs to its float32.
"""

from typing import Any

from llvmlite import ir

LANES = 16
I32, I64 = ir.IntType(32), ir.IntType(64)
FLOATS = ir.VectorType(ir.FloatType(), LANES)
PAIRS = ir.VectorType(I32, LANES)


class BFloat(ir.types.Type):  # type: ignore[misc]
    """LLVM's bfloat, which llvmlite does not name."""

    intrinsic_name = "bf16"

    def __str__(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BFloat)

    def __hash__(self) -> int:
        return hash(BFloat)


HALVES = ir.VectorType(BFloat(), 2 * LANES)


def const(value: int) -> Any:
    """An int64."""
    return ir.Constant(I64, value)


def load(b: Any, address: Any, kind: Any, align: int) -> Any:
    """A value of LLVM's type `kind`; its address is a multiple of `align`."""
    value = b.load(b.inttoptr(address, kind.as_pointer()))
    value.align = align
    return value


def store(b: Any, value: Any, address: Any, align: int) -> None:
    """Store at an address that is a multiple of `align`."""
    b.store(value, b.inttoptr(address, value.type.as_pointer())).align = align


def pairs_at(b: Any, address: Any, align: int) -> Any:
    """16 pairs of bfloat16."""
    return b.bitcast(load(b, address, PAIRS, align), HALVES)


def same_pair(b: Any, address: Any) -> Any:
    """One pair of bfloat16 in every lane."""
    pair = load(b, address, I32, 4)
    first = b.insert_element(ir.Constant(PAIRS, ir.Undefined), pair, ir.Constant(I32, 0))
    zeros = ir.Constant(PAIRS, [0] * LANES)
    return b.bitcast(b.shuffle_vector(first, ir.Constant(PAIRS, ir.Undefined), zeros), HALVES)


def shuffle(b: Any, left: Any, right: Any, lanes: list[int]) -> Any:
    """For each lane the one of 32 that it takes, `left`'s and then `right`'s."""
    return b.shuffle_vector(left, right, ir.Constant(ir.VectorType(I32, LANES), lanes))


def instruction(b: Any, name: str, result: Any, arguments: list[Any]) -> Any:
    """Call LLVM's intrinsic `name`."""
    function = b.module.globals.get(name)
    if function is None:
        function = ir.Function(b.module, ir.FunctionType(result, [a.type for a in arguments]), name)
    return b.call(function, arguments)


def dot(b: Any, total: Any, left: Any, right: Any) -> Any:
    """The sums `total` with those of `left`'s and `right`'s pairs."""
    return instruction(b, "llvm.x86.avx512bf16.dpbf16ps.512", FLOATS, [total, left, right])


def widened(b: Any, address: Any) -> Any:
    """16 pairs of int8 as bfloat16, which has all of them."""
    halves = []
    for half in range(2):
        whole = load(b, b.add(address, const(LANES * half)), ir.VectorType(ir.IntType(8), LANES), LANES)
        halves.append(b.sitofp(b.sext(whole, PAIRS), FLOATS))
    return instruction(b, "llvm.x86.avx512bf16.cvtne2ps2bf16.512", HALVES, halves[::-1])


def fused(b: Any, left: Any, right: Any, added: Any) -> Any:
    """left * right + added, rounded once."""
    return instruction(b, "llvm.fma.v16f32", FLOATS, [left, right, added])


def every(b: Any, value: Any) -> Any:
    """A float32 in every lane."""
    nothing = ir.Constant(FLOATS, ir.Undefined)
    return b.shuffle_vector(
        b.insert_element(nothing, value, ir.Constant(I32, 0)), nothing, ir.Constant(PAIRS, [0] * LANES)
    )


def folded(b: Any, vector: Any, join: Any) -> Any:
    """One of all 16 lanes, joined half by half."""
    for width in (8, 4, 2, 1):
        vector = join(vector, shuffle(b, vector, vector, [(i + width) % LANES for i in range(LANES)]))
    return b.extract_element(vector, ir.Constant(I32, 0))

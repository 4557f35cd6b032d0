"""The GPU's Triton kernels compile for a Hopper card, without one: what the interpreter lets pass may not."""

from typing import Any

import pytest

from kvasir_engine.connector import triton_digests
from kvasir_engine.gpu_kernels import gate, residual_norm, rotary_store, settle
from kvasir_engine.sampling import draw_triton, mask_triton

pytest.importorskip("triton")


def compiled(kernel: Any, types: dict[str, str], constants: dict[str, Any], warps: int) -> str:
    """The kernel's PTX for sm_90; arguments without a type are i32."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    source = ASTSource(kernel, signature, constexprs=constants)
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    assert built.asm["cubin"]
    ptx: str = built.asm["ptx"]
    return ptx


def test_sampling() -> None:
    types = {"logits": "*fp32", "stride": "i64", "table": "*fp64", "out": "*i64"}
    constants = {"UNIT": float(1 << 44), "BLOCK": draw_triton.BLOCK}
    ptx = compiled(draw_triton._draw, types, constants, draw_triton.WARPS)
    assert ".target sm_90" in ptx
    assert "ld.local" not in ptx, "registers spill"


def test_masks() -> None:
    types = {"logits": "*fp32", "stride": "i64", "places": "*i32", "words": "*i32", "out": "*fp32"}
    fits(compiled(mask_triton._mask, types, {"BLOCK": mask_triton.BLOCK}, mask_triton.WARPS))


@pytest.mark.parametrize("row", [32, 16, 6])
def test_digests(row: int) -> None:
    types = dict.fromkeys(("pool", "places", "keys", "out"), "*i64") | dict.fromkeys(
        ("first", "second", "fold"), "i64"
    )
    constants = triton_digests.constants(row)
    ptx = compiled(triton_digests._digest, types, constants, triton_digests.WARPS)
    assert ".target sm_90" in ptx
    assert "ld.local" not in ptx, "registers spill"


def fits(ptx: str) -> None:
    assert ".target sm_90" in ptx
    assert "ld.local" not in ptx, "registers spill"


@pytest.mark.parametrize("hidden", [576, 4096, 8192])
@pytest.mark.parametrize(("part", "after"), [(False, False), (True, False), (True, True)])
def test_residual_norms(hidden: int, part: bool, after: bool) -> None:
    types = {"x": "*fp32", "part": "*bf16", "after": "*fp32", "weight": "*fp32", "out": "*bf16"}
    block, warps = residual_norm.shape_of(hidden)
    assert block >= 32 * warps, "two threads would have one element"
    constants = {
        "HIDDEN": hidden, "BLOCK": block, "EPS": 1e-5, "AFTER_EPS": 1e-6, "PART": part, "AFTER": after
    }  # fmt: skip
    fits(compiled(residual_norm._add_norm, types, constants, warps))


@pytest.mark.parametrize("gelu", [False, True])
def test_gates(gelu: bool) -> None:
    constants = {"COLUMNS": 14336, "GELU": gelu, "ROOT": gate.ROOT, "CUBE": gate.CUBE, "BLOCK": gate.BLOCK}
    fits(compiled(gate._gated, {"gate_up": "*bf16", "out": "*bf16"}, constants, gate.WARPS))


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(32, 8, 128), (9, 3, 64), (4, 1, 256)])
def test_rotary_stores(heads: int, kv_heads: int, dim: int, norm: bool) -> None:
    types = dict.fromkeys(("qkv", "cos", "sin", "pool", "q"), "*bf16") | {
        "positions": "*i64", "rows": "*i64", "norm": "*fp32" if norm else "*bf16"
    }  # fmt: skip
    constants = {"NORM": norm, "EPS": 1e-6, **rotary_store.constants(heads, kv_heads, dim, 16)}
    fits(compiled(rotary_store._rotary_store, types, constants, rotary_store.WARPS))


@pytest.mark.parametrize(("vocab", "hidden"), [(49_152, 576), (128_256, 4096)])
def test_settling(vocab: int, hidden: int) -> None:
    types = {"rounded": "*bf16", "states": "*fp32", "weight": "*bf16", "out": "*fp32"}
    constants = {"VOCAB": vocab, "ROUNDING": 2**-7, "MOST": 16, **settle.constants(hidden)}
    fits(compiled(settle._settle, types, constants, settle.WARPS))

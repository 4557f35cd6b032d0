"""The GPU's Triton kernels compile for a Hopper card, without one: what the interpreter lets pass may not."""

from typing import Any

import pytest

from kvasir_engine.connector import triton_digests
from kvasir_engine.sampling import draw_triton

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


@pytest.mark.parametrize("row", [32, 16, 6])
def test_digests(row: int) -> None:
    types = dict.fromkeys(("pool", "places", "keys", "out"), "*i64") | dict.fromkeys(
        ("first", "second", "fold"), "i64"
    )
    constants = triton_digests.constants(row)
    ptx = compiled(triton_digests._digest, types, constants, triton_digests.WARPS)
    assert ".target sm_90" in ptx
    assert "ld.local" not in ptx, "registers spill"

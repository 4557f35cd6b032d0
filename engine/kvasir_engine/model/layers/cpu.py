"""Selects the parts of a model that run on this package's CPU kernels; torch runs the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Literal

import torch

from kvasir_engine.cpu_kernels import unavailable_reason
from kvasir_engine.errors import ModelError

if TYPE_CHECKING:
    from kvasir_engine.cpu_kernels.elementwise import Gate, Norm
    from kvasir_engine.cpu_kernels.int8 import QuantizedWeight, Scratch
    from kvasir_engine.cpu_kernels.linear import PackedWeight

    Packed = PackedWeight | QuantizedWeight


_only = ContextVar("only", default=False)


@contextmanager
def only() -> Iterator[None]:
    """Within this context modules give a token the same bits in any batch: their products use kernels, or are
    refused.
    """
    token = _only.set(True)
    try:
        yield
    finally:
        _only.reset(token)


def batch_invariant() -> bool:
    """Whether modules are made within `only`."""
    return _only.get()


def takes(tensor: torch.Tensor) -> bool:
    """Whether the kernels support this tensor's device and dtype."""
    return tensor.device.type == "cpu" and tensor.dtype == torch.bfloat16 and unavailable_reason() is None


_scratch: ContextVar[Scratch | None] = ContextVar("scratch", default=None)


@contextmanager
def int8() -> Iterator[None]:
    """Within this context, weights of one model are packed as int8. On CPUs, in bfloat16."""
    from kvasir_engine.cpu_kernels.int8 import Scratch

    token = _scratch.set(Scratch())
    try:
        yield
    finally:
        _scratch.reset(token)


def pack(weight: torch.Tensor, bias: torch.Tensor | None, exact: bool = False) -> Packed | None:
    """W [out, in] packed; None where torch has to multiply. Raises ModelError if it must not.

    An `exact` weight stays bfloat16.
    """
    scratch = None if exact else _scratch.get()
    if takes(weight):
        from kvasir_engine.cpu_kernels import int8, linear

        if linear.fits(*weight.shape):
            return int8.QuantizedWeight(weight, bias, scratch) if scratch else linear.PackedWeight(weight, bias)
    if scratch:
        raise ModelError(f"int8: no kernel multiplies by a {list(weight.shape)} matrix (outputs come in 16s)")
    if _only.get():
        raise ModelError(
            f"deterministic mode: no kernel multiplies by a {list(weight.shape)} matrix (outputs come in 16s)"
        )
    return None


def norm(weight: torch.Tensor, eps: float, offset: float) -> Norm | None:
    """The norm by weight + offset [hidden]."""
    if not takes(weight):
        return None
    from kvasir_engine.cpu_kernels import elementwise

    return elementwise.Norm(weight.float() + offset, eps)


def rotation(table: torch.Tensor) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None] | None:
    """A function that turns x [T, heads, head_dim] in place by the factors of its tokens."""
    if not takes(table):
        return None
    from kvasir_engine.cpu_kernels import elementwise

    return elementwise.rotate


def gate(activation: Literal["silu", "gelu_tanh"]) -> Gate:
    """A function from [T, 2 * n], of a kind that kernels take, to activation(gate) * up [T, n]."""
    from kvasir_engine.cpu_kernels import elementwise

    return elementwise.silu_mul if activation == "silu" else elementwise.gelu_mul

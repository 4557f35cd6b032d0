"""The residual stream of a step: each layer adds to it, and reads it through a norm.

It is float32: bfloat16 would round away the small contributions of the later layers.
"""

from typing import Protocol

import torch

from kvasir_engine import gpu_kernels
from kvasir_engine.model.layers.basic import RMSNorm


class Adding(Protocol):
    """A layer whose output is added."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[T, its input] to [T, hidden]."""
        ...

    def add_to(self, y: torch.Tensor, x: torch.Tensor) -> None:
        """Add to y [T, hidden], float32 and contiguous, what x gives."""
        ...


class Residual:
    """The stream x [T, hidden], float32, contiguous, changed in place.

    On a GPU an addition waits for the norm after it, which does both in one kernel.
    """

    def __init__(self, x: torch.Tensor) -> None:
        self._x = x
        self._fused = gpu_kernels.takes(x)
        self._part: torch.Tensor | None = None
        self._after: RMSNorm | None = None

    def add(self, layer: Adding, inner: torch.Tensor, after: RMSNorm | None) -> None:
        """Add the output of `layer` for `inner`, through the norm `after` if there is one."""
        if self._fused:
            assert self._part is None, "nothing normed what was added before"
            self._part, self._after = layer(inner), after
        elif after is None:
            layer.add_to(self._x, inner)
        else:
            self._x += after(layer(inner).float())

    def normed(self, norm: RMSNorm) -> torch.Tensor:
        """The norm of all tokens, in the norm's dtype."""
        return self._normed(norm, self._x, self._take())

    def normed_at(self, norm: RMSNorm, tokens: torch.Tensor) -> torch.Tensor:
        """The norm of the tokens at these places only; the last use of the stream."""
        part = self._take()
        chosen = None if part is None else part.index_select(0, tokens)
        return self._normed(norm, self._x.index_select(0, tokens), chosen)

    def _take(self) -> torch.Tensor | None:
        part, self._part = self._part, None
        return part

    def _normed(self, norm: RMSNorm, x: torch.Tensor, part: torch.Tensor | None) -> torch.Tensor:
        if not self._fused:
            return norm(x)
        from kvasir_engine.gpu_kernels.residual_norm import add_norm

        after = self._after
        weights = None if after is None or part is None else (after.weight, after.eps)
        return add_norm(x, part, weights, norm.weight, norm.eps, norm.dtype)

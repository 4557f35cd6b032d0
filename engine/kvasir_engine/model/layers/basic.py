"""The layers that decoders are made of, for inference only."""

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from kvasir_engine import gpu_kernels
from kvasir_engine.model.config import Rope
from kvasir_engine.model.layers import cpu
from kvasir_engine.model.tensor_parallel import ALONE, ProcessGroup

if TYPE_CHECKING:
    from kvasir_engine.model.layers.cpu import Packed


class Linear:
    """y = x W^T + b, with W [out, in] laid out for the device it is on.

    On CPUs, bfloat16 weights are packed for this package's kernels, or where those cannot run for oneDNN: reading
    them in order makes a step at small batches up to twice as fast. `exact` ones are never quantized.
    """

    __slots__ = ("_bias", "_blocked", "_weight", "packed")

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None, exact: bool = False) -> None:
        self._bias = bias
        self.packed = cpu.pack(weight, bias, exact)
        self._blocked = (
            self.packed is None
            and weight.device.type == "cpu"
            and weight.dtype == torch.bfloat16
            and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        )
        if self.packed is not None:
            weight = weight.new_empty(0)
        elif self._blocked:
            weight = torch.ops.mkldnn._reorder_linear_weight(weight, None)
        self._weight = weight

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[T, in] to [T, out]."""
        if self.packed is not None:
            return self.packed.multiply(x, x.new_empty(len(x), self.packed.rows))
        if self._blocked:
            out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
            return out
        return F.linear(x, self._weight, self._bias)

    def add_to(self, y: torch.Tensor, x: torch.Tensor) -> None:
        """Add to y [T, out], float32 and contiguous, what x [T, in] gives."""
        if self.packed is not None:
            self.packed.multiply(x, y, add=True)
        else:
            y += self(x)

    def logits(self, x: torch.Tensor, rounding: float, rivals: int) -> torch.Tensor | None:
        """What x [T, in] float32 gives in float32, the largest exactly (see Head); None if that is not at hand."""
        if self.packed is None:
            return None
        from kvasir_engine.cpu_kernels.linear import PackedWeight

        if not isinstance(self.packed, PackedWeight):
            return None
        out = self.packed.multiply(x.to(torch.bfloat16), torch.empty(len(x), self.packed.rows))
        self.packed.settle(out, x.contiguous(), rounding, rivals)
        return out


class RowParallel:
    """y = x W^T over the ranks: each has some columns of W and the matching columns of x, and gets all of y."""

    __slots__ = ("_group", "_linear")

    def __init__(self, weight: torch.Tensor, group: ProcessGroup) -> None:
        self._linear = Linear(weight)
        self._group = group

    @property
    def packed(self) -> "Packed | None":
        """The weight for kernels, if they can do all of it: the ranks' parts are added up by others."""
        return self._linear.packed if self._group.size == 1 else None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[..., this rank's part of in] to [..., out]."""
        out = self._linear(x)
        self._group.all_reduce(out)
        return out

    def add_to(self, y: torch.Tensor, x: torch.Tensor) -> None:
        """Add to y [T, out], float32 and contiguous, what x gives."""
        if self._group.size == 1:
            self._linear.add_to(y, x)
        else:
            y += self(x)


class Head:
    """Logits of the vocabulary in float32, with the likeliest tokens told apart as in float32.

    `weight` [its part of the vocabulary, hidden] is what this rank has; every rank gets the logits of all.

    A product in bfloat16 or float16 is rounded to 8 or 11 bits, so that the likeliest tokens are often equal and
    greedy decoding would take the first of them. Those within the rounding of the largest are computed again,
    unless there are too many for the choice to matter.
    """

    MOST_RIVALS = 64
    QUEUED_RIVALS = 16

    def __init__(self, weight: torch.Tensor, group: ProcessGroup = ALONE) -> None:
        self._weight = weight
        self._linear = Linear(weight, exact=True)
        self._group = group
        self._rounding = 0.0 if weight.dtype == torch.float32 else torch.finfo(weight.dtype).eps

    def __call__(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """[S, hidden], float32, to [S, vocab], float32, in `out` if it is given."""
        if self._group.size == 1:
            settled = self._linear.logits(x, self._rounding, self.MOST_RIVALS)
            if settled is not None:
                return settled if out is None else out.copy_(settled)
        rounded = self._group.all_gather(self._linear(x.to(self._weight.dtype)))
        if self._rounding and self._group.size == 1 and gpu_kernels.takes(rounded):
            from kvasir_engine.gpu_kernels.settle import settle

            return settle(rounded, x, self._weight, out, self._rounding, self.QUEUED_RIVALS)
        logits = rounded.float() if out is None else out.copy_(rounded)
        if self._rounding and logits.device.type == "cuda":
            self.settle_queued(x, logits)
        elif self._rounding:
            self.settle(x, logits)
        return logits

    def settle(self, x: torch.Tensor, logits: torch.Tensor) -> None:
        """Compute the largest of `logits` [S, vocab], after the states `x`, and their rivals exactly."""
        top = logits.amax(-1, keepdim=True)
        rows, tokens = (logits >= top - top.abs() * self._rounding).nonzero(as_tuple=True)
        rivals = torch.bincount(rows, minlength=len(x))[rows]
        close = (rivals > 1) & (rivals <= self.MOST_RIVALS)
        rows, tokens = rows[close], tokens[close]
        if len(rows):
            logits[rows, tokens] = self._exactly(x[rows], tokens)

    def settle_queued(self, x: torch.Tensor, logits: torch.Tensor) -> None:
        """The same for up to `QUEUED_RIVALS`: no shape depends on their number, so nobody waits."""
        largest, tokens = logits.topk(min(self.QUEUED_RIVALS + 1, logits.shape[1]), -1)
        close = largest >= largest[:, :1] - largest[:, :1].abs() * self._rounding
        chosen = close & close[:, 1:2] & ~close[:, -1:]
        # All ranks have the same logits, so the same tokens; each adds those of its own part of the vocabulary.
        own = tokens - self._group.rank * len(self._weight)
        elsewhere = (own < 0) | (own >= len(self._weight))
        own = own.clamp(0, len(self._weight) - 1)
        exact = (x.unsqueeze(1) * self._weight[own]).sum(-1).masked_fill_(elsewhere, 0.0)
        self._group.all_reduce(exact)
        logits.scatter_(1, tokens, torch.where(chosen, exact, largest))

    def _exactly(self, x: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """The logit of each of `tokens` [n] after the state beside it in `x` [n, hidden]."""
        if self._group.size == 1:
            return (x * self._weight[tokens]).sum(-1)
        # All ranks have the same logits, so the same tokens; each adds those of its own part of the vocabulary.
        tokens = tokens - self._group.rank * len(self._weight)
        own = (tokens >= 0) & (tokens < len(self._weight))
        exact = torch.zeros(len(x), device=x.device)
        exact[own] = (x[own] * self._weight[tokens[own]]).sum(-1)
        self._group.all_reduce(exact)
        return exact


class RMSNorm:
    """Root mean square normalisation over the last dimension, of float32 into `dtype`.

    `offset` is added to the weight: Gemma's are stored less one.
    """

    __slots__ = ("dtype", "eps", "fused", "weight")

    def __init__(
        self, weight: torch.Tensor, eps: float, dtype: torch.dtype | None = None, offset: float = 0.0
    ) -> None:
        self.dtype = dtype or weight.dtype
        self.fused = cpu.norm(weight, eps, offset)
        self.weight = weight.float() + offset
        self.eps = eps

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[T, hidden], float32, to the same shape."""
        if self.fused is not None:
            return self.fused(x, torch.empty(x.shape, dtype=self.dtype))
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps).to(self.dtype)


class HeadNorm:
    """Root mean square normalisation of each head of Q and K by itself, in place."""

    __slots__ = ("_heads", "eps", "weight")

    def __init__(
        self, q: torch.Tensor, k: torch.Tensor, heads: int, kv_heads: int, eps: float, offset: float
    ) -> None:
        self.weight = torch.cat((q.expand(heads, -1), k.expand(kv_heads, -1))).float() + offset
        self._heads = heads + kv_heads
        self.eps = eps

    def __call__(self, qkv: torch.Tensor) -> None:
        """[T, heads + 2 * kv_heads, head_dim]: Q and K are changed."""
        qk = qkv[:, : self._heads]
        qk.copy_(F.rms_norm(qk.float(), qk.shape[-1:], None, self.eps).mul_(self.weight))


class Rotary:
    """Rotary position embedding of the halves layout (Hugging Face's), tables for `max_positions` ready."""

    def __init__(
        self, rope: Rope, head_dim: int, max_positions: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        angles = torch.outer(torch.arange(max_positions, dtype=torch.float32), rotary_frequencies(rope, head_dim))
        cos, sin = angles.cos(), angles.sin()
        self.cos = torch.cat((cos, cos), -1).to(device, dtype)
        self.sin = torch.cat((-sin, sin), -1).to(device, dtype)
        self._half = head_dim // 2
        self._fused = cpu.rotation(self.cos)

    def at(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The factors at `positions` [T], for `rotate`."""
        return self.cos[positions].unsqueeze(1), self.sin[positions].unsqueeze(1)

    def rotate(self, x: torch.Tensor, factors: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Turn `x` [T, heads, head_dim] in place."""
        if self._fused is not None:
            return self._fused(x, *factors)
        swapped = torch.roll(x, self._half, -1)
        x.mul_(factors[0]).addcmul_(swapped, factors[1])
        return None


def rotary_frequencies(rope: Rope, head_dim: int) -> torch.Tensor:
    """Radians a position of each of the head_dim / 2 pairs, float32.

    `llama3` is the scaling of Llama 3.1 (llama-models, `apply_scaling`).
    """
    frequencies = 1.0 / rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    if rope.scaling == "linear":
        return frequencies / rope.factor
    if rope.scaling == "llama3":
        turns = rope.original * frequencies / (2 * math.pi)  # within the original length
        kept = ((turns - rope.low) / (rope.high - rope.low)).clamp(0, 1)
        return kept * frequencies + (1 - kept) * frequencies / rope.factor
    return frequencies

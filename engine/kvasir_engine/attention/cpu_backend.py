"""Attention on CPUs whose kernels read the pages of decoding sequences in place."""

import torch

from kvasir_engine.attention.base import AttentionSpec
from kvasir_engine.attention.pool import KVPool
from kvasir_engine.attention.torch_backend import TorchBackend, _Decode
from kvasir_engine.kernels import unavailable_reason
from kvasir_engine.model.batch import ForwardBatch


def usable(pool: KVPool, spec: AttentionSpec) -> bool:
    """Whether CpuBackend can have this pool."""
    shape = pool.shape
    if pool.tensor.device.type != "cpu" or shape.dtype != torch.bfloat16 or unavailable_reason() is not None:
        return False
    from kvasir_engine.kernels import attention

    return attention.fits(spec.heads // shape.kv_heads, shape.head_dim, shape.page_size)


class CpuBackend(TorchBackend):
    """TorchBackend, but for sequences with one new token: nothing of their context is copied."""

    def __init__(self, pool: KVPool, spec: AttentionSpec) -> None:
        from kvasir_engine.kernels.attention import PagedDecode

        super().__init__(pool, spec)
        self._kernel = PagedDecode(pool.tensor, spec.heads, spec.scale)
        self._decoding: list[int] = []

    def plan(self, batch: ForwardBatch) -> None:
        """See AttentionBackend."""
        super().plan(batch)
        self._decoding = [i for i, count in enumerate(batch.query_lens) if count == 1]
        if self._decoding:
            ends = torch.tensor(batch.query_lens).cumsum(0).tolist()
            self._kernel.plan(
                [ends[i] - 1 for i in self._decoding],
                [batch.context_lens[i] for i in self._decoding],
                batch.page_table[self._decoding],
            )

    def _plan_decodes(
        self, batch: ForwardBatch, pages: torch.Tensor, starts: list[int], window: int | None
    ) -> list[_Decode]:
        return []

    def _run_decodes(self, layer: int, decodes: list[_Decode], q: torch.Tensor, out: torch.Tensor) -> None:
        if self._decoding:
            self._kernel.run(layer, q, out, self._windows[layer] or 0)

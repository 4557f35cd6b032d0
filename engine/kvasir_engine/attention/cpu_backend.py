"""Attention on CPUs with kernels that read the sequences' pages in place."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from kvasir_engine.attention.base import AttentionSpec
from kvasir_engine.cpu_kernels import unavailable_reason
from kvasir_engine.forward_batch import ForwardBatch
from kvasir_engine.kv.digests import KeptDigests
from kvasir_engine.kv.pool import KVPool

if TYPE_CHECKING:
    from kvasir_engine.cpu_kernels.team import Arguments, Call


def usable(pool: KVPool, spec: AttentionSpec) -> bool:
    """Whether CpuBackend supports this pool."""
    shape = pool.shape
    if pool.tensor.device.type != "cpu" or shape.dtype != torch.bfloat16 or unavailable_reason() is not None:
        return False
    from kvasir_engine.cpu_kernels import attention

    return attention.fits(spec.heads // shape.kv_heads, shape.head_dim, shape.page_size)


class CpuBackend:
    """An AttentionBackend that copies no context: one kernel for decoding sequences, one for prefill chunks."""

    def __init__(self, pool: KVPool, spec: AttentionSpec) -> None:
        from kvasir_engine.cpu_kernels.attention import PagedDecode
        from kvasir_engine.cpu_kernels.elementwise import KVStore
        from kvasir_engine.cpu_kernels.prefill import PagedPrefill

        self.pool = pool
        self._windows = spec.windows
        self._store = KVStore(pool.tensor)
        self._decode = PagedDecode(pool.tensor, spec.heads, spec.scale)
        self._prefill = PagedPrefill(pool.tensor, spec.heads, spec.scale)
        self._decoding = self._prefilling = False

    def keep(self, digests: KeptDigests) -> None:
        """Compute digests of all KV that is stored from now on. Call it before the first step."""
        from kvasir_engine.cpu_kernels.elementwise import KVStore

        self._store = KVStore(self.pool.tensor, digests)

    def plan(self, batch: ForwardBatch) -> None:
        """See AttentionBackend."""
        self._plan_store(batch)
        counts, contexts, table = batch.query_lens, batch.context_lens, batch.page_table
        starts = [0, *np.cumsum(counts).tolist()]
        decoding = [i for i, count in enumerate(counts) if count == 1]
        chunks = [i for i, count in enumerate(counts) if count > 1]
        self._decoding, self._prefilling = bool(decoding), bool(chunks)
        if decoding:
            self._decode.plan([starts[i] for i in decoding], [contexts[i] for i in decoding], table[decoding])
        if chunks:
            begins, new, lengths = ([of[i] for i in chunks] for of in (starts, counts, contexts))
            self._prefill.plan(begins, new, lengths, table[chunks])

    def _plan_store(self, batch: ForwardBatch) -> None:
        owners = np.repeat(np.arange(len(batch.query_lens)), batch.query_lens)
        pages, offsets = np.divmod(batch.positions.numpy(), self.pool.page_size)
        self._store.plan(batch.page_table.numpy()[owners, pages], offsets)

    def calls(
        self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor
    ) -> tuple[Call, Call, Call]:
        """The kernel calls of `run` by the present plan: storing, decoding sequences, chunks."""
        window = self._windows[layer] or 0
        chunks = self._prefill.call(layer, q, out, window)
        return self._store.call(layer, k, v), self._decode.call(layer, q, out, window), chunks

    @property
    def planned(self) -> tuple[Arguments, Arguments | None, Arguments | None]:
        """The arguments that these calls share in all layers; None for calls that are not needed."""
        decoding = self._decode.planned if self._decoding else None
        return self._store.planned, decoding, self._prefill.planned if self._prefilling else None

    def run(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """See AttentionBackend."""
        self._store.run(layer, k, v)
        out = q.new_empty(q.shape[0], q.shape[1] * q.shape[2])
        window = self._windows[layer] or 0
        if self._decoding:
            self._decode.run(layer, q, out, window)
        if self._prefilling:
            self._prefill.run(layer, q, out, window)
        return out

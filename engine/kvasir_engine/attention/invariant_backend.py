"""Attention that has the same bits for a token in any batch and however its prompt was divided into chunks."""

import torch

from kvasir_engine.attention.cpu_backend import CpuBackend
from kvasir_engine.forward_batch import ForwardBatch


class InvariantBackend(CpuBackend):
    """CpuBackend with every token of a chunk attended as if it were decoded.

    That kernel divides a token's context at fixed places and joins the parts in their order, whatever is beside it.
    """

    def plan(self, batch: ForwardBatch) -> None:
        """See AttentionBackend."""
        self._plan_store(batch)
        self._decoding = True
        pages = batch.page_table.repeat_interleave(torch.tensor(batch.query_lens), 0)
        self._decode.plan(range(len(batch.tokens)), (batch.positions + 1).tolist(), pages)

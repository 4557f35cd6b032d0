"""Attention with bitwise the same result for a token in any batch and for any division of its
prompt into chunks.
"""

import torch

from kvasir_engine.attention.cpu_backend import CpuBackend
from kvasir_engine.forward_batch import ForwardBatch


class InvariantBackend(CpuBackend):
    """A CpuBackend that computes each token of a chunk as if it were decoded.

    The decode kernel splits a token's context at fixed places and joins the parts in order, whatever else is in the
    batch.
    """

    def plan(self, batch: ForwardBatch) -> None:
        """See AttentionBackend."""
        self._plan_store(batch)
        self._decoding = True
        pages = batch.page_table.repeat_interleave(torch.tensor(batch.query_lens), 0)
        self._decode.plan(range(len(batch.tokens)), (batch.positions + 1).tolist(), pages)

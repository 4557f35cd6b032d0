"""A batch in the form of kernels over a paged cache: compressed rows of page numbers. Pure; host memory only.

The names are FlashInfer's: the pages of sequence i are `kv_indices[kv_indptr[i]:kv_indptr[i + 1]]`, and it uses the
first `kv_last_page_len[i]` slots of the last one; its queries are rows `qo_indptr[i]` to `qo_indptr[i + 1]`.
"""

from dataclasses import dataclass

import torch

from kvasir_engine.forward_batch import ForwardBatch


@dataclass(frozen=True)
class PagedRows:
    """The rows of `n` sequences. All int32, on the host."""

    qo_indptr: torch.Tensor  # [n + 1]
    kv_indptr: torch.Tensor  # [n + 1]
    kv_indices: torch.Tensor  # [kv_indptr[n]]
    kv_last_page_len: torch.Tensor  # [n], from 1 to the page size


def decoding(batch: ForwardBatch) -> int:
    """The number of sequences at the batch's beginning that have one new token each."""
    return next((i for i, count in enumerate(batch.query_lens) if count != 1), len(batch.query_lens))


def paged_rows(batch: ForwardBatch, page_size: int, sequences: range) -> PagedRows:
    """The rows of consecutive sequences of `batch`; queries are counted from the first of them."""
    queries = torch.tensor(batch.query_lens[sequences.start : sequences.stop], dtype=torch.int32)
    context = torch.tensor(batch.context_lens[sequences.start : sequences.stop], dtype=torch.int32)
    pages = (context + (page_size - 1)) // page_size
    table = batch.page_table[sequences.start : sequences.stop]
    used = torch.arange(table.shape[1]) < pages[:, None]
    return PagedRows(
        _starts(queries),
        _starts(pages),
        table[used].to(torch.int32),
        context - (pages - 1) * page_size,
    )


def slots(batch: ForwardBatch, page_size: int) -> torch.Tensor:
    """The slots of the new tokens' KV: page * page_size + the place in the page, int64 [T]."""
    owner = torch.repeat_interleave(torch.arange(len(batch.query_lens)), torch.tensor(batch.query_lens))
    return batch.page_table[owner, batch.positions // page_size] * page_size + batch.positions % page_size


def _starts(counts: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))

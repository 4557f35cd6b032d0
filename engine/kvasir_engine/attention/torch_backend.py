"""Attention over the paged pool in plain torch: the reference, and what runs where no kernels do.

All the sequences of a step with one new token are attended together: their KV rows are gathered from the pool
with one indexed read a layer, into groups of similar length. A sequence with more new tokens (a prefill chunk) is
attended alone, in blocks of queries whose scores stay in the processor's cache and which stop at the causal
diagonal. For bfloat16 on CPUs that is nearly twice as fast as torch's fused attention kernel; the scores are
rounded to the pool's dtype, as in transformers' eager attention. In a layer with a window only the KV within it is
read.
"""

from dataclasses import dataclass

import torch

from kvasir_engine.attention.base import AttentionSpec
from kvasir_engine.forward_batch import ForwardBatch
from kvasir_engine.kv.pool import KVPool

PADDING_LIMIT = 1024
"""Tokens of padding that a group of decoding sequences may have: about what one more group costs."""

GROUP_LIMIT = 65536
"""Tokens that a group may have, padding included, to bound the memory of the gathered KV."""

BLOCK = 128
"""Most queries of a chunk that are attended at once."""

BLOCK_SCORES = 128 * 9 * 2048
"""Most scores (queries x heads x tokens) that are held at once, down to 16 queries."""


@dataclass(frozen=True)
class _Decode:
    """`n` sequences with one new token each; of each at most `length` tokens are read, and padded to so many."""

    members: torch.Tensor | slice  # their rows in q
    rows: torch.Tensor  # [2 * n * kv_heads * length]: where K and then V lie in a layer's rows
    mask: torch.Tensor | None  # [n, 1, 1, length], additive
    length: int


@dataclass(frozen=True)
class _Chunk:
    """One sequence with several new tokens, `begin` to `end` of the batch; they and those before them that any of
    them attends to are `context` tokens."""

    begin: int
    end: int
    context: int
    window: int | None
    rows: torch.Tensor  # [2 * kv_heads * context]: where K and then V lie in a layer's rows


@dataclass(frozen=True)
class _Plan:
    """What the layers of one window share in a step."""

    decodes: list[_Decode]
    chunks: list[_Chunk]


class TorchBackend:
    """The pool seen as rows of `head_dim` elements; a layer's rows begin at a fixed offset within every page."""

    def __init__(self, pool: KVPool, spec: AttentionSpec) -> None:
        shape = pool.shape
        self.pool = pool
        self._heads = spec.heads
        self._kv_heads = shape.kv_heads
        self._group = spec.heads // shape.kv_heads
        self._head_dim = shape.head_dim
        self._scale = spec.scale
        self._windows = spec.windows
        layer_rows = 2 * shape.kv_heads * shape.page_size
        self._page_rows = len(shape.layers) * layer_rows
        rows = pool.tensor.view(-1, shape.head_dim)
        self._rows = [rows[layer * layer_rows :] for layer in range(len(shape.layers))]
        device = pool.tensor.device
        self._k_heads = torch.arange(shape.kv_heads, device=device) * shape.page_size
        self._v_heads = self._k_heads + shape.kv_heads * shape.page_size
        hidden = torch.full((BLOCK, BLOCK), float("-inf"), dtype=shape.dtype, device=device)
        self._after, self._before = hidden.triu(1), hidden.tril(-1)
        self._write_k = self._write_v = torch.empty(0)
        self._plans: dict[int | None, _Plan] = {}

    def plan(self, batch: ForwardBatch) -> None:
        """See AttentionBackend."""
        pages = batch.page_table.to(self.pool.tensor.device)
        queries = torch.tensor(batch.query_lens)
        owner = torch.repeat_interleave(torch.arange(len(batch.query_lens)), queries).to(pages.device)
        slots = self._slots(pages, owner, batch.positions.to(pages.device))
        self._write_k = (slots[:, None] + self._k_heads).flatten()
        self._write_v = (slots[:, None] + self._v_heads).flatten()

        starts = [0]
        for count in batch.query_lens:
            starts.append(starts[-1] + count)
        self._plans = {window: self._plan_window(batch, pages, starts, window) for window in set(self._windows)}

    def run(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """See AttentionBackend."""
        rows, plan = self._rows[layer], self._plans[self._windows[layer]]
        rows.index_copy_(0, self._write_k, k.reshape(-1, self._head_dim))
        rows.index_copy_(0, self._write_v, v.reshape(-1, self._head_dim))
        out = q.new_empty(q.shape[0], q.shape[1] * q.shape[2])
        self._run_decodes(layer, plan.decodes, q, out)
        for chunk in plan.chunks:
            out[chunk.begin : chunk.end] = self._run_chunk(chunk, rows, q)
        return out

    def _slots(self, pages: torch.Tensor, owner: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The row, in layer 0, of K's head 0 of each token: `owner` indexes `pages`' rows, elementwise."""
        size = self.pool.page_size
        return pages[owner, positions // size] * self._page_rows + positions % size

    def _kv_rows(self, slots: torch.Tensor) -> torch.Tensor:
        """Rows of all K and then all V, each [..., kv_heads, tokens], of `slots` [..., tokens]; flattened."""
        slots = slots.unsqueeze(-2)
        return torch.stack((slots + self._k_heads[:, None], slots + self._v_heads[:, None])).flatten()

    def _plan_window(
        self, batch: ForwardBatch, pages: torch.Tensor, starts: list[int], window: int | None
    ) -> _Plan:
        chunks = [
            self._plan_chunk(batch, pages, i, starts[i], window)
            for i, count in enumerate(batch.query_lens)
            if count > 1
        ]
        return _Plan(self._plan_decodes(batch, pages, starts, window), chunks)

    def _plan_decodes(
        self, batch: ForwardBatch, pages: torch.Tensor, starts: list[int], window: int | None
    ) -> list[_Decode]:
        lengths = [context if window is None else min(context, window) for context in batch.context_lens]
        decoding = [i for i, count in enumerate(batch.query_lens) if count == 1]
        groups = _grouped(decoding, lengths)
        whole = len(groups) == 1 and len(decoding) == len(lengths)
        plans = []
        for group in [decoding] if whole else groups:
            length = max(lengths[i] for i in group)
            own = torch.tensor([lengths[i] for i in group], device=pages.device)[:, None]
            # Past a sequence's end its own last token is read again, so that no other sequence's KV ever is.
            positions = torch.arange(length, device=pages.device).expand(len(group), length)
            first = torch.tensor([batch.context_lens[i] - lengths[i] for i in group], device=pages.device)[:, None]
            slots = self._slots(
                pages, torch.tensor(group, device=pages.device)[:, None], first + positions.minimum(own - 1)
            )
            mask = None
            if min(lengths[i] for i in group) < length:
                mask = self._additive(positions >= own)[:, None, None, :]
            members = slice(None) if whole else torch.tensor([starts[i] for i in group], device=pages.device)
            plans.append(_Decode(members, self._kv_rows(slots), mask, length))
        return plans

    def _run_decodes(self, layer: int, decodes: list[_Decode], q: torch.Tensor, out: torch.Tensor) -> None:
        for decode in decodes:
            out[decode.members] = self._run_decode(decode, self._rows[layer], q)

    def _run_decode(self, plan: _Decode, rows: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        q = q[plan.members]
        count = q.shape[0]
        kv = rows.index_select(0, plan.rows).view(2, count * self._kv_heads, plan.length, self._head_dim)
        # The heads of a group share their K and V: they are the rows of one small matrix product.
        grouped = (q * self._scale).view(count * self._kv_heads, self._group, self._head_dim)
        scores = torch.bmm(grouped, kv[0].transpose(1, 2))
        if plan.mask is not None:
            scores.view(count, self._kv_heads, self._group, plan.length).add_(plan.mask)
        return torch.bmm(scores.softmax(-1), kv[1]).view(count, -1)

    def _plan_chunk(
        self, batch: ForwardBatch, pages: torch.Tensor, index: int, begin: int, window: int | None
    ) -> _Chunk:
        new, context = batch.query_lens[index], batch.context_lens[index]
        first = 0 if window is None else max(0, context - new + 1 - window)
        positions = torch.arange(first, context, device=pages.device)
        slots = self._slots(pages, torch.full_like(positions, index), positions)
        return _Chunk(begin, begin + new, context - first, window, self._kv_rows(slots))

    def _run_chunk(self, plan: _Chunk, rows: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        new = plan.end - plan.begin
        kv = rows.index_select(0, plan.rows).view(2, self._kv_heads, plan.context, self._head_dim)
        k, v = kv[0].transpose(1, 2), kv[1]
        grouped = (q[plan.begin : plan.end] * self._scale).view(new, self._kv_heads, self._group, self._head_dim)
        out = torch.empty_like(grouped)
        block = min(BLOCK, max(16, BLOCK_SCORES // (self._heads * plan.context)))
        for begin in range(0, new, block):
            size = min(block, new - begin)
            own = plan.context - new + begin  # the first query's token
            seen = slice(0 if plan.window is None else max(0, own + 1 - plan.window), own + size)
            rows_q = grouped[begin : begin + size].permute(1, 2, 0, 3).reshape(self._kv_heads, -1, self._head_dim)
            scores = torch.bmm(rows_q, k[:, :, seen]).view(self._kv_heads, self._group, size, -1)
            scores[..., own - seen.start :].add_(self._after[:size, :size])
            # Of the first token read, the window of the first `within` queries has not moved away yet.
            if plan.window is not None and (within := plan.window - 1 - own + seen.start) < size - 1:
                scores[..., within:, : size - within].add_(self._before[: size - within, : size - within])
            block_out = torch.bmm(scores.softmax(-1).flatten(1, 2), v[:, seen])
            block_out = block_out.view(self._kv_heads, self._group, size, self._head_dim)
            out[begin : begin + size].copy_(block_out.permute(2, 0, 1, 3))
        return out.view(new, -1)

    def _additive(self, hidden: torch.Tensor) -> torch.Tensor:
        mask = torch.zeros(hidden.shape, dtype=self.pool.tensor.dtype, device=hidden.device)
        return mask.masked_fill_(hidden, float("-inf"))


def _grouped(sequences: list[int], lengths: list[int]) -> list[list[int]]:
    """`sequences` by length, longest first, cut where a group's padding or size would pass its limit."""
    groups: list[list[int]] = []
    longest = padding = 0
    for i in sorted(sequences, key=lambda i: -lengths[i]):
        padding += longest - lengths[i]
        if not groups or padding > PADDING_LIMIT or (len(groups[-1]) + 1) * longest > GROUP_LIMIT:
            groups.append([])
            longest, padding = lengths[i], 0
        groups[-1].append(i)
    return groups

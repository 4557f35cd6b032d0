"""Attention on NVIDIA GPUs by FlashInfer's paged kernels (Ye et al., MLSys 2025), over the page-major pool.

A layer of the pool, [pages, 2, kv_heads, page_size, head_dim] with the stride of a whole page between two, is what
FlashInfer calls a paged cache of layout HND: its kernels take the pages' stride from the tensor, nothing is copied.
The sequences at the batch's beginning with one new token each go to the decode wrapper, the others to the prefill
wrapper.

Decoding is FA2's kernel on tensor cores, whose schedule is a pure function of the lengths. Prompts are FA2's too,
and the two are then one compiled module, or FA3's on a Hopper GPU whose image has it (`flashinfer_choice.py`).
"""

import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvasir_engine.attention import flashinfer_modules
from kvasir_engine.attention.base import AttentionSpec
from kvasir_engine.attention.flashinfer_choice import PrefillBackend, prefill_backend
from kvasir_engine.attention.flashinfer_graphs import IN_FLIGHT, GraphWrappers, plan
from kvasir_engine.attention.paged import PagedRows, decoding, paged_rows, slots
from kvasir_engine.forward_batch import ForwardBatch
from kvasir_engine.kv.pool import KVPool
from kvasir_engine.pinned_memory import pinned, stage_into, staged

WORKSPACE_BYTES = 256 << 20
"""For the partial results of sequences that are split over the GPU's processors."""

HEAD_DIMS = (64, 128, 256)
DTYPES = (torch.bfloat16, torch.float16)


def missing() -> str | None:
    """Why this machine cannot use FlashInfer at all, or None."""
    if not torch.cuda.is_available():
        return "CUDA is not available"
    if importlib.util.find_spec("flashinfer") is None:
        return "the package flashinfer-python is not installed (the extra `cuda` has it)"
    return None


def unsupported(pool: KVPool, spec: AttentionSpec) -> str | None:
    """Why FlashInfer cannot attend over this pool, or None."""
    shape = pool.shape
    if pool.memory.device.type != "cuda":
        return f"the pool is on {pool.memory.device}, not on a GPU"
    if shape.head_dim not in HEAD_DIMS:
        return f"head size {shape.head_dim} is none of {', '.join(map(str, HEAD_DIMS))}"
    if shape.dtype not in DTYPES:
        return f"dtype {str(shape.dtype).removeprefix('torch.')} is none of bfloat16, float16"
    if spec.heads % shape.kv_heads:
        return f"{spec.heads} heads are no multiple of {shape.kv_heads} KV heads"
    return None


def _prefill_of(pool: KVPool, spec: AttentionSpec) -> PrefillBackend:
    device, shape = pool.tensor.device, pool.shape
    if device.type != "cuda":
        return "fa2"
    windows = {window is not None for window in spec.windows}
    there = flashinfer_modules.has_fa3(shape.head_dim, shape.dtype, windows)
    return prefill_backend(torch.cuda.get_device_capability(device), shape.head_dim, there)


@dataclass(frozen=True)
class _Wrappers:
    """The decode and the prefill wrapper of the layers of one window."""

    decode: Any
    prefill: Any


class FlashInferBackend:
    """One backend a model: plans go to the wrappers of `IN_FLIGHT` steps in turn. `library` is FlashInfer's module.
    A SeparateStore, and for pools with a scratch page a GraphedAttention.

    `plan` waits for nothing: what it copies to the device comes from page-locked memory and follows, in the stream,
    what the steps before still compute.
    """

    def __init__(
        self,
        pool: KVPool,
        spec: AttentionSpec,
        library: Any = None,
        workspace_bytes: int = WORKSPACE_BYTES,
        prefill: PrefillBackend | None = None,
    ) -> None:
        """`prefill`: the kernel of prompts; None: what suits the GPU and is compiled in."""
        prefill = prefill or _prefill_of(pool, spec)
        library = library or importlib.import_module("flashinfer")
        shape, device = pool.shape, pool.tensor.device
        self.pool = pool
        self._spec = spec
        workspace = torch.zeros(workspace_bytes, dtype=torch.uint8, device=device)
        self._sets = [
            {
                window: _Wrappers(
                    library.BatchDecodeWithPagedKVCacheWrapper(
                        workspace, "HND", use_tensor_cores=True, backend="fa2"
                    ),
                    library.BatchPrefillWithPagedKVCacheWrapper(workspace, "HND", backend=prefill),
                )
                for window in set(spec.windows)
            }
            for _ in range(IN_FLIGHT)
        ]
        self._library, self._workspace = library, workspace
        self._graphs: GraphWrappers | None = None
        self._turn = 0
        self._decodes = 0
        self._wrappers = self._sets[0]
        # [layers][pages, 2, kv_heads, page_size, head_dim]
        self._layers = pool.tensor.unbind(1)
        rows = pool.tensor.view(-1, shape.head_dim)
        layer_rows = 2 * shape.kv_heads * shape.page_size
        self._rows = [rows[layer * layer_rows :] for layer in range(len(shape.layers))]
        self._heads = (torch.arange(2 * shape.kv_heads) * shape.page_size).to(device)  # of K, then of V
        self._page_rows = len(shape.layers) * layer_rows
        self._write = torch.empty(0)  # of each new token its row of the first head of K

    def plan(self, batch: ForwardBatch) -> None:
        """See AttentionBackend."""
        size = self.pool.page_size
        self._turn = (self._turn + 1) % IN_FLIGHT
        self._wrappers = self._sets[self._turn]
        self._decodes = decoding(batch)
        self._write = staged(self._first_rows(batch), self.pool.tensor.device)
        if self._decodes:
            self._plan_decode(paged_rows(batch, size, range(self._decodes)))
        if self._decodes < len(batch.query_lens):
            self._plan_prefill(paged_rows(batch, size, range(self._decodes, len(batch.query_lens))))

    def prepare_graphs(self, sizes: Sequence[int], longest: int) -> None:
        """See GraphedAttention."""
        self._graphs = GraphWrappers(self._library, self._workspace, self.pool, self._spec, sizes, longest)

    def plan_graph(self, batch: ForwardBatch) -> None:
        """See GraphedAttention."""
        assert self._graphs is not None, "no memory was taken for graphs"
        self._turn = (self._turn + 1) % IN_FLIGHT
        self._decodes = len(batch.query_lens)
        self._write = self._graphs.write(self._decodes)
        stage_into(self._write, self._first_rows(batch))
        rows = paged_rows(batch, self.pool.page_size, range(self._decodes))
        decodes = self._graphs.plan(rows, self._turn)
        self._wrappers = {window: _Wrappers(decode, None) for window, decode in decodes.items()}

    def _first_rows(self, batch: ForwardBatch) -> torch.Tensor:
        """For each new token its row in `_rows` of the first layer and head, int64, on the host."""
        size = self.pool.page_size
        where = slots(batch, size)
        return where // size * self._page_rows + where % size

    def run(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """See AttentionBackend."""
        rows, first = self.new_rows(layer)
        # Token by token all heads of K and then all of V.
        where = (first[:, None] + self._heads).flatten()
        rows.index_copy_(0, where, torch.cat((k, v), 1).view(-1, self.pool.shape.head_dim))
        return self.attend(layer, q)

    def new_rows(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """See SeparateStore."""
        return self._rows[layer], self._write

    def attend(self, layer: int, q: torch.Tensor) -> torch.Tensor:
        """See SeparateStore."""
        wrappers, cache = self._wrappers[self._spec.windows[layer]], self._layers[layer]
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        count = self._decodes
        if count:
            wrappers.decode.run(q[:count], cache, out=out[:count])
        if count < q.shape[0]:
            wrappers.prefill.run(q[count:], cache, out=out[count:])
        return out.view(q.shape[0], -1)

    def _plan_decode(self, rows: PagedRows) -> None:
        planned = self._on_host(rows.kv_indptr), self._indices(rows), self._on_host(rows.kv_last_page_len)
        for window, wrappers in self._wrappers.items():
            plan(wrappers.decode, planned, self._spec, self.pool.shape, window)

    def _plan_prefill(self, rows: PagedRows) -> None:
        begins = self._on_host(rows.qo_indptr), self._on_host(rows.kv_indptr)
        planned = *begins, self._indices(rows), self._on_host(rows.kv_last_page_len)
        for window, wrappers in self._wrappers.items():
            plan(wrappers.prefill, planned, self._spec, self.pool.shape, window, causal=True)

    def _on_host(self, numbers: torch.Tensor) -> torch.Tensor:
        return pinned(numbers, self.pool.tensor.device)

    def _indices(self, rows: PagedRows) -> torch.Tensor:
        return staged(rows.kv_indices, self.pool.tensor.device)

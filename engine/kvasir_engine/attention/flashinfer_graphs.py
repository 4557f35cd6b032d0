"""FlashInfer's decode wrappers for CUDA graphs, and the memory that captured kernels read.

A graph has the addresses of what its kernels read, and the grid that they were launched with. FlashInfer's `plan`,
called outside it before each replay, writes the page tables into buffers of ours and its schedule into the
wrapper's workspace. In CUDA graph mode that schedule's layout and grid depend on the number of sequences alone
(`PrefillPlanImpl` of its `scheduler.cuh`: always split, padded to the most tiles there can be); `_Planned.check`
makes sure of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvasir_engine.attention.base import AttentionSpec
from kvasir_engine.attention.paged import PagedRows
from kvasir_engine.kv.pool import KVPool, PoolShape
from kvasir_engine.pinned_memory import pinned, staged

IN_FLIGHT = 2
"""Steps whose plans exist at once: the one that runs and the one that is prepared. A wrapper's plan is copied to
the device from page-locked memory of its own, which must not be written again before that step has ended."""

SCHEDULE_BYTES = 1 << 20
"""For a schedule, of which a sequence takes some 20 bytes; FlashInfer says so when it is too little."""


@dataclass
class _Planned:
    """The wrappers of one size and window, one for each step in flight; all read the same memory of the device."""

    wrappers: Sequence[Any]
    layout: list[int] | None = None

    def check(self, wrapper: Any) -> None:
        """Raise RuntimeError when a graph that was captured after another plan would not do what this one says."""
        layout = list(wrapper._plan_info)
        if self.layout is None:
            self.layout = layout
        if layout != self.layout:
            raise RuntimeError(f"FlashInfer's schedules of one batch size differ: {self.layout} and {layout}")


class GraphWrappers:
    """For batches of `sizes` sequences with at most `longest` pages each. `library` is FlashInfer's module.

    All sizes share their buffers: a step's plan is written there behind what the step before still computes.
    """

    def __init__(
        self,
        library: Any,
        workspace: torch.Tensor,
        pool: KVPool,
        spec: AttentionSpec,
        sizes: Sequence[int],
        longest: int,
    ) -> None:
        device, most = pool.tensor.device, max(sizes)
        self._pool, self._spec = pool, spec
        self._write = torch.zeros(most, dtype=torch.int64, device=device)

        def numbers(count: int) -> torch.Tensor:
            return torch.zeros(count, dtype=torch.int32, device=device)

        indptr, last_page_len, indices = numbers(most + 1), numbers(most), numbers(most * longest)
        self._planned: dict[int, dict[int | None, _Planned]] = {size: {} for size in sizes}
        for window in set(spec.windows):
            # The schedules of two windows are read in one step, so each window has a workspace.
            schedule = torch.zeros(SCHEDULE_BYTES, dtype=torch.uint8, device=device)
            for size in sizes:

                def wrapper(size: int = size, schedule: torch.Tensor = schedule) -> Any:
                    made = library.BatchDecodeWithPagedKVCacheWrapper(
                        workspace,
                        "HND",
                        use_cuda_graph=True,
                        use_tensor_cores=True,
                        paged_kv_indptr_buffer=indptr[: size + 1],
                        paged_kv_indices_buffer=indices,
                        paged_kv_last_page_len_buffer=last_page_len[:size],
                        backend="fa2",
                    )
                    # Gives it page-locked memory of its own, too.
                    made.reset_workspace_buffer(workspace, schedule)
                    return made

                self._planned[size][window] = _Planned([wrapper() for _ in range(IN_FLIGHT)])

    def write(self, size: int) -> torch.Tensor:
        """The rows that a batch of `size` writes first, int64 [size], for the caller to fill."""
        return self._write[:size]

    def plan(self, rows: PagedRows, turn: int) -> dict[int | None, Any]:
        """The wrapper for each window's layers, planned. `turn` is below IN_FLIGHT, another at each step."""
        shape, device = self._pool.shape, self._pool.tensor.device
        indptr, last_page_len = pinned(rows.kv_indptr, device), pinned(rows.kv_last_page_len, device)
        indices = staged(rows.kv_indices, device)
        chosen = {}
        for window, planned in self._planned[len(rows.kv_last_page_len)].items():
            wrapper = planned.wrappers[turn]
            plan(wrapper, (indptr, indices, last_page_len), self._spec, shape, window)
            planned.check(wrapper)
            chosen[window] = wrapper
        return chosen


def plan(
    wrapper: Any,
    rows: tuple[torch.Tensor, ...],
    spec: AttentionSpec,
    shape: PoolShape,
    window: int | None,
    **more: bool,
) -> None:
    """Plan one of FlashInfer's wrappers for `rows`; `more` are further arguments of its `plan`."""
    wrapper.plan(
        *rows,
        spec.heads,
        shape.kv_heads,
        shape.head_dim,
        shape.page_size,
        window_left=window_left(window),
        q_data_type=shape.dtype,
        kv_data_type=shape.dtype,
        sm_scale=spec.scale,
        **more,
    )


def window_left(window: int | None) -> int:
    """FlashInfer's form of a window: the number of tokens before the query's own; -1 for all."""
    return -1 if window is None else window - 1

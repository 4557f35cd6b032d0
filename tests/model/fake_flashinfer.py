"""FlashInfer's two paged wrappers by plain arithmetic: the same arguments, the same checks of them, and no GPU.

It reads the cache only through the arrays of `plan`, by the strides of the tensor that `run` gets. So a batch whose
arrays are wrong gives wrong numbers here as it would there. `run` is one op on the tensors that a kernel would
read: in CUDA graph mode the buffers given to the constructor, and the schedule that `plan` writes to the workspace.
"""

import math

import torch


@torch.library.custom_op("fake_flashinfer::attend", mutates_args=("out",))
def attend(
    q: torch.Tensor,
    cache: torch.Tensor,
    rows: list[torch.Tensor],
    schedule: torch.Tensor,
    window: int,
    scale: float,
    out: torch.Tensor,
) -> None:
    qo_indptr, kv_indptr, kv_indices, last_len = (each.tolist() for each in rows)
    kv_heads, size, head_dim = cache.shape[2:]
    lengths = [(kv_indptr[i + 1] - kv_indptr[i] - 1) * size + last_len[i] for i in range(len(last_len))]
    planned = [len(lengths), window, *lengths]
    assert schedule.view(torch.int32)[: len(planned)].tolist() == planned, "another plan's schedule"
    heads = q.shape[1]
    assert len(q) == qo_indptr[-1]
    for i, length in enumerate(lengths):
        pages = kv_indices[kv_indptr[i] : kv_indptr[i + 1]]
        # [kv_heads, length, head_dim]
        k, v = cache[pages].permute(1, 2, 0, 3, 4).reshape(2, kv_heads, -1, head_dim)[:, :, :length].double()
        mine = slice(qo_indptr[i], qo_indptr[i + 1])
        own = torch.arange(length - (mine.stop - mine.start), length)[:, None]
        token = torch.arange(length)
        seen = token <= own
        if window >= 0:
            seen &= token >= own - window
        for head in range(heads):
            group = head // (heads // kv_heads)
            scores = q[mine, head].double() @ k[group].T * scale
            scores = scores.masked_fill(~seen, -math.inf)
            out[mine, head] = (scores.softmax(-1) @ v[group]).to(out.dtype)


class _Wrapper:
    def __init__(
        self,
        workspace: torch.Tensor,
        layout: str,
        *,
        backend: str,
        use_cuda_graph: bool = False,
        use_tensor_cores: bool = True,
        paged_kv_indptr_buffer: torch.Tensor | None = None,
        paged_kv_indices_buffer: torch.Tensor | None = None,
        paged_kv_last_page_len_buffer: torch.Tensor | None = None,
    ) -> None:
        assert workspace.dtype == torch.uint8
        assert layout == "HND"
        assert backend in (("fa2",) if isinstance(self, BatchDecodeWithPagedKVCacheWrapper) else ("fa2", "fa3"))
        self.backend = backend
        self.plans = 0
        self._schedule = torch.zeros(4096, dtype=torch.uint8)
        self._buffers: tuple[torch.Tensor, ...] | None = None
        if use_cuda_graph:
            assert paged_kv_indptr_buffer is not None
            assert paged_kv_indices_buffer is not None
            assert paged_kv_last_page_len_buffer is not None
            assert len(paged_kv_indptr_buffer) == len(paged_kv_last_page_len_buffer) + 1
            one_each = torch.arange(len(paged_kv_indptr_buffer), dtype=torch.int32)
            paged = (paged_kv_indptr_buffer, paged_kv_indices_buffer, paged_kv_last_page_len_buffer)
            self._buffers = (one_each, *paged)

    def reset_workspace_buffer(self, workspace: torch.Tensor, schedule: torch.Tensor) -> None:
        assert workspace.dtype == schedule.dtype == torch.uint8
        self._schedule = schedule

    def _plan(
        self,
        qo_indptr: torch.Tensor,
        kv_indptr: torch.Tensor,
        kv_indices: torch.Tensor,
        kv_last_page_len: torch.Tensor,
        heads: int,
        kv_heads: int,
        head_dim: int,
        page_size: int,
        *,
        window_left: int,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
        sm_scale: float,
    ) -> None:
        rows = (qo_indptr, kv_indptr, kv_indices, kv_last_page_len)
        assert all(each.dtype == torch.int32 and each.dim() == 1 for each in rows)
        count = len(kv_last_page_len)
        assert len(qo_indptr) == len(kv_indptr) == count + 1
        assert int(kv_indptr[-1]) == len(kv_indices)
        assert bool((kv_last_page_len >= 1).all())
        assert bool((kv_last_page_len <= page_size).all())
        assert heads % kv_heads == 0
        if self._buffers is None:
            self._rows = rows
        else:
            assert count == len(self._buffers[3]), "the batch size is fixed in CUDA graph mode"
            for target, source in zip(self._buffers[1:], rows[1:], strict=True):
                target[: len(source)].copy_(source)
            self._rows = self._buffers
        lengths = (kv_indptr.diff() - 1) * page_size + kv_last_page_len
        self._schedule.view(torch.int32)[: count + 2] = torch.cat((torch.tensor([count, window_left]), lengths))
        self._plan_info = [count, 1, window_left]
        self._shape = heads, kv_heads, head_dim, page_size
        self._window, self._scale, self._dtypes = window_left, sm_scale, (q_data_type, kv_data_type)
        self.plans += 1

    def run(self, q: torch.Tensor, cache: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        heads, kv_heads, head_dim, size = self._shape
        assert q.shape == out.shape
        assert q.shape[1:] == (heads, head_dim)
        assert cache.shape[1:] == (2, kv_heads, size, head_dim)
        assert (q.dtype, cache.dtype) == self._dtypes
        attend(q, cache, list(self._rows), self._schedule, self._window, self._scale, out)
        return out


class BatchDecodeWithPagedKVCacheWrapper(_Wrapper):
    def plan(
        self,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        *,
        window_left: int = -1,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
        sm_scale: float,
    ) -> None:
        one_each = torch.arange(len(last_page_len) + 1, dtype=torch.int32)
        self._plan(
            one_each,
            indptr,
            indices,
            last_page_len,
            num_qo_heads,
            num_kv_heads,
            head_dim,
            page_size,
            window_left=window_left,
            q_data_type=q_data_type,
            kv_data_type=kv_data_type,
            sm_scale=sm_scale,
        )


class BatchPrefillWithPagedKVCacheWrapper(_Wrapper):
    def plan(
        self,
        qo_indptr: torch.Tensor,
        paged_kv_indptr: torch.Tensor,
        paged_kv_indices: torch.Tensor,
        paged_kv_last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        *,
        causal: bool = False,
        window_left: int = -1,
        q_data_type: torch.dtype,
        kv_data_type: torch.dtype,
        sm_scale: float,
    ) -> None:
        assert causal
        self._plan(
            qo_indptr,
            paged_kv_indptr,
            paged_kv_indices,
            paged_kv_last_page_len,
            num_qo_heads,
            num_kv_heads,
            head_dim_qk,
            page_size,
            window_left=window_left,
            q_data_type=q_data_type,
            kv_data_type=kv_data_type,
            sm_scale=sm_scale,
        )

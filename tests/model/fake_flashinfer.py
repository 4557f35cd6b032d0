"""FlashInfer's two paged wrappers by plain arithmetic: the same arguments, the same checks of them, and no GPU.

It reads the cache only through the arrays of `plan`, by the strides of the tensor that `run` gets. So a batch whose
arrays are wrong gives wrong numbers here as it would there.
"""

import math

import torch


class _Wrapper:
    def __init__(
        self, workspace: torch.Tensor, layout: str, *, backend: str, use_tensor_cores: bool = True
    ) -> None:
        assert workspace.dtype == torch.uint8
        assert layout == "HND"
        assert backend == "fa2"
        self.plans = 0

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
        self._rows = rows
        self._shape = heads, kv_heads, head_dim, page_size
        self._window, self._scale, self._dtypes = window_left, sm_scale, (q_data_type, kv_data_type)
        self.plans += 1

    def run(self, q: torch.Tensor, cache: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        qo_indptr, kv_indptr, kv_indices, last_len = (each.tolist() for each in self._rows)
        heads, kv_heads, head_dim, size = self._shape
        assert q.shape == out.shape == (qo_indptr[-1], heads, head_dim)
        assert cache.shape[1:] == (2, kv_heads, size, head_dim)
        assert (q.dtype, cache.dtype) == self._dtypes
        for i in range(len(last_len)):
            pages = kv_indices[kv_indptr[i] : kv_indptr[i + 1]]
            length = (len(pages) - 1) * size + last_len[i]
            # [kv_heads, length, head_dim]
            k, v = cache[pages].permute(1, 2, 0, 3, 4).reshape(2, kv_heads, -1, head_dim)[:, :, :length].double()
            rows = slice(qo_indptr[i], qo_indptr[i + 1])
            new = rows.stop - rows.start
            own = torch.arange(length - new, length)[:, None]
            token = torch.arange(length)
            seen = token <= own
            if self._window >= 0:
                seen &= token >= own - self._window
            for head in range(heads):
                mine = head // (heads // kv_heads)
                scores = q[rows, head].double() @ k[mine].T * self._scale
                scores = scores.masked_fill(~seen, -math.inf)
                out[rows, head] = (scores.softmax(-1) @ v[mine]).to(out.dtype)
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

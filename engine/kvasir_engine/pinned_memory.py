"""Host memory on its way to a device without a wait. A copy from pageable memory would wait for all that is queued.

Page-locked memory is torch's caching host allocator's, which gives a block out again only when copies from it have
ended.
"""

import torch


def pinned(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`tensor` in host memory that copies to `device` need not wait for."""
    return tensor.pin_memory() if device.type == "cuda" else tensor


def staged(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`tensor` on `device`, once what is queued there before has ended."""
    return pinned(tensor, device).to(device, non_blocking=True)


def stage_into(target: torch.Tensor, tensor: torch.Tensor) -> None:
    """Write a host's `tensor` over `target`, contiguous and of its shape, once what is queued before has ended."""
    target.copy_(pinned(tensor, target.device), non_blocking=True)


def fetched(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` on the host, once what is queued on its device has ended; not to be read before."""
    if tensor.device.type != "cuda":
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)

"""The memory of the KV cache: one tensor, page-major, so that a page is one contiguous piece over all layers."""

import ctypes
import mmap
from dataclasses import dataclass
from pathlib import Path

import torch

from kvasir_engine.errors import ModelError
from kvasir_engine.kv.digests import KeptDigests


@dataclass(frozen=True)
class PoolShape:
    """What a pool holds a token of, a rank. `page_size` is in tokens."""

    layers: int
    kv_heads: int
    head_dim: int
    page_size: int
    dtype: torch.dtype

    @property
    def page_bytes(self) -> int:
        """Bytes of one page over all layers."""
        return self.layers * 2 * self.kv_heads * self.page_size * self.head_dim * self.dtype.itemsize

    def pages_within(self, memory: int) -> int:
        """Most pages that `memory` bytes hold."""
        return memory // self.page_bytes


class KVPool:
    """`tensor` is [pages, layers, 2 (K, V), kv_heads, page_size, head_dim], zeroed, and never moves.

    With `scratch` it has one page more, `pages`, which nobody owns, neither sequence nor peer: what is computed to
    fill a batch goes there. Raises ModelError when the device has not the memory for it.
    """

    def __init__(self, shape: PoolShape, pages: int, device: torch.device, scratch: bool = False) -> None:
        wanted = (pages + scratch) * shape.page_bytes
        free = free_memory(device)
        if pages < 1:
            raise ModelError(f"no memory for the KV pool: one page takes {shape.page_bytes:,} bytes")
        if wanted > free:
            raise ModelError(f"no memory for the KV pool: {wanted:,} bytes asked for, {free:,} free on {device}")
        self.shape = shape
        self.pages = pages
        self.scratch = pages if scratch else None
        self.digests: KeptDigests | None = None
        """Digests of what is in the pages; None where the kernels that write KV compute no digests."""
        try:
            self.tensor = torch.empty(
                (pages + scratch, shape.layers, 2, shape.kv_heads, shape.page_size, shape.head_dim),
                dtype=shape.dtype,
                device=device,
            )
        except (RuntimeError, MemoryError):
            raise ModelError(
                f"no memory for the KV pool: {wanted:,} bytes asked for, {free:,} free on {device}"
            ) from None
        if device.type == "cpu":
            ask_for_huge_pages(self.tensor)
        # Masked positions are multiplied by zero, and zero times a stray NaN is not zero.
        self.tensor.zero_()

    @property
    def page_size(self) -> int:
        """Tokens a page."""
        return self.shape.page_size

    @property
    def page_bytes(self) -> int:
        """Bytes of one page over all layers; page i begins at `address + i * page_bytes`."""
        return self.shape.page_bytes

    @property
    def address(self) -> int:
        """Where the pool begins, in this process's or the device's memory."""
        return self.tensor.data_ptr()

    def copy_page(self, source: int, target: int) -> None:
        """Make page `target` hold what page `source` holds."""
        self.tensor[target].copy_(self.tensor[source])
        if self.digests is not None:
            self.digests.copy(source, target)


def ask_for_huge_pages(memory: torch.Tensor) -> None:
    """Let the kernel back a CPU tensor by pages of 2 MiB where it can; what nobody touched yet then gets them.

    A page of the KV cache lies in many pages of 4 KiB, and each is looked up anew: copies and attention are slower.
    """
    begin = -(-memory.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    size = memory.data_ptr() + memory.nbytes - begin
    if size > 0 and hasattr(mmap, "MADV_HUGEPAGE"):
        # A kernel without them refuses, and nothing is lost.
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), mmap.MADV_HUGEPAGE)


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on `device`, the container's limit included."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    return host_free_memory(Path("/proc/meminfo"), Path("/sys/fs/cgroup"))


def host_free_memory(meminfo: Path, cgroup: Path) -> int:
    """The smaller of what the machine has available and what the cgroup (v2 or v1) still allows, in bytes.

    The page cache that a cgroup is charged for and that the kernel can drop counts as free.
    """
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
    free = int(fields["MemAvailable"].split()[0]) << 10
    for limit_file, usage_file, stat_file in [
        ("memory.max", "memory.current", "memory.stat"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
    ]:
        try:
            limit = (cgroup / limit_file).read_text().strip()
            usage = int((cgroup / usage_file).read_text())
            stat = dict(line.split() for line in (cgroup / stat_file).read_text().splitlines())
        except OSError:
            continue
        if limit != "max":
            droppable = int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
            free = min(free, int(limit) - usage + droppable)
    return max(0, free)

"""The memory of the KV cache: page-major, so that a page is one contiguous piece over all layers."""

import ctypes
import mmap
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from kvasir_engine.errors import ModelError
from kvasir_engine.kv.digests import KeptDigests
from kvasir_engine.kv.spec import KVSpec, LayerKV


@dataclass(frozen=True)
class LayerShape:
    """The shape in which a rank's layer keeps a token: [parts, heads, dim] of `dtype` (`kv/spec.py`)."""

    parts: int
    heads: int
    dim: int
    dtype: torch.dtype

    @property
    def kept(self) -> LayerKV:
        """The shape in bytes."""
        return LayerKV(self.parts, self.heads, self.dim * self.dtype.itemsize)


@dataclass(frozen=True)
class PoolShape:
    """The shapes of a rank's layers in a pool. `page_size` is in tokens."""

    layers: tuple[LayerShape, ...]
    page_size: int

    @classmethod
    def uniform(cls, layers: int, kv_heads: int, head_dim: int, page_size: int, dtype: torch.dtype) -> "PoolShape":
        """The shape of a pool whose layers are all alike, with K and V."""
        return cls((LayerShape(2, kv_heads, head_dim, dtype),) * layers, page_size)

    @cached_property
    def spec(self) -> KVSpec:
        """The shape in bytes."""
        return KVSpec(tuple(layer.kept for layer in self.layers), self.page_size)

    @cached_property
    def alike(self) -> LayerShape:
        """The shape of all layers. Raises ModelError if they differ."""
        if len(set(self.layers)) != 1:
            raise ModelError("the KV of this model's layers differs, and there is no kernel yet that takes it")
        return self.layers[0]

    @property
    def kv_heads(self) -> int:
        """For layers that are all alike."""
        return self.alike.heads

    @property
    def head_dim(self) -> int:
        """For layers that are all alike."""
        return self.alike.dim

    @property
    def dtype(self) -> torch.dtype:
        """For layers that are all alike."""
        return self.alike.dtype

    @property
    def page_bytes(self) -> int:
        """Bytes of one page over all layers."""
        return self.spec.page_bytes

    def pages_within(self, memory: int) -> int:
        """The number of pages that fit in `memory` bytes."""
        return memory // self.page_bytes


class KVPool:
    """`memory` is [pages, bytes of a page], zeroed, and never moves; a page has its layers one after another.

    With `scratch` it has one further page, at index `pages`, which no sequence or peer owns: the padding of batches
    is written there. Raises ModelError if the device has too little memory.
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
            self.memory = torch.empty((pages + scratch, shape.page_bytes), dtype=torch.uint8, device=device)
        except (RuntimeError, MemoryError):
            raise ModelError(
                f"no memory for the KV pool: {wanted:,} bytes asked for, {free:,} free on {device}"
            ) from None
        if device.type == "cpu":
            ask_for_huge_pages(self.memory)
        # Masked positions are multiplied by zero, and zero times a stray NaN is not zero.
        self.memory.zero_()

    @cached_property
    def tensor(self) -> torch.Tensor:
        """The memory as [pages, layers, 2 (K, V), kv_heads, page_size, head_dim]. Raises ModelError if layers
        differ."""
        shape, layer = self.shape, self.shape.alike
        sizes = len(shape.layers), layer.parts, layer.heads, shape.page_size, layer.dim
        return self.memory.view(layer.dtype).view(len(self.memory), *sizes)

    def layer(self, number: int) -> torch.Tensor:
        """A view of one layer: [pages, parts, heads, page_size, dim], not contiguous over pages."""
        begin, end = self.shape.spec.starts[number : number + 2]
        kind = self.shape.layers[number]
        sizes = len(self.memory), kind.parts, kind.heads, self.shape.page_size, kind.dim
        return self.memory[:, begin:end].view(kind.dtype).view(sizes)

    @property
    def page_size(self) -> int:
        """The tokens of a page."""
        return self.shape.page_size

    @property
    def page_bytes(self) -> int:
        """Bytes of one page over all layers; page i begins at `address + i * page_bytes`."""
        return self.shape.page_bytes

    @property
    def address(self) -> int:
        """The address of the pool in the memory of this process or the device."""
        return self.memory.data_ptr()

    def copy_page(self, source: int, target: int) -> None:
        """Copy page `source` to page `target`."""
        self.memory[target].copy_(self.memory[source])
        if self.digests is not None:
            self.digests.copy(source, target)


def ask_for_huge_pages(memory: torch.Tensor) -> None:
    """Ask the operating system to back a CPU tensor by pages of 2 MiB. Memory that is not touched yet gets them.

    With pages of 4 KiB each KV page needs many TLB entries, and copies and attention are slower.
    """
    begin = -(-memory.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    size = memory.data_ptr() + memory.nbytes - begin
    if size > 0 and hasattr(mmap, "MADV_HUGEPAGE"):
        # A kernel without them refuses, and nothing is lost.
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), mmap.MADV_HUGEPAGE)


def free_memory(device: torch.device) -> int:
    """The bytes that can still be allocated on `device`, within the container's limit."""
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

"""Weights from safetensors files to a device, in the dtype that the engine computes in."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from kvasir_engine.errors import ModelError
from kvasir_engine.kv.pool import free_memory
from kvasir_engine.model.loading.safetensors_files import check_weights

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Rows:
    """The rows `kept` of the matrix (or vector) `name`, which has `count` rows."""

    name: str
    count: int
    kept: range


class Weights:
    """The tensors of a model's folder by name: mapped from the files, converted and moved as they are asked for.

    `progress` hears ("load", bytes dealt with, bytes in all), by the bytes in the files: a tensor of which a rank
    reads a part counts whole, as the rest is not for this rank to read. Raises ModelError, before anything is
    loaded, when the device has not the memory for one of `ranks` parts.
    """

    def __init__(
        self,
        folder: Path,
        dtype: torch.dtype,
        device: torch.device,
        progress: Progress | None = None,
        ranks: int = 1,
    ) -> None:
        self.folder = folder
        self.dtype = dtype
        self.device = device
        self._progress = progress
        files = check_weights(folder)
        needed, free = sum(file.elements for file in files) * dtype.itemsize // ranks, free_memory(device)
        if needed > free:
            raise ModelError(f"no memory for the weights: {needed:,} bytes in {dtype}, {free:,} free on {device}")
        self._total = sum(file.weight_bytes for file in files)
        self._done = 0
        self._files: dict[str, Any] = {}
        for file in files:
            try:
                opened = safe_open(file.path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{file.path} cannot be read: {error}") from None
            self._files.update(dict.fromkeys(file.tensors, opened))

    def tensor(
        self, name: str, *shape: int, rows: range | None = None, columns: range | None = None
    ) -> torch.Tensor:
        """The tensor `name`, of `shape` in the file; of a matrix only `rows` and `columns`, where given.

        On CPUs what needs no conversion stays in the file's pages, which the kernel shares between processes: a
        model's files must not be written to while it is served. Raises ModelError when the tensor is missing or has
        another shape.
        """
        stored = self._stored(name, shape, rows, columns)
        if stored.dtype == self.dtype and self.device.type == "cpu" and stored.is_contiguous():
            return stored
        return torch.empty(stored.shape, dtype=self.dtype, device=self.device).copy_(stored)

    def stacked(self, parts: Sequence[Rows], *columns: int) -> torch.Tensor:
        """The named matrices of so many `columns` each (vectors without), one below the other."""
        height = sum(len(part.kept) for part in parts)
        out = torch.empty((height, *columns), dtype=self.dtype, device=self.device)
        start = 0
        for part in parts:
            stop = start + len(part.kept)
            out[start:stop].copy_(self._stored(part.name, (part.count, *columns), part.kept, None))
            start = stop
        return out

    def _stored(self, name: str, shape: tuple[int, ...], rows: range | None, columns: range | None) -> torch.Tensor:
        file = self._files.get(name)
        if file is None:
            raise ModelError(f"{self.folder} lacks the tensor {name}")
        entry = file.get_slice(name)
        if tuple(entry.get_shape()) != shape:
            raise ModelError(
                f"{self.folder}: {name} is {entry.get_shape()}, the configuration makes it {list(shape)}"
            )
        kept = [slice(None) if part is None else slice(part.start, part.stop) for part in (rows, columns)]
        stored: torch.Tensor = entry[tuple(kept[: len(shape)])]
        if not stored.is_floating_point() or stored.element_size() < 2:
            raise ModelError(f"{self.folder}: {name} is {stored.dtype}; quantized weights are not supported")
        self._advance(math.prod(shape) * stored.element_size())
        return stored

    def close(self) -> None:
        """Let go of the files: all that is needed of them is loaded."""
        self._files.clear()
        if self._progress:
            self._progress("load", self._total, self._total)

    def _advance(self, size: int) -> None:
        self._done += size
        if self._progress:
            self._progress("load", self._done, self._total)


def choose_device(name: str, rank: int = 0, size: int = 1, nodes: int = 1) -> torch.device:
    """`auto`, `cpu` or `cuda` as a device that is there, for rank `rank` of `size` on `nodes` machines.

    Each machine's ranks take its GPUs from the first on. Raises ModelError.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise ModelError(f"device {name!r} is not known; known: auto, cpu, cuda")
    if name == "cuda" and not torch.cuda.is_available():
        build = "this build of torch has no CUDA" if torch.version.cuda is None else "no GPU is visible"
        raise ModelError(f"device cuda is not available: {build}")
    if name == "cpu" or size == 1:
        return torch.device(name)
    here = size // nodes
    if (visible := torch.cuda.device_count()) < here:
        needs = "as many GPUs" if nodes == 1 else f"{here} GPUs on each of {nodes} nodes"
        raise ModelError(f"tensor parallel size {size} needs {needs}, and {visible} are visible")
    return torch.device("cuda", rank % here)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` (bfloat16) or a dtype's name as a dtype that `device` computes in. Raises ModelError."""
    dtype = DTYPES.get("bfloat16" if name == "auto" else name)
    if dtype is None:
        raise ModelError(f"dtype {name!r} is not supported; supported: auto, {', '.join(DTYPES)}")
    if dtype == torch.bfloat16 and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        raise ModelError(f"{torch.cuda.get_device_name(device)} has no bfloat16; use float16")
    return dtype

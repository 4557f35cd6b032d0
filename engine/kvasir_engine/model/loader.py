"""Weights from safetensors files to a device, in the dtype that the engine computes in."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from kvasir_engine.model.errors import ModelError
from kvasir_engine.model.weights import check_weights

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

Progress = Callable[[str, int, int], None]


class Weights:
    """The tensors of a model's folder by name: mapped from the files, converted and moved as they are asked for.

    `progress` hears ("load", bytes read, bytes in all), by the bytes in the files.
    """

    def __init__(
        self, folder: Path, dtype: torch.dtype, device: torch.device, progress: Progress | None = None
    ) -> None:
        self.folder = folder
        self.dtype = dtype
        self.device = device
        self._progress = progress
        files = check_weights(folder)
        self._total = sum(file.weight_bytes for file in files)
        self._done = 0
        self._files: dict[str, Any] = {}
        for file in files:
            try:
                opened = safe_open(file.path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{file.path} cannot be read: {error}") from None
            self._files.update(dict.fromkeys(file.tensors, opened))

    def tensor(self, name: str, *shape: int) -> torch.Tensor:
        """The tensor `name`. Raises ModelError when it is missing or has another shape."""
        stored = self._stored(name, shape)
        # A copy even where nothing is converted: the file must not be needed, or be able to change, afterwards.
        loaded = torch.empty(shape, dtype=self.dtype, device=self.device).copy_(stored)
        self._advance(stored)
        return loaded

    def stacked(self, rows: dict[str, int], columns: int) -> torch.Tensor:
        """The named matrices, each of its number of rows, one below the other."""
        out = torch.empty((sum(rows.values()), columns), dtype=self.dtype, device=self.device)
        start = 0
        for name, count in rows.items():
            stored = self._stored(name, (count, columns))
            out[start : start + count].copy_(stored)
            start += count
            self._advance(stored)
        return out

    def _stored(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        file = self._files.get(name)
        if file is None:
            raise ModelError(f"{self.folder} lacks the tensor {name}")
        stored: torch.Tensor = file.get_tensor(name)
        if tuple(stored.shape) != shape:
            raise ModelError(
                f"{self.folder}: {name} is {list(stored.shape)}, the configuration makes it {list(shape)}"
            )
        if not stored.is_floating_point() or stored.element_size() < 2:
            raise ModelError(f"{self.folder}: {name} is {stored.dtype}; quantized weights are not supported")
        return stored

    def close(self) -> None:
        """Let go of the files: all that is needed of them is loaded."""
        self._files.clear()
        if self._progress:
            self._progress("load", self._total, self._total)

    def _advance(self, stored: torch.Tensor) -> None:
        self._done += stored.nbytes
        if self._progress:
            self._progress("load", self._done, self._total)


def choose_device(name: str) -> torch.device:
    """`auto`, `cpu` or `cuda` as a device that is there. Raises ModelError."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda"):
        raise ModelError(f"device {name!r} is not known; known: auto, cpu, cuda")
    if name == "cuda" and not torch.cuda.is_available():
        build = "this build of torch has no CUDA" if torch.version.cuda is None else "no GPU is visible"
        raise ModelError(f"device cuda is not available: {build}")
    return torch.device(name)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` (bfloat16) or a dtype's name as a dtype that `device` computes in. Raises ModelError."""
    dtype = DTYPES.get("bfloat16" if name == "auto" else name)
    if dtype is None:
        raise ModelError(f"dtype {name!r} is not supported; supported: auto, {', '.join(DTYPES)}")
    if dtype == torch.bfloat16 and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        raise ModelError(f"{torch.cuda.get_device_name(device)} has no bfloat16; use float16")
    return dtype

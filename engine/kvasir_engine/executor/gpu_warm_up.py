"""Compiles the Triton kernels that a model's steps on a GPU need, before the first step or when an image is built.

Compiled kernels are kept in Triton's own cache. An image has a folder with some, `$KVASIR_TRITON_AHEAD`. A worker,
whose root file system is read-only, copies it into its own folder, and compiles missing kernels there.
"""

import logging
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from kvasir_engine import gpu_kernels
from kvasir_engine.attention import flashinfer_backend, flashinfer_modules
from kvasir_engine.model.config import ModelConfig
from kvasir_engine.model.tensor_parallel import Shard
from kvasir_engine.private_folders import private_folder, run_folder

log = logging.getLogger("model")

AHEAD_VARIABLE = "KVASIR_TRITON_AHEAD"
CACHE_VARIABLE = "TRITON_CACHE_DIR"

Launch = tuple[Any, tuple[Any, ...], dict[str, Any]]
"""A kernel, its arguments (of tensors the dtype) and what it is compiled for."""


@dataclass(frozen=True)
class KernelShape:
    """The sizes of a rank's part of a model for which kernels are compiled. `columns` are those of its gated MLPs;
    `vocab` is 0 if the head is divided among ranks, which need no kernel for it."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    columns: tuple[int, ...]
    vocab: int
    norm_eps: float
    qk_norm: bool
    post_norms: bool
    activation: Literal["silu", "gelu_tanh"]
    dtype: torch.dtype = torch.bfloat16
    page_size: int = 16

    @staticmethod
    def of(config: ModelConfig, part: Shard, ranks: int, dtype: torch.dtype, page_size: int) -> "KernelShape":
        experts = config.experts.layers if config.experts else ()
        columns = [len(part.intermediate)] * (len(experts) < config.layers)
        columns += [len(part.experts)] * bool(experts)
        return KernelShape(
            config.hidden,
            len(part.heads),
            len(part.kv_heads),
            config.head_dim,
            tuple(columns),
            config.vocab if ranks == 1 and dtype != torch.float32 else 0,
            config.norm_eps,
            config.qk_norm,
            config.post_norms,
            config.activation,
            dtype,
            page_size,
        )


def launches(shape: KernelShape) -> Iterator[Launch]:
    """The kernels that steps of a model of this shape launch, with sampling and digests."""
    from kvasir_engine.connector import triton_digests
    from kvasir_engine.gpu_kernels import gate, residual_norm, rotary_store, settle
    from kvasir_engine.model.layers.basic import Head
    from kvasir_engine.sampling import draw_triton, mask_triton
    from kvasir_engine.sampling.masses import UNIT_BITS

    own, single, wide = shape.dtype, torch.float32, torch.int64
    block, warps = residual_norm.shape_of(shape.hidden)
    post, eps = shape.post_norms, shape.norm_eps
    for part, out in ((False, own), (True, own), (True, single)):
        after = part and post
        yield (
            residual_norm._add_norm,
            (single, own if part else single, single, single, out),
            {
                "HIDDEN": shape.hidden, "BLOCK": block, "EPS": eps, "AFTER_EPS": eps if after else 0.0,
                "PART": part, "AFTER": after, "num_warps": warps,
            },
        )  # fmt: skip
    for columns in shape.columns:
        constants = {
            "COLUMNS": columns, "GELU": shape.activation == "gelu_tanh", "ROOT": gate.ROOT, "CUBE": gate.CUBE,
            "BLOCK": gate.BLOCK, "num_warps": gate.WARPS,
        }  # fmt: skip
        yield gate._gated, (own, own), constants
    normed, tables = shape.qk_norm, (own, own)
    sizes = rotary_store.constants(shape.heads, shape.kv_heads, shape.head_dim, shape.page_size)
    yield (
        rotary_store._rotary_store,
        (own, wide, *tables, single if normed else own, wide, own, own),
        {"NORM": normed, "EPS": eps if normed else 0.0, **sizes, "num_warps": rotary_store.WARPS},
    )
    if shape.vocab:
        constants = {
            "VOCAB": shape.vocab, "ROUNDING": torch.finfo(own).eps, "MOST": Head.QUEUED_RIVALS,
            **settle.constants(shape.hidden), "num_warps": settle.WARPS,
        }  # fmt: skip
        yield settle._settle, (own, single, own, single), constants
        yield (
            draw_triton._draw,
            (single, shape.vocab, shape.vocab, torch.float64, wide),
            {"UNIT": float(1 << UNIT_BITS), "BLOCK": draw_triton.BLOCK, "num_warps": draw_triton.WARPS},
        )
        yield (
            mask_triton._mask,
            (single, shape.vocab, torch.int32, torch.int32, single, shape.vocab, -(-shape.vocab // 32)),
            {"BLOCK": mask_triton.BLOCK, "num_warps": mask_triton.WARPS},
        )
    row = shape.head_dim * own.itemsize
    if row % 8 == 0:
        yield (
            triton_digests._digest,
            (wide, wide, wide, wide, 1, 1, 1, 1, 1, *triton_digests._SIGNED),
            {**triton_digests.constants(row // 8), "num_warps": triton_digests.WARPS},
        )


@dataclass(frozen=True)
class WarmedUp:
    """The kernels that were in the cache, and those that were compiled, in `seconds`."""

    at_hand: tuple[str, ...]
    compiled: tuple[str, ...]
    seconds: float


def warm_up(shape: KernelShape) -> WarmedUp:
    """Compile missing kernels for the GPU that Triton's driver names."""
    import triton

    hits: list[bool] = []
    at_hand: list[str] = []
    compiled: list[str] = []

    def listen(*, cache_hit: bool, **_: Any) -> None:
        hits.append(cache_hit)

    began, before = time.monotonic(), triton.knobs.compilation.listener
    triton.knobs.compilation.listener = listen
    try:
        for kernel, args, constants in launches(shape):
            hits.clear()
            kernel.warmup(*args, grid=(1,), **constants)
            (compiled if hits and not hits[-1] else at_hand).append(kernel.__name__.strip("_"))
    finally:
        triton.knobs.compilation.listener = before
    return WarmedUp(tuple(at_hand), tuple(compiled), time.monotonic() - began)


def use_own_cache() -> None:
    """Set Triton's cache to this user's own folder, with a copy of the image's kernels.

    A folder that the environment names is used as it is. Raises NotPrivate and OSError.
    """
    if os.environ.get(CACHE_VARIABLE):
        return
    folder = private_folder(run_folder() / "triton")
    ahead = os.environ.get(AHEAD_VARIABLE)
    for each in Path(ahead).iterdir() if ahead and Path(ahead).is_dir() else ():
        if each.is_dir() and not (folder / each.name).exists():
            whole = folder / f"{each.name}.{os.getpid()}"
            shutil.copytree(each, whole)
            try:
                whole.rename(folder / each.name)
            except OSError:  # another process of this user was first
                shutil.rmtree(whole)
    os.environ[CACHE_VARIABLE] = str(folder)


def log_kernels(shape: KernelShape, windows: Sequence[int | None]) -> None:
    """Compile Triton's missing kernels, and log in one line which kernels were in the cache and which were not.

    FlashInfer compiles its missing kernels when they are first used.
    """
    log.info("GPU kernels %s", "; ".join((_triton_kernels(shape), _flashinfer_kernels(shape, windows))))


def _triton_kernels(shape: KernelShape) -> str:
    if not gpu_kernels.has_triton():
        return "triton: not installed, plain layers instead"
    use_own_cache()
    done = warm_up(shape)
    return f"triton: {_named(done.at_hand, done.compiled)} seconds={done.seconds:.1f}"


def _flashinfer_kernels(shape: KernelShape, windows: Sequence[int | None]) -> str:
    if flashinfer_backend.missing() is not None:
        return "flashinfer: not installed"
    try:
        names = flashinfer_modules.compiled_in(
            shape.head_dim, shape.dtype, {window is not None for window in windows}
        )
    except Exception as error:  # other releases than the pinned have other names; it is a line in the log
        return f"flashinfer: unknown ({type(error).__name__}: {error})"
    return f"flashinfer: {_named(*names)}"


def _named(at_hand: Sequence[str], lacking: Sequence[str]) -> str:
    def joined(names: Sequence[str]) -> str:
        return ",".join(dict.fromkeys(names)) or "none"

    return f"compiled_in={joined(at_hand)} not_compiled_in={joined(lacking)}"

"""FlashInfer's ways to attend over a paged pool, measured in one run, by shape: which to choose is decided from it.

    python -m bench.gpu.attention [--dry]

Llama-3.1-8B's heads in bfloat16, each layer's pages the page-major pool's, by CUDA's events. Prefill by FA2 and FA3,
decode on tensor cores and without, pages of 16 and 64 tokens. Prints a Markdown table; a way that cannot be used here
says why in its place. `--dry`: a few tokens on a CPU, by a stand-in for FlashInfer in the tests.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

HEADS, KV_HEADS, DIM, LAYERS = 32, 8, 128, 4
ROUNDS = 20


@dataclass(frozen=True)
class Shape:
    """`sequences` that have `context` tokens each, the last `queries` of them new."""

    sequences: int
    context: int
    queries: int

    @property
    def name(self) -> str:
        kind = "decode" if self.queries == 1 else f"prefill, {self.queries} new"
        return f"{kind}, {self.sequences} x {self.context}"


SHAPES = (
    Shape(1, 128, 1), Shape(64, 128, 1), Shape(256, 128, 1), Shape(256, 1024, 1), Shape(8, 8192, 1),
    Shape(16, 256, 256), Shape(4, 1024, 1024), Shape(1, 4096, 4096), Shape(1, 8192, 4096),
)  # fmt: skip
DRY = (Shape(2, 24, 1), Shape(2, 24, 24))


@dataclass(frozen=True)
class Way:
    """A wrapper of FlashInfer's, and how it is made."""

    name: str
    backend: str
    decodes: bool
    tensor_cores: bool = True


WAYS = (
    Way("FA2", "fa2", False),
    Way("FA3", "fa3", False),
    Way("FA2 on tensor cores", "fa2", True),
    Way("decode kernel", "fa2", True, tensor_cores=False),
)


def planned(library: Any, way: Way, shape: Shape, page: int, device: str) -> Callable[[int], None]:
    """A call that attends in a layer. Raises what the way says against this shape or device."""
    pages = -(-shape.context // page)
    pool = torch.randn(shape.sequences * pages, LAYERS, 2, KV_HEADS, page, DIM, device=device).bfloat16()
    layers = pool.unbind(1)
    workspace = torch.zeros(256 << 20 if device == "cuda" else 4096, dtype=torch.uint8, device=device)
    q = torch.randn(shape.sequences * shape.queries, HEADS, DIM, device=device).bfloat16()
    out = torch.empty_like(q)
    whole = torch.arange(shape.sequences + 1, dtype=torch.int32)
    rows = (
        whole * pages,
        torch.randperm(shape.sequences * pages).int(),
        torch.full((shape.sequences,), shape.context - (pages - 1) * page, dtype=torch.int32),
    )
    sizes = HEADS, KV_HEADS, DIM, page
    more: dict[str, Any] = {
        "q_data_type": torch.bfloat16, "kv_data_type": torch.bfloat16, "sm_scale": DIM**-0.5, "window_left": -1
    }  # fmt: skip
    if way.decodes:
        wrapper = library.BatchDecodeWithPagedKVCacheWrapper(
            workspace, "HND", use_tensor_cores=way.tensor_cores, backend=way.backend
        )
        wrapper.plan(*rows, *sizes, **more)
    else:
        wrapper = library.BatchPrefillWithPagedKVCacheWrapper(workspace, "HND", backend=way.backend)
        wrapper.plan(whole * shape.queries, *rows, *sizes, causal=True, **more)
    return lambda layer: wrapper.run(q, layers[layer], out=out)


def microseconds(attend: Callable[[int], None], device: str, rounds: int) -> float:
    """Of a layer: the median of some rounds over all layers, so that no layer is in the cache from before."""
    times = []
    for _ in range(rounds):
        if device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
        began = time.perf_counter()
        for layer in range(LAYERS):
            attend(layer)
        if device == "cuda":
            end.record()
            end.synchronize()
        seconds = begin.elapsed_time(end) / 1e3 if device == "cuda" else time.perf_counter() - began
        times.append(seconds / LAYERS)
    return statistics.median(times[rounds // 4 :]) * 1e6


def measured(library: Any, shape: Shape, page: int, device: str, rounds: int) -> list[str]:
    """A cell for each way."""
    cells = []
    for way in WAYS:
        if way.decodes != (shape.queries == 1):
            cells.append("")
            continue
        try:
            cells.append(f"{microseconds(planned(library, way, shape, page, device), device, rounds):.1f}")
        except Exception as error:  # it is a cell: the others are measured all the same
            cells.append(f"{type(error).__name__}: {error}".splitlines()[0][:60].replace("|", "/"))
        if device == "cuda":
            torch.cuda.empty_cache()
    return cells


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true")
    dry = parser.parse_args().dry
    if dry:
        sys.path.append(str(Path(__file__).parents[2] / "tests" / "model"))
        import fake_flashinfer as library

        device = "cpu"
    else:
        import flashinfer as library

        device = "cuda"
    name = "a CPU, as a dry run" if dry else torch.cuda.get_device_name()
    print(f"us a layer, {HEADS} heads, {KV_HEADS} of KV, {DIM} wide, bfloat16, on {name}:\n")
    print("| shape | page |" + "".join(f" {way.name} |" for way in WAYS))
    print("| --- | --- |" + " --- |" * len(WAYS))
    for shape in DRY if dry else SHAPES:
        for page in (16, 64):
            cells = measured(library, shape, page, device, 2 if dry else ROUNDS)
            print(f"| {shape.name} | {page} |" + "".join(f" {cell} |" for cell in cells), flush=True)


if __name__ == "__main__":
    main()

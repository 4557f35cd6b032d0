"""The CPU kernels beside what torch has: all products of one step, and one step's attention.

    python -m bench.kernels

The shapes are SmolLM2-135M's. Each pair is timed in turn, so that the machine's drift meets both alike; medians.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from rich.console import Console
from rich.table import Table

from kvasir_engine.attention.base import AttentionBackend, AttentionSpec
from kvasir_engine.attention.cpu_backend import CpuBackend
from kvasir_engine.attention.torch_backend import TorchBackend
from kvasir_engine.cpu_kernels import unavailable_reason
from kvasir_engine.forward_batch import ForwardBatch
from kvasir_engine.kv.pool import KVPool, PoolShape

LAYERS, HIDDEN, HEADS, KV_HEADS, DIM, VOCABULARY = 30, 576, 9, 3, 64, 49152
SHAPES = [(960, HIDDEN), (HIDDEN, HIDDEN), (3072, HIDDEN), (HIDDEN, 1536)]
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512)
CHUNKS = ((64, 64), (512, 512), (512, 1536), (512, 2500))
SEQUENCES = ((1, 128), (4, 704), (8, 2000), (16, 208))
PAGE = 16


def in_turn(times: int, *functions: Callable[[], object]) -> list[float]:
    """The median milliseconds of each, called one after the other `times` times."""
    taken: list[list[float]] = [[] for _ in functions]
    for _ in range(times + 1):
        for function, own in zip(functions, taken, strict=True):
            began = time.perf_counter()
            function()
            own.append(time.perf_counter() - began)
    return [statistics.median(own[1:]) * 1e3 for own in taken]


def products() -> Table:
    """Every matrix of the model once, by oneDNN on its packed weights and by ours."""
    from kvasir_engine.cpu_kernels.int8 import QuantizedWeight, Scratch
    from kvasir_engine.cpu_kernels.linear import PackedWeight

    weights = [torch.randn(shape).bfloat16() for _ in range(LAYERS) for shape in SHAPES]
    weights.append(torch.randn(VOCABULARY, HIDDEN).bfloat16())
    size = sum(weight.nbytes for weight in weights)
    theirs = [torch.ops.mkldnn._reorder_linear_weight(weight, None) for weight in weights]
    ours = [PackedWeight(weight) for weight in weights]
    scratch = Scratch()
    int8 = [*(QuantizedWeight(weight, None, scratch) for weight in weights[:-1]), ours[-1]]  # as in a model
    columns = [weight.shape[1] for weight in weights]
    table = Table(
        "rows", "oneDNN ms", "ours ms", "ratio", "GB/s", "GFLOP/s", "int8 ms", title="products of a step, bfloat16"
    )
    for rows in ROWS:
        x = {count: torch.randn(rows, count).bfloat16() for count in set(columns)}
        y = {own.rows: torch.empty(rows, own.rows).bfloat16() for own in ours}

        def by_onednn(x: dict[int, torch.Tensor] = x) -> None:
            for weight, count in zip(theirs, columns, strict=True):
                torch.ops.mkldnn._linear_pointwise(x[count], weight, None, "none", [], "")

        def by_us(x: dict[int, torch.Tensor] = x, y: dict[int, torch.Tensor] = y) -> None:
            for own in ours:
                own.multiply(x[own.columns], y[own.rows])

        def by_int8(x: dict[int, torch.Tensor] = x, y: dict[int, torch.Tensor] = y) -> None:
            for own in int8:
                own.multiply(x[own.columns], y[own.rows])

        before, now, quantized = in_turn(5 if rows > 64 else 15, by_onednn, by_us, by_int8)
        rate = size / now / 1e6
        shown = [
            f"{rows}",
            f"{before:.1f}",
            f"{now:.1f}",
            f"{before / now:.2f}",
            f"{rate:.1f}",
            f"{rate * rows:.0f}",
        ]
        table.add_row(*shown, f"{quantized:.1f}")
    return table


def attention() -> Iterator[Table]:
    """One new token each of some sequences, and then a chunk of one, over all layers."""
    pool = KVPool(PoolShape.uniform(LAYERS, KV_HEADS, DIM, PAGE, torch.bfloat16), 1200, torch.device("cpu"))
    pool.tensor.normal_()
    spec = AttentionSpec(HEADS, DIM**-0.5, (None,) * LAYERS)

    def compare(count: int, new: int, context: int) -> list[float]:
        pages = torch.randint(0, pool.pages, (count, -(-context // PAGE)))
        positions = torch.arange(context - new, context).repeat(count)
        batch = ForwardBatch(torch.zeros_like(positions), positions, [new] * count, [context] * count, pages)
        qkv = torch.randn(len(positions), HEADS + 2 * KV_HEADS, DIM).bfloat16()
        return in_turn(
            10 if new == 1 else 4,
            *(partial(step, kind(pool, spec), batch, qkv) for kind in (TorchBackend, CpuBackend)),
        )

    table = Table(
        "sequences", "tokens each", "gathered ms", "in place ms", "ratio", title="attention of a decode step"
    )
    for count, context in SEQUENCES:
        before, now = compare(count, 1, context)
        table.add_row(f"{count}", f"{context}", f"{before:.2f}", f"{now:.2f}", f"{before / now:.2f}")
    yield table

    table = Table(
        "new tokens", "of", "gathered ms", "in place ms", "ratio", "GFLOP/s", title="attention of a prefill chunk"
    )
    for new, context in CHUNKS:
        before, now = compare(1, new, context)
        products = 4 * DIM * HEADS * LAYERS * sum(range(context - new + 1, context + 1))
        rate = products / now / 1e6
        table.add_row(f"{new}", f"{context}", f"{before:.1f}", f"{now:.1f}", f"{before / now:.2f}", f"{rate:.0f}")
    yield table


def step(backend: AttentionBackend, batch: ForwardBatch, qkv: torch.Tensor) -> None:
    """The attention of one step."""
    backend.plan(batch)
    q, k, v = qkv.split([HEADS, KV_HEADS, KV_HEADS], 1)
    for layer in range(LAYERS):
        backend.run(layer, q, k, v)


def main() -> None:
    """See the module's docstring."""
    if (reason := unavailable_reason()) is not None:
        raise SystemExit(f"the kernels cannot run here: {reason}")
    with torch.inference_mode():
        for table in (products(), *attention()):
            for column in table.columns:
                column.justify = "right"
            Console().print(table)


if __name__ == "__main__":
    main()

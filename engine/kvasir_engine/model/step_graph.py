"""All layers of a step as one list of kernel calls, where this package's kernels cover all of a layer.

Without it each kernel is launched by itself, with arguments prepared in Python, which takes a fifth of a decode
step. Kernels and arguments are the same, so the results are bitwise the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kvasir_engine.attention.base import AttentionBackend
from kvasir_engine.attention.cpu_backend import CpuBackend
from kvasir_engine.model.block import Block
from kvasir_engine.model.layers import cpu
from kvasir_engine.model.layers.mlp import MLP

if TYPE_CHECKING:
    from kvasir_engine.cpu_kernels.elementwise import Gate, Norm
    from kvasir_engine.cpu_kernels.team import Call
    from kvasir_engine.model.layers.basic import Rotary
    from kvasir_engine.model.layers.cpu import Packed

LEAST = 64
"""A graph has room for at least so many tokens; a larger one is built when needed."""

STORE, DECODE, CHUNKS, CALLS = 3, 4, 5, 11
"""The indices of attention's calls among a layer's calls, and how many calls a layer has."""

Factors = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Layer:
    """A block that consists of kernels only."""

    attention_norm: Norm
    qkv: Packed
    rotary: Rotary
    output: Packed
    mlp_norm: Norm
    gate_up: Packed
    gate: Gate
    down: Packed


def layer_of(block: Block) -> Layer | None:
    """The block's kernels, or None where torch or other ranks compute a part of it."""
    if block.head_norm or block.after_attention or block.after_mlp or not isinstance(block.mlp, MLP):
        return None
    mlp = block.mlp
    qkv, output, gate_up, down = block.qkv.packed, block.output.packed, mlp.gate_up.packed, mlp.down.packed
    first, second = block.attention_norm.fused, block.mlp_norm.fused
    if not (qkv and output and gate_up and down and first and second):
        return None
    return Layer(first, qkv, block.rotary, output, second, gate_up, cpu.gate(mlp.activation.name), down)


class StepGraph:
    """The layers with one attention backend, for any step of at most `tokens` tokens."""

    def __init__(self, layers: Sequence[Layer], heads: int, backend: CpuBackend, tokens: int) -> None:
        from kvasir_engine.cpu_kernels.elementwise import rotation
        from kvasir_engine.cpu_kernels.program import Program

        shape, first = backend.pool.shape, layers[0]
        self.backend, self.tokens, self.threads = backend, tokens, torch.get_num_threads()
        self._layers = len(layers)
        self._x = torch.zeros(tokens, first.qkv.columns)

        def buffer(*sizes: int) -> torch.Tensor:
            return torch.zeros(tokens, *sizes, dtype=torch.bfloat16)

        self._factors = {
            each: (buffer(1, shape.head_dim), buffer(1, shape.head_dim))
            for each in {layer.rotary for layer in layers}
        }
        normed, attended = buffer(first.qkv.columns), buffer(first.output.columns)
        qkv = buffer(heads + 2 * shape.kv_heads, shape.head_dim)
        gate_up, gated = buffer(first.gate_up.rows), buffer(first.down.columns)
        self._memory = (normed, attended, qkv, gate_up, gated)  # lives as long as the program
        q, k, v = torch.split(qkv, [heads, shape.kv_heads, shape.kv_heads], 1)
        calls: list[Call] = []
        for index, layer in enumerate(layers):
            cos, sin = self._factors[layer.rotary]
            calls += [
                layer.attention_norm.call(self._x, normed, self.threads),
                layer.qkv.call(normed, qkv.flatten(1)),
                rotation(qkv[:, : heads + shape.kv_heads], cos, sin, self.threads),
                *backend.calls(index, q, k, v, attended),
                layer.output.call(attended, self._x, add=True),
                layer.mlp_norm.call(self._x, normed, self.threads),
                layer.gate_up.call(normed, gate_up),
                layer.gate.call(gate_up, gated, self.threads),
                layer.down.call(gated, self._x, add=True),
            ]
        self._program = Program(calls)

    def run(
        self, x: torch.Tensor, factors: dict[Rotary, Factors], on_layer: Callable[[int], None] | None
    ) -> torch.Tensor:
        """x [T, hidden] after all layers, float32; the next step overwrites it. The backend must be planned."""
        tokens = len(x)
        self._x[:tokens] = x
        for rotary, own in self._factors.items():
            for target, source in zip(own, factors[rotary], strict=True):
                target[:tokens] = source
        self._program.set_tokens(tokens)
        for place, planned in zip((STORE, DECODE, CHUNKS), self.backend.planned, strict=True):
            self._program.set(slice(place, None, CALLS), planned)
        if on_layer is None:
            self._program.run(0, CALLS * self._layers)
            return self._x[:tokens]
        done = 0
        for layer in range(self._layers):
            until = CALLS * layer + STORE + 1
            self._program.run(done, until)
            on_layer(layer)
            done = until
        self._program.run(done, CALLS * self._layers)
        return self._x[:tokens]


class Graphs:
    """Builds a decoder's graph when it is first needed, and again when more tokens come than it has room for."""

    def __init__(self, blocks: Sequence[Block], heads: int) -> None:
        layers = [layer_of(block) for block in blocks]
        self._layers = [layer for layer in layers if layer is not None]
        self._whole = len(self._layers) == len(blocks)
        self._heads = heads
        self._graph: StepGraph | None = None

    def graph(self, attention: AttentionBackend, tokens: int) -> StepGraph | None:
        """A graph for `tokens` tokens, or None where there can be none."""
        if not self._whole or not isinstance(attention, CpuBackend):
            return None
        graph = self._graph
        if (
            graph is None
            or graph.backend is not attention
            or graph.tokens < tokens
            or graph.threads != torch.get_num_threads()
        ):
            most = max(LEAST, 1 << (tokens - 1).bit_length())
            self._graph = graph = StepGraph(self._layers, self._heads, attention, most)
        return graph

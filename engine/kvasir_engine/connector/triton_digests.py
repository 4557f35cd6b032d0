"""Digests of tokens (`kv/digests.py` says what they are) of a pool on a GPU: one launch for all blocks asked for.

A program digests 16 tokens of a layer of a block: it goes through the heads of K and then of V, whose rows of
consecutive tokens lie side by side. Only the digests, 8 bytes a token and layer, cross to the host.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl

from kvasir_engine.connector.layout import Cut, LayerCut
from kvasir_engine.kv.digests import FOLD, MIX, SHIFT_BYTES, Digests, keys_of
from kvasir_engine.pinned_memory import staged

TOKENS = 16
"""Of one program."""
WARPS = 4

_SIGNED = [value - (1 << 64) if value >= 1 << 63 else value for value in (MIX[0][1], MIX[1][1], FOLD)]


@triton.jit
def _shifted(value, by: tl.constexpr):
    return (value.to(tl.uint64, bitcast=True) >> by).to(tl.int64, bitcast=True)


@triton.jit
def _products(data, keys, LOW: tl.constexpr):
    """Of each pair of words, each with its key added modulo 2^32, the product modulo 2^64."""
    low = (data & LOW) + (keys & LOW)
    high = _shifted(data, 32) + _shifted(keys, 32)
    return (low & LOW) * (high & LOW)


@triton.jit(do_not_specialize=["tokens", "parts", "heads", "head_words", "part_words"])
def _digest(
    pool, places, keys, out, tokens, parts, heads, head_words, part_words, first, second, fold,
    ROW: tl.constexpr, PADDED: tl.constexpr, SHIFT: tl.constexpr, TOKENS: tl.constexpr,
    BY_1: tl.constexpr, BY_2: tl.constexpr, BY_3: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    piece = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    word = tl.arange(0, PADDED)
    inside = (token[:, None] < tokens) & (word[None, :] < ROW)
    at = tl.load(places + piece) + token[:, None].to(tl.int64) * ROW + word[None, :]
    sums_1 = tl.zeros([TOKENS, PADDED], tl.int64)
    sums_2 = tl.zeros([TOKENS, PADDED], tl.int64)
    for row in range(parts * heads):
        begin = (row // heads).to(tl.int64) * part_words + (row % heads).to(tl.int64) * head_words
        data = tl.load(pool + at + begin, mask=inside, other=0)
        own = keys + row * ROW + word
        key_1 = tl.load(own, mask=word < ROW, other=0)[None, :]
        key_2 = tl.load(own + SHIFT, mask=word < ROW, other=0)[None, :]
        sums_1 += tl.where(inside, _products(data, key_1, LOW), 0)
        sums_2 += tl.where(inside, _products(data, key_2, LOW), 0)
    value = tl.sum(sums_1, 1)
    value = (value ^ _shifted(value, BY_1)) * first
    value = (value ^ _shifted(value, BY_2)) * second
    value = value ^ _shifted(value, BY_3)
    value += tl.sum(sums_2, 1) * fold
    tl.store(out + piece * tokens + token, tl.where(value == 0, 1, value), mask=token < tokens)


def constants(row: int) -> dict[str, int]:
    """What `_digest` is compiled for, with rows of so many words of 8 bytes."""
    mixing = {"BY_1": MIX[0][0], "BY_2": MIX[1][0], "BY_3": MIX[2][0], "LOW": 0xFFFF_FFFF}
    return {
        "ROW": row,
        "PADDED": triton.next_power_of_2(row),
        "SHIFT": SHIFT_BYTES // 8,
        "TOKENS": TOKENS,
        **mixing,
    }


class PoolDigests:
    """Digests of the memory of a pool, whose bytes are `memory`, as it is; rows are a multiple of 8 bytes.

    Called on any thread; on a GPU beside the steps' stream. What is digested has been written: steps in flight
    write elsewhere.
    """

    def __init__(self, memory: torch.Tensor) -> None:
        self._words = memory.flatten().view(torch.int64)
        self._keys: dict[int, torch.Tensor] = {}
        cuda = memory.device.type == "cuda"
        self._stream = torch.cuda.Stream(memory.device) if cuda else None

    def __call__(self, blocks: Sequence[int], layers: range, cut: Cut) -> Digests:
        """[blocks, layers, tokens]"""
        if self._stream is None:
            return self._measure(blocks, layers, cut)
        with torch.cuda.stream(self._stream):
            return self._measure(blocks, layers, cut)

    def _measure(self, blocks: Sequence[int], layers: range, cut: Cut) -> Digests:
        device = self._words.device
        runs = []
        for run, kind in cut.runs(layers):
            begin, row, head_words = cut.places(blocks, run) // 8, kind.row_bytes // 8, cut.head_bytes(kind) // 8
            out = torch.empty((len(blocks), len(run), cut.tokens), dtype=torch.int64, device=device)
            _digest[(len(begin), triton.cdiv(cut.tokens, TOKENS))](
                self._words, staged(torch.from_numpy(begin), device), self._keys_of(kind), out,
                cut.tokens, kind.parts, kind.count, head_words, kind.heads * head_words, *_SIGNED,
                **constants(row), num_warps=WARPS,
            )  # fmt: skip
            runs.append(out)
        found: Digests = torch.cat(runs, 1).cpu().numpy().view(np.uint64)
        return found

    def _keys_of(self, kind: LayerCut) -> torch.Tensor:
        """The keys of a token of such a layer, on the device."""
        size = kind.parts * kind.count * kind.row_bytes
        if size not in self._keys:
            keys = torch.from_numpy(keys_of(size).view(np.int64).copy())
            self._keys[size] = staged(keys, self._words.device)
        return self._keys[size]

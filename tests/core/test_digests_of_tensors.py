"""A GPU pool's digests, made by its own kernel, are those of the same bytes in a host's memory."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from kvasir_engine.connector.digester import Digester
from kvasir_engine.connector.layout import Cut, LayerCut
from kvasir_engine.kv.spec import KVSpec


def in_interpreter(test: str) -> None:
    """Run a function of this file in a process of its own: Triton takes the interpreter at import."""
    script = f"import test_digests_of_tensors as t; t.{test}()"
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def pair(pages: int, layers: int, heads: int, tokens: int, dim: int) -> tuple[torch.Tensor, Digester, Digester]:
    """A pool of random bits, the digester of a GPU's pool for it, and that of a host's."""
    from kvasir_engine.connector.triton_digests import PoolDigests

    bits = np.random.default_rng(pages + dim).integers(-(1 << 15), 1 << 15, (pages, layers, 2, heads, tokens, dim))
    pool = torch.from_numpy(bits.astype(np.int16))
    shape = KVSpec.uniform(layers, heads, tokens, dim * 2)
    ours = Digester(0, pages, shape, measure=PoolDigests(pool))
    return pool, ours, Digester(pool.data_ptr(), pages, shape)


def kernel_and_twin() -> None:
    for heads, tokens, dim in ((2, 16, 32), (1, 4, 64), (3, 24, 12), (2, 32, 128)):
        _, ours, host = pair(3, 4, heads, tokens, dim)
        for layers in (range(4), range(1, 3)):
            cuts = [None, Cut((LayerCut(2, heads, heads - 1, 1, dim * 2),) * 4, tokens // 2, 2)]
            for cut in cuts:
                blocks = [2, 0, 1] if cut is None else [5, 0, 3, 2]
                right = host.measured(blocks, layers, cut)
                found = ours.measured(blocks, layers, cut)
                assert found.values == right.values
                assert all((found.measured[block] == right.measured[block]).all() for block in blocks)


def a_changed_bit_and_zeros() -> None:
    pool, ours, host = pair(2, 2, 2, 16, 32)
    before = ours.written([0, 1], range(2)).values
    pool[1, 1, 1, 1, 15, 31] ^= 1
    after = ours.measured([0, 1], range(2)).values
    assert before[0] == after[0]
    assert before[1] != after[1]
    pool.zero_()
    assert ours.measured([0, 1], range(2)).values == host.measured([0, 1], range(2)).values
    pool.fill_(-1)  # every sum of a word and its key wraps
    assert ours.measured([0, 1], range(2)).values == host.measured([0, 1], range(2)).values


def test_a_gpus_kernel_digests_pages_and_blocks_as_a_host_does() -> None:
    in_interpreter("kernel_and_twin")


def test_a_changed_bit_changes_the_digest_and_words_wrap_as_on_a_host() -> None:
    in_interpreter("a_changed_bit_and_zeros")

"""The kernels that digest, and the one that stores KV and digests it: as the definition, and in the same pass."""

import ctypes
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from kvasir_engine.cpu_kernels import unavailable_reason

if (reason := unavailable_reason()) is not None:
    pytest.skip(f"CPU kernels cannot run here: {reason}", allow_module_level=True)

from kvasir_engine.cpu_kernels import digest
from kvasir_engine.cpu_kernels.elementwise import KVStore
from kvasir_engine.kv import digests
from kvasir_engine.kv.digests import KeptDigests

PAGES, LAYERS = 5, 3


def rows_of(pool: torch.Tensor) -> np.ndarray:
    """[pages, layers, 2, heads, tokens, bytes]."""
    return pool.view(torch.uint8).numpy()


@pytest.mark.parametrize(("heads", "tokens", "dim"), [(1, 1, 32), (3, 16, 64), (2, 8, 96), (8, 16, 128)])
def test_pieces_of_memory_are_digested_as_defined(heads: int, tokens: int, dim: int) -> None:
    pool = torch.randn(PAGES, LAYERS, 2, heads, tokens, dim).bfloat16()
    row = 2 * dim
    places = pool.data_ptr() + np.array([7, 0, 12]) * (2 * heads * tokens * row)
    found = digest.token_digests(places, 2, heads, tokens, row, tokens * row, heads * tokens * row)
    right = digests.token_digests(rows_of(pool).reshape(-1, 2, heads, tokens, row)[[7, 0, 12]])
    assert np.array_equal(found, right)
    together = right.reshape(1, 3, tokens)
    assert digest.page_digests(together, 2) == digests.page_digests(together, 2)


def test_a_token_whose_digest_would_say_unknown_has_another() -> None:
    zeros = np.zeros(digest.SUMS, np.int64)
    assert digests.token_digests(np.zeros((2, 1, 1, 64), np.uint8)).all()
    found = digest.token_digests(np.array([zeros.ctypes.data]), 2, 1, 1, 64, 64, 64)
    assert found.all()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("heads", "dim"), [(3, 64), (8, 128), (1, 32)])
def test_what_is_stored_is_digested_in_the_same_pass(threads: int, heads: int, dim: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        torch.manual_seed(5)
        pool = torch.zeros(PAGES, LAYERS, 2, heads, 16, dim, dtype=torch.bfloat16)
        plain, kept = pool.clone(), KeptDigests(PAGES, LAYERS, 16)
        store, without = KVStore(pool, kept), KVStore(plain)
        written = np.zeros((PAGES, LAYERS, 16), bool)
        for round_ in range(3):  # the second and third write over some of the first
            places = torch.randperm(PAGES * 16)[:53].sort().values.numpy()
            pages, offsets = np.divmod(places, 16)
            qkv = torch.randn(53, 4 + 2 * heads, dim).bfloat16()
            _, k, v = torch.split(qkv, [4, heads, heads], 1)
            for each in (store, without):
                each.plan(pages, offsets)
                each.run(round_, k, v)
                each.run(1, v, k)
            written[pages, round_, offsets] = written[pages, 1, offsets] = True
        assert torch.equal(pool, plain)
        assert np.array_equal(kept.table != 0, written)
        right = digests.token_digests(rows_of(pool))
        assert np.array_equal(kept.table, np.where(written, right, 0))
    finally:
        torch.set_num_threads(before)


def test_no_kernel_uses_memory_that_was_freed() -> None:
    """The tests above once more, where the C library overwrites what is freed (MALLOC_PERTURB_ of glibc)."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "digested", __file__]
    done = subprocess.run(
        command, env={**os.environ, "MALLOC_PERTURB_": "165"}, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_a_kernels_arguments_live_as_long_as_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call lets go of the GIL: whatever other threads allocate meanwhile must not lie where they were."""
    seen: list[list[int]] = []
    others: list[np.ndarray] = []

    def kernel(address: int) -> None:
        others.extend(np.full(5, -1, np.int64) for _ in range(8))
        seen.append(list((ctypes.c_int64 * 5).from_address(address)))

    monkeypatch.setattr(digest, "_fold_kernel", kernel)
    digest.page_digests(np.ones((2, 3, 4), np.uint64), 0)
    ((_, blocks, cells, *_),) = seen
    assert (blocks, cells) == (2, 12)

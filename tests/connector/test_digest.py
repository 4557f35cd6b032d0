"""A page's digest: all of the page, and nothing but the page; what was written, or what is there."""

import numpy as np
import pytest

from kvasir_engine.connector.digester import Digester
from kvasir_engine.connector.layout import Cut, LayerCut
from kvasir_engine.kv.digests import KeptDigests
from kvasir_engine.kv.spec import KVSpec

PAGES, LAYERS = 4, 4
SHAPE = KVSpec.uniform(LAYERS, kv_heads=2, page_size=2, row_bytes=8)
PAGE_BYTES = SHAPE.page_bytes
ALL = range(LAYERS)


def cut_of(heads: int, first: int, count: int, blocks: int, tokens: int, row: int) -> Cut:
    """Layers that are all cut alike."""
    return Cut((LayerCut(2, heads, first, count, row),) * LAYERS, tokens, blocks)


def pool_of(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (PAGES, PAGE_BYTES), np.uint8)


def test_every_byte_of_a_page_counts_in_its_digest_and_in_no_other() -> None:
    pool = pool_of(0)
    digest = Digester(pool.ctypes.data, PAGES, SHAPE)
    before = digest.measured(range(PAGES), ALL).values
    assert len(set(before)) == PAGES
    for page in range(PAGES):
        for byte in (0, 1, PAGE_BYTES // 2, PAGE_BYTES - 1):
            pool[page, byte] ^= 1
            after = digest.measured(range(PAGES), ALL).values
            assert [a != b for a, b in zip(after, before, strict=True)] == [p == page for p in range(PAGES)]
            pool[page, byte] ^= 1


@pytest.mark.parametrize("row", [8, 64], ids=["as defined", "by the kernel"])
def test_equal_pages_of_two_pools_have_equal_digests_in_the_order_asked_for(row: int) -> None:
    shape = KVSpec.uniform(LAYERS, 2, 2, row)
    ours = np.random.default_rng(1).integers(0, 256, (PAGES, shape.page_bytes), np.uint8)
    theirs = ours[::-1].copy()
    mine = Digester(ours.ctypes.data, PAGES, shape).measured([3, 1], ALL).values
    assert mine == Digester(theirs.ctypes.data, PAGES, shape).measured([0, 2], ALL).values
    assert mine[0] != mine[1]


def test_a_digest_of_some_layers_is_of_these_and_no_others() -> None:
    pool = pool_of(2)
    digest = Digester(pool.ctypes.data, PAGES, SHAPE)
    size = PAGE_BYTES // LAYERS
    for layers in (range(1), range(1, 3), range(3, 4)):
        for byte in range(0, PAGE_BYTES, 7):
            before = digest.measured([2], layers).values
            pool[2, byte] ^= 1
            assert (digest.measured([2], layers).values != before) == (byte // size in layers)


@pytest.mark.parametrize("row", [8, 64], ids=["as defined", "by the kernel"])
def test_a_digest_of_a_part_of_a_page_is_of_its_rows_wherever_they_are_and_of_no_other(row: int) -> None:
    # Two heads of four, and half of the page's tokens, against pages of just these.
    big, small = cut_of(4, 1, 2, 2, 1, row), cut_of(2, 0, 2, 1, 1, row)
    pool = np.random.default_rng(3).integers(0, 256, (PAGES, LAYERS, 2, 4, 2, row), np.uint8)
    digest = Digester(pool.ctypes.data, PAGES, KVSpec.uniform(LAYERS, 4, 2, row))
    for block in (4, 5):
        page, place = divmod(block, 2)
        theirs = np.ascontiguousarray(pool[page : page + 1, :, :, 1:3, place])
        for layers in (ALL, range(1, 3)):
            alone = Digester(theirs.ctypes.data, 1, KVSpec.uniform(LAYERS, 2, 1, row)).measured([0], layers, small)
            assert digest.measured([block], layers, big).values == alone.values
    before = digest.measured([5], ALL, big).values
    for at in np.ndindex(LAYERS, 2, 4, 2):
        pool[(2, *at, 3)] ^= 1
        assert (digest.measured([5], ALL, big).values != before) == (at[2] in (1, 2) and at[3] == 1)
        pool[(2, *at, 3)] ^= 1


HALVES = cut_of(2, 0, 2, 2, 1, 8)
"""Blocks of a token, two a page."""


@pytest.fixture
def pool() -> np.ndarray:
    return pool_of(4)


@pytest.fixture
def digest(pool: np.ndarray) -> Digester:
    """It knows page 1 and nothing else."""
    digest = Digester(pool.ctypes.data, PAGES, SHAPE, KeptDigests(PAGES, LAYERS, 2))
    digest.keep(digest.measured([1, 2], ALL), [1])
    return digest


def test_what_was_written_is_known_though_the_memory_has_changed_since(pool: np.ndarray, digest: Digester) -> None:
    before = digest.measured([1, 2], ALL).values
    pool[1:3] ^= 1
    written, there = (digest.written([1, 2], ALL).values, digest.measured([1, 2], ALL).values)
    assert written == [before[0], there[1]], "page 2 is not known"
    assert there[0] != before[0]


def test_what_is_kept_serves_blocks_and_layers_of_pages_too(pool: np.ndarray, digest: Digester) -> None:
    right = digest.measured([2, 3], range(1, 3), HALVES).values
    pool[1] = 0
    written = digest.written([2, 3], range(1, 3), HALVES)
    assert written.values == right
    assert not written.measured
    heads = cut_of(2, 1, 1, 1, 2, 8)  # of one head nothing is kept
    assert digest.written([1], ALL, heads).values == digest.measured([1], ALL, heads).values
    digest.keep(digest.measured([3], ALL, heads), [3])
    assert digest.written([3], ALL).values == digest.measured([3], ALL).values


def test_a_measure_never_replaces_what_is_known(pool: np.ndarray, digest: Digester) -> None:
    right = digest.written([1], ALL).values
    pool[1] ^= 1
    spoiled = digest.measured([1], ALL)
    digest.keep(spoiled, [1])
    assert digest.written([1], ALL).values == right != spoiled.values


def test_what_another_may_write_is_not_known_any_more(pool: np.ndarray, digest: Digester) -> None:
    pool[1] ^= 1
    digest.forget([2, 5], HALVES)  # blocks of pages 1 and 2
    assert digest.written([1], ALL).values == digest.measured([1], ALL).values


def test_a_page_of_which_some_layers_are_known_is_measured_for_the_others(
    pool: np.ndarray, digest: Digester
) -> None:
    some = digest.measured([3], range(1, 3))
    digest.keep(some, [3])
    right = digest.measured([3], ALL).values
    pool[3, PAGE_BYTES // LAYERS : 3 * PAGE_BYTES // LAYERS] ^= 1
    written = digest.written([3], ALL)
    assert written.values == right
    assert list(written.measured) == [3]
    assert digest.known([1, 3], ALL) is None
    digest.keep(written, [3])
    known = digest.known([1, 3], ALL)
    assert known is not None
    assert known.values == digest.written([1, 3], ALL).values
    assert digest.known([1, 3], ALL, cut_of(2, 1, 1, 1, 2, 8)) is None

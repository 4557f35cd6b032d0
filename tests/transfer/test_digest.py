"""A page's digest: all of the page, and nothing but the page."""

import numpy as np

from kvasir_engine.transfer.digest import Digester
from kvasir_engine.transfer.layout import Cut

PAGES, PAGE_BYTES, LAYERS = 4, 256, 4
ALL = range(LAYERS)


def test_every_byte_of_a_page_counts_in_its_digest_and_in_no_other() -> None:
    pool = np.random.default_rng(0).integers(0, 256, (PAGES, PAGE_BYTES), np.uint8)
    digest = Digester(pool.ctypes.data, PAGES, PAGE_BYTES, LAYERS)
    before = digest(range(PAGES), ALL)
    assert len(set(before)) == PAGES
    for page in range(PAGES):
        for byte in (0, 1, PAGE_BYTES // 2, PAGE_BYTES - 1):
            pool[page, byte] ^= 1
            after = digest(range(PAGES), ALL)
            assert [a != b for a, b in zip(after, before, strict=True)] == [p == page for p in range(PAGES)]
            pool[page, byte] ^= 1


def test_equal_pages_of_two_pools_have_equal_digests_in_the_order_asked_for() -> None:
    ours = np.random.default_rng(1).integers(0, 256, (PAGES, PAGE_BYTES), np.uint8)
    theirs = ours[::-1].copy()
    mine = Digester(ours.ctypes.data, PAGES, PAGE_BYTES, LAYERS)([3, 1], ALL)
    assert mine == Digester(theirs.ctypes.data, PAGES, PAGE_BYTES, LAYERS)([0, 2], ALL)


def test_a_digest_of_some_layers_is_of_these_and_no_others() -> None:
    pool = np.random.default_rng(2).integers(0, 256, (PAGES, PAGE_BYTES), np.uint8)
    digest = Digester(pool.ctypes.data, PAGES, PAGE_BYTES, LAYERS)
    size = PAGE_BYTES // LAYERS
    for layers in (range(1), range(1, 3), range(3, 4)):
        for byte in range(0, PAGE_BYTES, 7):
            before = digest([2], layers)
            pool[2, byte] ^= 1
            assert (digest([2], layers) != before) == (byte // size in layers)


def test_a_digest_of_a_part_of_a_page_is_of_its_rows_wherever_they_are_and_of_no_other() -> None:
    # Two heads of four, and half of the page's tokens, against pages of just these.
    big, small = Cut(LAYERS, 4, 1, 2, 2, 8), Cut(LAYERS, 2, 0, 2, 1, 8)
    pool = np.random.default_rng(3).integers(0, 256, (PAGES, LAYERS, 2, 4, 2, 8), np.uint8)
    digest = Digester(pool.ctypes.data, PAGES, big.page_bytes, LAYERS)
    for block in (4, 5):
        page, place = divmod(block, 2)
        theirs = np.ascontiguousarray(pool[page : page + 1, :, :, 1:3, place])
        for layers in (ALL, range(1, 3)):
            alone = Digester(theirs.ctypes.data, 1, small.page_bytes, LAYERS)([0], layers, small)
            assert digest([block], layers, big) == alone
    before = digest([5], ALL, big)
    for at in np.ndindex(LAYERS, 2, 4, 2):
        pool[(2, *at, 3)] ^= 1
        assert (digest([5], ALL, big) != before) == (at[2] in (1, 2) and at[3] == 1)
        pool[(2, *at, 3)] ^= 1

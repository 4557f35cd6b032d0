"""A page's digest: all of the page, and nothing but the page."""

import numpy as np

from kvasir_engine.transfer.digest import Digester

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

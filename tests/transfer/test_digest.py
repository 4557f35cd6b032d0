"""A page's digest: all of the page, and nothing but the page."""

import numpy as np

from kvasir_engine.transfer.digest import Digester

PAGES, PAGE_BYTES = 4, 256


def test_every_byte_of_a_page_counts_in_its_digest_and_in_no_other() -> None:
    pool = np.random.default_rng(0).integers(0, 256, (PAGES, PAGE_BYTES), np.uint8)
    digest = Digester(pool.ctypes.data, PAGES, PAGE_BYTES)
    before = digest(range(PAGES))
    assert len(set(before)) == PAGES
    for page in range(PAGES):
        for byte in (0, 1, PAGE_BYTES // 2, PAGE_BYTES - 1):
            pool[page, byte] ^= 1
            after = digest(range(PAGES))
            assert [a != b for a, b in zip(after, before, strict=True)] == [p == page for p in range(PAGES)]
            pool[page, byte] ^= 1


def test_equal_pages_of_two_pools_have_equal_digests_in_the_order_asked_for() -> None:
    ours = np.random.default_rng(1).integers(0, 256, (PAGES, PAGE_BYTES), np.uint8)
    theirs = ours[::-1].copy()
    mine = Digester(ours.ctypes.data, PAGES, PAGE_BYTES)([3, 1])
    assert mine == Digester(theirs.ctypes.data, PAGES, PAGE_BYTES)([0, 2])

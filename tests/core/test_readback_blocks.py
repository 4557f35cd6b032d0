"""What is read of a loan, with pages of other sizes on the two sides: each token's KV to its place, whole pages."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvasir_engine.connector.layout import block_tokens
from kvasir_engine.connector.notifications import Stopped
from kvasir_engine.connector.sender import Key, Push
from kvasir_engine.core.kv_cache_manager import KVCacheManager
from kvasir_engine.core.readback import READ_BLOCKS, Readback
from kvasir_engine.core.sequence import Sequence
from kvasir_engine.protocol import Endpoint, Fingerprint, Loan, Region, Sampling

PAGES = 64


class Pushes:
    """Stands in for KVConnector: notes what is to be read."""

    def __init__(self) -> None:
        self.pushed: list[Push] = []
        self.withdrawn = False

    def reads(self, peer: Endpoint) -> bool:
        return True

    def read(self, to: Endpoint, loan: Loan) -> Key:
        return to.agent, loan.id

    def push(self, key: Key, push: Push) -> None:
        self.pushed.append(push)

    def withdraw(self, key: Key, reason: str) -> None:
        self.withdrawn = True


class Prefill:
    """A worker with pages of `size` that has `known` tokens of a prompt, asked to read from one of `theirs`."""

    def __init__(self, size: int, theirs: int, known: int) -> None:
        self.cache = KVCacheManager(PAGES, size, lambda source, target: None)
        self.cache.pool.take(3)  # so that no page has the number of its place
        self.pushes: Any = Pushes()
        shape = Fingerprint("m", "", "float32", "l", theirs, 1, 1, 1, "rope")
        self.lender = Endpoint("d", 1, b"", Region(0, PAGES, 1), shape)
        self.known = list(range(known // size * size))
        tree, pages = self.cache.tree, self.cache.pool.take(known // size)
        tree.release(tree.insert(self.known, pages, ""))

    def read(self, tokens: int, loan: Loan) -> tuple[Readback, Key | None]:
        readback = Readback(self.cache, self.pushes)
        sequence = Sequence("r", list(range(tokens)), Sampling(1), 1, "")
        return readback, readback.read(self.lender, loan, sequence)


@given(
    sizes=st.sampled_from([(4, 4), (4, 8), (8, 4), (2, 8), (8, 2)]),
    tokens=st.integers(1, 70),
    known=st.integers(0, 40),
    skip=st.integers(0, 3),
    lent=st.integers(1, 20),
)
def test_each_token_is_read_to_its_place(
    sizes: tuple[int, int], tokens: int, known: int, skip: int, lent: int
) -> None:
    size, theirs = sizes
    block = block_tokens(size, theirs)
    prefill = Prefill(size, theirs, min(known, tokens - 1))
    had, first = len(prefill.known), skip * theirs
    loan = Loan(7, 1, list(range(50, 50 + lent)), first, 30.0)
    readback, key = prefill.read(tokens, loan)
    end = min(tokens - 1, first + lent * theirs) // size * size
    if first > had or end <= had:
        assert key is None
        assert prefill.pushes.withdrawn
        return
    assert key is not None
    reading = readback.reads[key]
    assert len(reading.pages) == end // size
    *pushes, last = prefill.pushes.pushed
    assert last.complete == Stopped(7, 1, "read")
    assert all(0 < len(push.local) == len(push.remote) <= READ_BLOCKS for push in pushes)
    moved = []
    for push in pushes:
        for ours, other in zip(push.local, push.remote, strict=True):
            page, place = divmod(ours * block, size)
            to = reading.pages.index(page) * size + place
            page, place = divmod(other * block, theirs)
            assert to == first + loan.pages.index(page) * theirs + place
            moved.append(to)
    assert moved == list(range(had, end, block)), "all that is missing, once, and nothing that is there"
    readback.failed(key, "the test ends")
    assert prefill.cache.pool.available == PAGES - 3


@pytest.mark.parametrize("first", [4, 12])
def test_a_loan_that_does_not_begin_with_a_page_is_declined(first: int) -> None:
    prefill = Prefill(4, 8, 16)
    _, key = prefill.read(60, Loan(7, 1, [50, 51, 52], first, 30.0))
    assert key is None
    assert prefill.pushes.withdrawn

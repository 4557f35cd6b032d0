"""Digests of tokens and of pages: what they are, what they tell apart, and that those that are kept are right."""

from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvasir_engine.kv.digests import FOLD, KeptDigests, keys_of, keys_of_places, page_digests, token_digests

LAYERS, HEADS, TOKENS, ROW = 3, 2, 4, 8
MASK = (1 << 64) - 1


def memory(seed: int, pages: int = 2) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (pages, LAYERS, 2, HEADS, TOKENS, ROW), np.uint8)


def digest_of(pages: Any, first: int = 0) -> list[int]:
    return page_digests(token_digests(pages), first)


def splitmix(value: int) -> int:
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & MASK
    value = (value ^ value >> 27) * 0x94D049BB133111EB & MASK
    return value ^ value >> 31


def test_a_digest_is_what_its_definition_says() -> None:
    (page,) = pages = memory(1, 1)
    keys = [splitmix((i + 1) * FOLD & MASK) for i in range(4 * HEADS * ROW)]
    words = [half for key in keys for half in (key & 0xFFFFFFFF, key >> 32)]
    total = 0
    for layer, token in np.ndindex(LAYERS, TOKENS):
        own = b"".join(page[layer, part, head, token].tobytes() for part in range(2) for head in range(HEADS))
        m = [int.from_bytes(own[at : at + 4], "little") for at in range(0, len(own), 4)]
        h1, h2 = (
            sum(
                (m[i] + words[i + s]) % 2**32 * ((m[i + 1] + words[i + s + 1]) % 2**32) for i in range(0, len(m), 2)
            )
            for s in (0, 16)
        )
        place = splitmix((layer + 1 << 32 | token) * FOLD & MASK)
        total += splitmix((splitmix(h1 & MASK) + FOLD * h2 & MASK) ^ place)
    assert digest_of(pages) == [total & MASK]


def test_layers_of_a_page_have_digests_that_add_up() -> None:
    pages = memory(2)
    whole, first, rest = digest_of(pages), digest_of(pages[:, :1]), digest_of(pages[:, 1:], 1)
    assert whole == [(a + b) & MASK for a, b in zip(first, rest, strict=True)]
    assert digest_of(pages[:, 1:]) != rest, "layers are not what other layers are"


def test_every_bit_of_a_page_counts() -> None:
    pages = memory(3, 1)
    (right,) = digest_of(pages)
    wrong = set()
    for byte in range(pages.size):
        for bit in range(8):
            pages.reshape(-1)[byte] ^= 1 << bit
            wrong |= set(digest_of(pages))
            pages.reshape(-1)[byte] ^= 1 << bit
    assert len(wrong) == 8 * pages.size
    assert right not in wrong


ERRORS: dict[str, tuple[Any, Any]] = {
    "tokens": (np.s_[0, :, :, :, 0], np.s_[0, :, :, :, 1]),
    "tokens of a layer": (np.s_[0, 1, :, :, 0], np.s_[0, 1, :, :, 1]),
    "heads": (np.s_[0, :, :, 0], np.s_[0, :, :, 1]),
    "K and V": (np.s_[0, :, 0], np.s_[0, :, 1]),
    "layers": (np.s_[0, 0], np.s_[0, 2]),
    "pages": (np.s_[0], np.s_[1]),
    "words": (np.s_[0, 0, 0, 0, 0, :4], np.s_[0, 0, 0, 0, 0, 4:]),
    "halves of rows": (np.s_[..., :4], np.s_[..., 4:]),
    "words of two heads": (np.s_[0, 0, 0, 0, 0, :4], np.s_[0, 0, 0, 1, 0, :4]),
}


@pytest.mark.parametrize("what", ERRORS)
def test_what_is_exchanged_is_not_the_same(what: str) -> None:
    pages, (one, other) = memory(4), ERRORS[what]
    before = digest_of(pages)
    pages[one], pages[other] = pages[other].copy(), pages[one].copy()
    assert digest_of(pages)[0] != before[0]


@pytest.mark.parametrize(
    "what", [np.s_[0], np.s_[0, 1], np.s_[0, :, 1], np.s_[0, 2, 1, 1, 3], np.s_[0, ..., 2:, :]]
)
def test_what_did_not_come_is_missed(what: Any) -> None:
    pages = memory(5)
    right = digest_of(pages)
    for stale in (0, memory(6)[what]):
        found = pages.copy()
        found[what] = stale
        assert digest_of(found)[0] != right[0]


def test_the_same_change_twice_does_not_cancel_out() -> None:
    pages = memory(7, 1)
    (right,) = digest_of(pages)
    rows = pages.reshape(-1, 4)
    for bit in (0, 7):
        for one, other in [(0, 1), (0, 2), (1, 5), (3, len(rows) - 1)]:
            for each in (one, other):
                rows[each, 3] ^= 1 << bit
            assert digest_of(pages) != [right]
            for each in (one, other):
                rows[each, 3] ^= 1 << bit


def test_keys_are_the_same_whatever_they_are_for() -> None:
    assert (keys_of(64) == keys_of(128)[:16]).all()
    assert (keys_of_places(2, 4) == keys_of_places(3, 4)[:2]).all()
    assert len(set(keys_of_places(9, 32).ravel().tolist())) == 9 * 32


PAGES = 3
PLACES = st.tuples(st.integers(0, PAGES - 1), st.integers(0, TOKENS - 1))
PAGE = st.integers(0, PAGES - 1)


class Memory(RuleBasedStateMachine):
    """A pool that is written, copied, received into and spoiled: what is known is what was meant to be there."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = memory(8, PAGES)
        self.meant = self.memory.copy()  # what is there if nothing was spoiled
        self.kept = KeptDigests(PAGES, LAYERS, TOKENS)
        self.writes = 0

    def fresh(self) -> Any:
        self.writes += 1
        return memory(100 + self.writes, 1)[0]

    @rule(at=PLACES, layer=st.integers(0, LAYERS - 1))
    def a_token_is_stored(self, at: tuple[int, int], layer: int) -> None:
        page, token = at
        new = self.fresh()[layer, :, :, token]
        self.memory[page, layer, :, :, token] = self.meant[page, layer, :, :, token] = new
        self.kept.table[page, layer, token] = token_digests(new[:, :, None])[0]

    @rule(source=PAGE, to=PAGE)
    def a_page_is_copied(self, source: int, to: int) -> None:
        self.memory[to], self.meant[to] = self.memory[source], self.meant[source]
        self.kept.copy(source, to)

    @rule(page=PAGE, layers=st.sampled_from([range(LAYERS), range(1, 2)]), right=st.booleans())
    def layers_of_a_page_arrive(self, page: int, layers: range, right: bool) -> None:
        self.kept.forget([page])
        some = slice(layers.start, layers.stop)
        self.memory[page, some] = self.meant[page, some] = self.fresh()[some]
        if right:
            self.kept.fill([page], layers, [0], TOKENS, token_digests(self.memory[[page], some]))

    @rule(page=PAGE, place=st.integers(0, 1))
    def half_a_page_is_looked_at(self, page: int, place: int) -> None:
        half = TOKENS // 2
        rows = self.memory[[page], :, :, :, place * half : (place + 1) * half]
        unknown = self.kept.of([page], range(LAYERS), [place], half) == 0
        self.kept.fill([page], range(LAYERS), [place], half, token_digests(rows))
        for _, layer, token in np.argwhere(unknown):
            at = page, layer, slice(None), slice(None), place * half + token
            self.meant[at] = self.memory[at]  # nobody knew better

    @rule(at=PLACES, byte=st.integers(0, ROW - 1))
    def a_byte_is_spoiled(self, at: tuple[int, int], byte: int) -> None:
        self.memory[at[0], 1, 0, 1, at[1], byte] ^= 0x10

    @invariant()
    def what_is_known_is_what_was_meant(self) -> None:
        known = self.kept.of(range(PAGES), range(LAYERS), [0] * PAGES, TOKENS)
        right = token_digests(self.meant)
        assert ((known == 0) | (known == right)).all()


TestMemory = Memory.TestCase
TestMemory.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)

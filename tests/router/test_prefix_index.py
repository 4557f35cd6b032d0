"""The prefix index knows exactly what the cache events said."""

from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from kvasir_engine.kv.hashing import page_hashes
from kvasir_engine.protocol import CacheEvent, CacheEvents
from kvasir_engine.router.prefix_index import PrefixIndex

PAGE = 2
PROMPTS = st.lists(st.integers(0, 1), max_size=10)


@dataclass
class NaiveCache:
    """The worker's side: the cached prefixes as whole token lists, and the frames that tell of them."""

    prefixes: set[tuple[int, ...]] = field(default_factory=set)
    seq: int = 0

    def frame(self, events: list[CacheEvent], snapshot: bool = False) -> CacheEvents:
        self.seq += 1
        return CacheEvents(self.seq, events, snapshot)

    def store(self, tokens: list[int]) -> CacheEvents:
        pages = [tuple(tokens[:end]) for end in range(PAGE, len(tokens) + 1, PAGE)]
        hashes = page_hashes(tokens, PAGE)
        new = [h for h, page in zip(hashes, pages, strict=True) if page not in self.prefixes]
        self.prefixes.update(pages)
        return self.frame([CacheEvent(stored=new)])

    def evict(self, tokens: list[int]) -> CacheEvents:
        """Forget what begins with the whole pages of `tokens`, from the leaves up."""
        root = tuple(tokens[: len(tokens) // PAGE * PAGE])
        gone = sorted((p for p in self.prefixes if root and p[: len(root)] == root), key=len, reverse=True)
        self.prefixes.difference_update(gone)
        return self.frame([CacheEvent(evicted=[page_hashes(each, PAGE)[-1]]) for each in gone])

    def snapshot(self) -> CacheEvents:
        stored = [page_hashes(each, PAGE)[-1] for each in self.prefixes]
        return self.frame([CacheEvent(stored=stored)], snapshot=True)

    def longest(self, tokens: list[int]) -> int:
        pages = 0
        while (pages + 1) * PAGE <= len(tokens) and tuple(tokens[: (pages + 1) * PAGE]) in self.prefixes:
            pages += 1
        return pages


STEPS = st.lists(st.tuples(st.sampled_from(["store", "evict", "snapshot"]), PROMPTS, st.booleans()), max_size=20)


@given(STEPS, PROMPTS)
def test_the_index_is_the_cache_unless_it_says_that_it_is_degraded(
    steps: list[tuple[str, list[int], bool]], asked: list[int]
) -> None:
    cache, index = NaiveCache(), PrefixIndex()
    assert index.degraded
    assert not index.apply(cache.snapshot())
    lost = False
    for what, tokens, arrives in steps:
        frame = cache.snapshot() if what == "snapshot" else getattr(cache, what)(tokens)
        if not arrives:
            lost = True
            continue
        gap = index.apply(frame)
        assert not gap or lost
        if frame.snapshot:
            lost = False
        assert index.degraded == lost
        if not index.degraded:
            assert index.longest(page_hashes(asked, PAGE)) == cache.longest(asked)
            assert len(index) == len(cache.prefixes)


def test_a_gap_is_told_once_until_the_snapshot() -> None:
    index = PrefixIndex()
    assert not index.apply(CacheEvents(1, [], snapshot=True))
    assert index.apply(CacheEvents(3, []))
    assert not index.apply(CacheEvents(7, []))
    assert not index.apply(CacheEvents(8, [], snapshot=True))
    assert index.apply(CacheEvents(10, []))


def test_salts_do_not_share() -> None:
    index = PrefixIndex()
    tokens = list(range(8))
    index.apply(CacheEvents(1, [CacheEvent(stored=page_hashes(tokens, PAGE, "one"))], snapshot=True))
    assert index.longest(page_hashes(tokens, PAGE, "one")) == 4
    assert index.longest(page_hashes(tokens, PAGE, "two")) == 0

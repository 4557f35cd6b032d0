"""The pool and the tree under every schedule that hypothesis finds, against a plain model of the content."""

from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from kvasir_engine.kv.hashing import page_hashes
from kvasir_engine.kv.pages import OutOfPages, Owner, OwnershipError, PagePool
from kvasir_engine.kv.radix import Match, RadixTree

PAGE = 4


def computed(tree: RadixTree, tokens: list[int], salt: str = "") -> list[int]:
    """The pages of a request that reused what the tree has and computed the rest."""
    match = tree.match(tokens, salt)
    tree.acquire(match)
    total = -(-len(tokens) // PAGE)
    tree.evict(total - len(match.pages) - tree.pool.count(Owner.FREE))
    try:
        fresh = tree.pool.take(total - len(match.pages))
    except OutOfPages:
        tree.release(match.pages)
        raise
    finally:
        if match.tail_page is not None:
            tree.release([match.tail_page])
    return [*match.pages, *fresh]


@dataclass(frozen=True)
class Request:
    tokens: tuple[int, ...]
    salt: str
    pages: tuple[int, ...]


@dataclass(frozen=True)
class Lease:
    id: int
    pages: tuple[int, ...]
    fenced: bool = False


class Ownership(RuleBasedStateMachine):
    requests: Bundle[Request] = Bundle("requests")
    leases: Bundle[Lease] = Bundle("leases")

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(24)
        self.tree = RadixTree(self.pool, PAGE)
        self.content: dict[int, tuple[str, tuple[int, ...]]] = {}  # page -> salt, all tokens to its end
        self.held: list[list[int]] = []
        self.next_lease = 0
        self.events: set[int] = set()

    prompts = st.lists(st.integers(0, 1), min_size=1, max_size=18)
    salts = st.sampled_from(["", "tenant"])

    def written(self, tokens: list[int], salt: str, pages: list[int], first: int) -> None:
        for index in range(first, len(pages)):
            self.content[pages[index]] = (salt, tuple(tokens[: (index + 1) * PAGE]))

    @rule(target=requests, tokens=prompts, salt=salts)
    def start(self, tokens: list[int], salt: str) -> object:
        reused = len(self.tree.match(tokens, salt).pages)
        try:
            pages = computed(self.tree, tokens, salt)
        except OutOfPages:
            return multiple()
        self.written(tokens, salt, pages, reused)
        self.held.append(pages)
        return Request(tuple(tokens), salt, tuple(pages))

    @rule(target=requests, request=consumes(requests))
    def share_whole_pages_while_running(self, request: Request) -> Request:
        whole = len(request.tokens) // PAGE
        self.held.remove(list(request.pages))
        kept = self.tree.insert(request.tokens[: whole * PAGE], request.pages[:whole], request.salt)
        pages = (*kept, *request.pages[whole:])
        self.held.append(list(pages))
        return Request(request.tokens, request.salt, pages)

    @rule(request=consumes(requests))
    def finish(self, request: Request) -> None:
        self.held.remove(list(request.pages))
        self.tree.release(self.tree.insert(request.tokens, request.pages, request.salt))

    @rule(request=consumes(requests))
    def abort(self, request: Request) -> None:
        self.held.remove(list(request.pages))
        self.tree.release(request.pages)

    @rule(target=leases, count=st.integers(0, 6))
    def reserve(self, count: int) -> object:
        self.next_lease += 1
        if count > self.pool.count(Owner.FREE):
            with pytest.raises(OutOfPages):
                self.pool.lease(count, self.next_lease)
            return multiple()
        return Lease(self.next_lease, tuple(self.pool.lease(count, self.next_lease)))

    @rule(target=requests, lease=consumes(leases))
    def complete(self, lease: Lease) -> object:
        if lease.fenced:
            if lease.pages:
                with pytest.raises(OwnershipError):
                    self.pool.settle(lease.pages, lease.id)
            self.pool.reclaim(lease.pages, lease.id)
            return multiple()
        self.pool.settle(lease.pages, lease.id)
        tokens = [2 + lease.id] * (len(lease.pages) * PAGE)
        self.written(tokens, "", list(lease.pages), 0)
        self.held.append(list(lease.pages))
        return Request(tuple(tokens), "", lease.pages)

    @rule(target=leases, lease=consumes(leases))
    def fence(self, lease: Lease) -> Lease:
        if not lease.fenced:
            self.pool.fence(lease.pages, lease.id)
        return Lease(lease.id, lease.pages, True)

    @rule(lease=consumes(leases))
    def prove_stopped(self, lease: Lease) -> None:
        self.pool.reclaim(lease.pages, lease.id)

    @rule(count=st.integers(0, 24))
    def evict(self, count: int) -> None:
        cached = self.pool.count(Owner.CACHED)
        assert self.tree.evict(count) == min(count, cached)

    @rule(tokens=prompts, salt=salts)
    def a_match_is_a_prefix_and_the_longest(self, tokens: list[int], salt: str) -> None:
        match = self.tree.match(tokens, salt)
        for index, page in enumerate(match.pages):
            assert self.content[page] == (salt, tuple(tokens[: (index + 1) * PAGE]))
        whole = len(match.pages) * PAGE
        if match.tail_page is not None:
            held_salt, held = self.content[match.tail_page]
            assert (held_salt, held[: whole + match.tail]) == (salt, tuple(tokens[: whole + match.tail]))
        longest = 0
        for page in self.tree.pages():
            held_salt, held = self.content[page]
            if held_salt == salt:
                common = 0
                while common < min(len(held), len(tokens)) and held[common] == tokens[common]:
                    common += 1
                longest = max(longest, common)
        assert match.tokens(PAGE) == longest

    @invariant()
    def pages_are_conserved(self) -> None:
        self.pool.check(self.held, self.tree.pages())
        self.tree.check()

    @invariant()
    def events_tell_the_content(self) -> None:
        for stored, hash_ in self.tree.log.drain():
            assert (hash_ in self.events) != stored
            self.events.symmetric_difference_update([hash_])
        assert self.events == set(self.tree.hashes())


TestOwnership = Ownership.TestCase
TestOwnership.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_the_router_and_the_tree_hash_alike() -> None:
    pool = PagePool(8)
    tree = RadixTree(pool, PAGE)
    tokens = list(range(11))
    tree.release(tree.insert(tokens, pool.take(3), "s"))
    assert list(tree.hashes()) == page_hashes(tokens, PAGE, "s")
    assert page_hashes(tokens, PAGE, "s") != page_hashes(tokens, PAGE, "t")


def test_a_partly_matching_page_is_found_token_by_token() -> None:
    pool = PagePool(8)
    tree = RadixTree(pool, PAGE)
    pages = pool.take(2)
    tree.release(tree.insert([1, 2, 3, 4, 5, 6, 7], pages))
    assert tree.match([1, 2, 3, 4, 5, 6, 9, 9]) == Match(pages[:1], pages[1], 2)
    assert tree.match([1, 2, 9]) == Match([], pages[0], 2)
    assert tree.match([9]) == Match([])


def test_an_evicted_salt_leaves_no_root_behind() -> None:
    pool = PagePool(2)
    tree = RadixTree(pool, PAGE)
    tree.release(tree.insert([1], pool.take(1), "gone"))
    assert tree.evict(1) == 1
    assert not tree._roots


@pytest.mark.parametrize(
    ("verb", "call"),
    [
        ("release a free page", lambda pool: pool.release([0])),
        ("hold a free page", lambda pool: pool.hold([0])),
        ("evict a held page", lambda pool: pool.leave_tree(pool.take(1)[0])),
        ("settle another's lease", lambda pool: pool.settle(pool.lease(1, 7), 8)),
        ("reclaim a held page", lambda pool: pool.reclaim(pool.take(1), 7)),
        ("fence twice", lambda pool: [pool.fence([pool.lease(1, 7)[0]], 7), pool.fence([3], 7)]),
        ("release a page twice in one call", lambda pool: pool.release(pool.take(1) * 2)),
        ("take more than there are", lambda pool: pool.take(5)),
    ],
)
def test_a_forbidden_transition_is_refused_and_changes_nothing(verb: str, call: object) -> None:
    pool = PagePool(4)
    with pytest.raises((OwnershipError, OutOfPages)):
        call(pool)  # type: ignore[operator]
    pool.check()

"""The radix tree over cached prefixes: pages by the tokens they hold, matched token by token.

A node is one page. Inner nodes are whole pages. A partly filled page is always a leaf; a prompt that shares its
first tokens copies that page instead of computing it. The children of a node are sorted by their tokens, so
bisection finds the child with the longest common prefix next to the place of a continuation, and a match costs
O(matched pages).

The tree keeps its own recency: a match or a release touches a path from its end to its root, so a parent is never
older than its children, and the oldest evictable page is always a leaf. Pages that requests hold are not
candidates. SGLang's radix cache (Zheng et al., 2024, arXiv:2312.07104) is the origin of the idea; storing by page
with token-level tails is ours.
"""

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from kvasir_engine.kv.hashing import TOKEN_BYTES, next_hash, root_hash, token_bytes
from kvasir_engine.kv.pages import Owner, PagePool


@dataclass(frozen=True, slots=True)
class Match:
    """The cached part of a prompt: whole `pages`, then the first `tail` tokens of page `tail_page`."""

    pages: list[int]
    tail_page: int | None = None
    tail: int = 0

    def tokens(self, page_size: int) -> int:
        """The number of matched tokens."""
        return len(self.pages) * page_size + self.tail


class Node:
    """One page of the tree. A root has page -1 and the salt for its key."""

    __slots__ = ("children", "hash", "key", "keys", "page", "parent")

    def __init__(self, key: bytes, page: int, parent: "Node | None", hash_: int) -> None:
        self.key = key
        self.page = page
        self.parent = parent
        self.hash = hash_
        self.children: dict[bytes, Node] = {}
        self.keys: list[bytes] = []  # sorted


@dataclass
class CacheLog:
    """Hashes of whole pages that entered and left the tree since the last `drain`, in order."""

    entries: list[tuple[bool, int]] = field(default_factory=list)

    def drain(self) -> list[tuple[bool, int]]:
        """Return and clear the entries (`True`: stored, `False`: evicted)."""
        entries, self.entries = self.entries, []
        return entries


class RadixTree:
    """The tree and the only place that evicts. `pool` keeps the owners."""

    def __init__(self, pool: PagePool, page_size: int) -> None:
        self.pool = pool
        self.page_size = page_size
        self.log = CacheLog()
        self._step = page_size * TOKEN_BYTES
        self._roots: dict[str, Node] = {}
        self._nodes: dict[int, Node] = {}  # by page
        self._idle: OrderedDict[int, None] = OrderedDict()  # cached pages, oldest first
        self._entered: dict[int, None] | None = None

    def __len__(self) -> int:
        """The number of pages in the tree."""
        return len(self._nodes)

    def match(self, tokens: Sequence[int], salt: str = "") -> Match:
        """The longest cached prefix of `tokens`. Changes nothing."""
        node = self._roots.get(salt)
        if node is None:
            return Match([])
        data, step, start, pages = token_bytes(tokens), self._step, 0, []
        while True:
            child = node.children.get(data[start : start + step])
            if child is None or len(child.key) < step:
                break
            pages.append(child.page)
            node, start = child, start + step
        tail_page, tail = self._closest(node, data[start : start + step])
        return Match(pages, tail_page, tail)

    def acquire(self, match: Match) -> None:
        """Hold the matched pages (the tail page too) for a request and make them the most recent."""
        pages = match.pages if match.tail_page is None else [*match.pages, match.tail_page]
        self.pool.hold(pages)
        for page in pages:
            self._idle.pop(page, None)

    def release(self, pages: Sequence[int]) -> None:
        """Release `pages` of a request, given in the order of its tokens. Cached ones become evictable."""
        for page in reversed(self.pool.release(pages)):
            self._idle[page] = None

    def insert(self, tokens: Sequence[int], pages: Sequence[int], salt: str = "") -> list[int]:
        """Put a request's computed tokens into the tree, whole pages and a partly filled last one.

        The request holds `pages` and writes none of them any more. Where the tree has the same whole page already,
        the request exchanges its own for the tree's, so that whoever holds a page holds all before it. Returns
        the request's pages after that.
        """
        node = self._roots.get(salt)
        if node is None:
            node = self._roots[salt] = Node(salt.encode(), -1, None, root_hash(salt))
        data, step, kept = token_bytes(tokens), self._step, list(pages)
        for index, start in enumerate(range(0, len(data), step)):
            key = data[start : start + step]
            child = node.children.get(key)
            if child is None:
                if len(key) < step and self._closest(node, key)[1] * TOKEN_BYTES == len(key):
                    break  # a page in the tree begins with these tokens already
                child = self._add(node, key, kept[index])
            elif child.page != kept[index] and len(key) == step:
                self.pool.hold([child.page])
                self._idle.pop(child.page, None)
                self.pool.release([kept[index]])
                kept[index] = child.page
            node = child
        self._forget_if_empty(self._roots[salt])
        return kept

    def note_entries(self) -> None:
        """From now on `take_entered` has to be asked."""
        self._entered = {}

    def take_entered(self) -> list[int]:
        """The pages in the tree that have entered it since the last call."""
        entered = [page for page in self._entered or () if page in self._nodes]
        self._entered = {}
        return entered

    def drop(self, page: int) -> None:
        """Take a page and all that follow it out of the tree, whoever holds them. Nothing if it is not in it."""
        top = self._nodes.get(page)
        stack = [] if top is None else [top]
        below = []
        while stack:
            below.append(node := stack.pop())
            stack += node.children.values()
        for node in reversed(below):
            self._remove(node)
        if top is not None and top.parent is not None:
            self._forget_if_empty(top.parent)

    def evict(self, count: int) -> int:
        """Free up to `count` cached pages, the least recently used first. Returns how many were freed."""
        freed = 0
        while freed < count and self._idle:
            node = self._nodes[next(iter(self._idle))]
            self._remove(node)
            if node.parent is not None:
                self._forget_if_empty(node.parent)
            freed += 1
        return freed

    def hashes(self) -> Iterator[int]:
        """The hash of every whole page in the tree, parents before children."""
        stack = list(self._roots.values())
        while stack:
            node = stack.pop()
            for child in node.children.values():
                if len(child.key) == self._step:
                    yield child.hash
                    stack.append(child)

    def pages(self) -> Iterator[int]:
        """Every page in the tree."""
        return iter(self._nodes)

    def check(self) -> None:
        """Raise AssertionError unless the tree, its recency and the pool agree. O(pages)."""
        for page, node in self._nodes.items():
            assert node.page == page
            assert node.parent is not None
            assert node.parent.children[node.key] is node
            assert node.keys == sorted(node.children)
            assert len(node.key) == self._step or not node.children, "a partly filled page has children"
            cached = self.pool.owner(page) is Owner.CACHED
            assert cached == (page in self._idle), f"page {page} is {self.pool.owner(page).name}"
            if not cached and node.parent.page >= 0:
                assert self.pool.owner(node.parent.page) is Owner.HELD, "held below a page that is not"
        age = {page: place for place, page in enumerate(self._idle)}
        for page in self._idle:
            parent = self._nodes[page].parent
            assert parent is not None
            assert parent.page not in age or age[parent.page] > age[page], "a parent older than its child"

    # -- inside

    def _closest(self, node: Node, key: bytes) -> tuple[int | None, int]:
        """The child of `node` that shares most tokens with `key`, and how many."""
        best, most = None, 0
        place = bisect_left(node.keys, key)
        for other in node.keys[max(0, place - 1) : place + 1]:
            common = _common_tokens(other, key)
            if common > most:
                best, most = node.children[other].page, common
        return best, most

    def _add(self, parent: Node, key: bytes, page: int) -> Node:
        self._drop_shorter(parent, key)
        whole = len(key) == self._step
        node = Node(key, page, parent, next_hash(parent.hash, key) if whole else 0)
        self.pool.enter_tree(page)
        parent.children[key] = node
        insort(parent.keys, key)
        self._nodes[page] = node
        if self._entered is not None:
            self._entered[page] = None
        if whole:
            self.log.entries.append((True, node.hash))
        return node

    def _drop_shorter(self, parent: Node, key: bytes) -> None:
        """Evict a partly filled sibling that `key` continues: the new page serves whoever it served."""
        place = bisect_left(parent.keys, key)
        if place and key.startswith(parent.keys[place - 1]):
            shorter = parent.children[parent.keys[place - 1]]
            if self.pool.owner(shorter.page) is Owner.CACHED:
                self._remove(shorter)

    def _remove(self, node: Node) -> None:
        assert node.parent is not None
        assert not node.children
        self._idle.pop(node.page, None)
        del self._nodes[node.page]
        del node.parent.children[node.key]
        del node.parent.keys[bisect_left(node.parent.keys, node.key)]
        self.pool.leave_tree(node.page)
        if len(node.key) == self._step:
            self.log.entries.append((False, node.hash))

    def _forget_if_empty(self, node: Node) -> None:
        if node.parent is None and not node.children:
            del self._roots[node.key.decode()]


def _common_tokens(a: bytes, b: bytes) -> int:
    """How many leading tokens two keys share."""
    size = min(len(a), len(b))
    if a[:size] == b[:size]:
        return size // TOKEN_BYTES
    low, high = 0, size // TOKEN_BYTES
    while high - low > 1:
        middle = (low + high) // 2
        if a[: middle * TOKEN_BYTES] == b[: middle * TOKEN_BYTES]:
            low = middle
        else:
            high = middle
    return low

"""Who owns each page of the KV pool: one owner at a time, and only this module changes it.

    free -> held (by n requests) -> cached (in the tree) -> free
    free -> leased (a remote writer may write) -> held
    leased -> fenced (the writer is not yet proven stopped) -> free

A page in the radix tree that requests use is `held`; it is `cached` when the last of them is gone. A page
leaves `leased` or `fenced` only by `settle` or `reclaim`, which their callers may use only on proof that the
writer has stopped: its acknowledgement, its death seen by the transport, or the memory deregistered.

Pure: no clock, no tensor, no thread. A call that would break a rule raises `OwnershipError` and changes nothing.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from enum import IntEnum


class Owner(IntEnum):
    """The class of a page's owner."""

    FREE = 0
    HELD = 1
    CACHED = 2
    LEASED = 3
    FENCED = 4


class OwnershipError(AssertionError):
    """A caller tried a transition that does not exist. This is always a bug, never invalid input."""


class OutOfPages(Exception):
    """Fewer pages are free than requested."""


class PagePool:
    """The owners of pages 0 to `size` - 1. Every operation is O(pages named)."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._owner = [Owner.FREE] * size
        self._holders = [0] * size
        self._in_tree = bytearray(size)
        self._lease: dict[int, int] = {}  # leased or fenced page -> lease id
        self._free = list(range(size - 1, -1, -1))
        self._counts = [size, 0, 0, 0, 0]

    # -- reading

    def owner(self, page: int) -> Owner:
        """The owner class of `page`."""
        return self._owner[page]

    def holders(self, page: int) -> int:
        """How many requests hold `page`."""
        return self._holders[page]

    def count(self, owner: Owner) -> int:
        """How many pages have this class of owner. O(1)."""
        return self._counts[owner]

    @property
    def available(self) -> int:
        """The number of pages that can be taken: free ones, and cached ones by eviction."""
        return self._counts[Owner.FREE] + self._counts[Owner.CACHED]

    # -- requests

    def take(self, count: int) -> list[int]:
        """free -> held: `count` pages for one request. Raises OutOfPages."""
        pages = self._pop(count)
        for page in pages:
            self._holders[page] = 1
            self._move(page, Owner.HELD)
        return pages

    def hold(self, pages: Sequence[int]) -> None:
        """held or cached -> held: a further request uses `pages`."""
        self._require(pages, "hold", Owner.HELD, Owner.CACHED)
        for page in pages:
            self._holders[page] += 1
            self._move(page, Owner.HELD)

    def release(self, pages: Sequence[int]) -> list[int]:
        """held -> held, cached or free: a request releases `pages`. Returns those that are cached now."""
        self._require(pages, "release", Owner.HELD)
        cached = []
        for page in pages:
            self._holders[page] -= 1
            if self._holders[page] == 0:
                if self._in_tree[page]:
                    self._move(page, Owner.CACHED)
                    cached.append(page)
                else:
                    self._to_free(page)
        return cached

    # -- the tree

    def enter_tree(self, page: int) -> None:
        """A held page becomes part of the tree; it stays held until its holders are gone."""
        self._require([page], "enter the tree", Owner.HELD)
        if self._in_tree[page]:
            raise OwnershipError(f"page {page} is in the tree already")
        self._in_tree[page] = 1

    def leave_tree(self, page: int) -> None:
        """cached -> free. A page that requests hold stays held, and leaves only the tree."""
        self._require([page], "evict", Owner.CACHED, Owner.HELD)
        if not self._in_tree[page]:
            raise OwnershipError(f"page {page} is not in the tree")
        self._in_tree[page] = 0
        if self._owner[page] is Owner.CACHED:
            self._to_free(page)

    # -- leases

    def lease(self, count: int, lease: int) -> list[int]:
        """free -> leased: `count` pages that a remote writer may write. Raises OutOfPages."""
        pages = self._pop(count)
        for page in pages:
            self._lease[page] = lease
            self._move(page, Owner.LEASED)
        return pages

    def settle(self, pages: Sequence[int], lease: int) -> None:
        """leased -> held: the writer's acknowledgement that it has written all and writes no more."""
        self._require_lease(pages, lease, "settle", Owner.LEASED)
        for page in pages:
            del self._lease[page]
            self._holders[page] = 1
            self._move(page, Owner.HELD)

    def fence(self, pages: Sequence[int], lease: int) -> None:
        """leased -> fenced: the content is not needed, and there is no proof yet that the writer has stopped."""
        self._require_lease(pages, lease, "fence", Owner.LEASED)
        for page in pages:
            self._move(page, Owner.FENCED)

    def reclaim(self, pages: Sequence[int], lease: int) -> None:
        """leased or fenced -> free, on proof that the writer has stopped."""
        self._require_lease(pages, lease, "reclaim", Owner.LEASED, Owner.FENCED)
        for page in pages:
            del self._lease[page]
            self._to_free(page)

    # -- conservation

    def check(self, held: Iterable[Sequence[int]] | None = None, tree: Iterable[int] | None = None) -> None:
        """Raise OwnershipError unless every page has exactly one owner class and all counts agree. O(pages).

        `held` (each request's pages) and `tree` (the tree's pages), if given, have to match the reference counts.
        """
        counts = Counter(self._owner)
        if [counts[owner] for owner in Owner] != self._counts:
            raise OwnershipError(f"counts {self._counts} are not {dict(counts)}")
        if len(set(self._free)) != len(self._free) or {p for p in range(self.size) if not self._owner[p]} != set(
            self._free
        ):
            raise OwnershipError("the free list is not the set of free pages")
        for page, owner in enumerate(self._owner):
            holders, in_tree, lease = self._holders[page], bool(self._in_tree[page]), self._lease.get(page)
            fits = {
                Owner.FREE: holders == 0 and not in_tree and lease is None,
                Owner.HELD: holders > 0 and lease is None,
                Owner.CACHED: holders == 0 and in_tree and lease is None,
                Owner.LEASED: holders == 0 and not in_tree and lease is not None,
                Owner.FENCED: holders == 0 and not in_tree and lease is not None,
            }[owner]
            if not fits:
                raise OwnershipError(f"page {page} is {owner.name}, {holders=} {in_tree=} {lease=}")
        if held is not None:
            holders_of = Counter(page for pages in held for page in pages)
            wrong = [p for p in range(self.size) if holders_of[p] != self._holders[p]]
            if wrong:
                raise OwnershipError(f"holders of {wrong[:8]} do not add up")
        if tree is not None:
            content = list(tree)
            if len(set(content)) != len(content) or set(content) != {
                p for p in range(self.size) if self._in_tree[p]
            }:
                raise OwnershipError("the tree's pages are not those marked so")

    # -- inside

    def _pop(self, count: int) -> list[int]:
        if count > len(self._free):
            raise OutOfPages(f"{count} pages asked for, {len(self._free)} free")
        if count <= 0:
            return []
        pages = self._free[-count:]
        del self._free[-count:]
        return pages

    def _move(self, page: int, owner: Owner) -> None:
        self._counts[self._owner[page]] -= 1
        self._counts[owner] += 1
        self._owner[page] = owner

    def _to_free(self, page: int) -> None:
        self._move(page, Owner.FREE)
        self._free.append(page)

    def _require(self, pages: Sequence[int], verb: str, *owners: Owner) -> None:
        for page in pages:
            if self._owner[page] not in owners:
                raise OwnershipError(f"cannot {verb} page {page}: it is {self._owner[page].name}")
        if len(pages) > 1 and len(set(pages)) != len(pages):
            raise OwnershipError(f"cannot {verb} a page twice")

    def _require_lease(self, pages: Sequence[int], lease: int, verb: str, *owners: Owner) -> None:
        self._require(pages, verb, *owners)
        for page in pages:
            if self._lease[page] != lease:
                raise OwnershipError(f"cannot {verb} page {page} of lease {lease}: it is of {self._lease[page]}")

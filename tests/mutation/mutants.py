"""The seeded faults: each is one small lie in the code that keeps pages and bytes right, and each must be found.

A fault is an exact replacement in one file of `kvasir_engine`; its old text occurs there exactly once. Faults that
change nothing that anyone could observe (equivalent mutants) are left out.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """`old` becomes `new` in `file`, a path below the package."""

    name: str
    file: str
    old: str
    new: str

    def apply(self, text: str) -> str:
        """`text` with the fault in it. Raises ValueError unless the old text is there exactly once."""
        if text.count(self.old) != 1:
            raise ValueError(f"{self.name}: its text is in {self.file} {text.count(self.old)} times")
        return text.replace(self.old, self.new)


PAGES, RADIX, HASHING = "kv/pages.py", "kv/radix.py", "kv/hashing.py"
HOLDER, WRITER, DIGEST = "connector/receiver.py", "connector/sender.py", "connector/digester.py"
KEPT = "kv/digests.py"
ENGINE, CACHE, GROUP = "core/engine.py", "core/kv_cache_manager.py", "connector/kv_connector.py"
PARTS, LAYOUT = "connector/rank_parts.py", "connector/layout.py"
EXECUTOR, THREAD = "connector/lease_executor.py", "connector/transfer_thread.py"
UNCONFIRMED, OPEN, COPIES = (
    "connector/unconfirmed_leases.py",
    "connector/open_leases.py",
    "connector/inflight_copies.py",
)
PENDING, EARLY, RANKS = "connector/pending_loans.py", "connector/early_messages.py", "connector/peer_ranks.py"
AGENT = "connector/nixl_agent.py"
LOANS, READBACK, READS, PROTOCOL = "core/loans.py", "core/readback.py", "connector/loan_reads.py", "protocol.py"
PUSHES, LEASES, INFLIGHT = "core/pushes.py", "core/leases.py", "core/inflight_steps.py"

MUTANTS = [
    # -- who owns a page
    Mutant("a release leaves the count of holders", PAGES, "            self._holders[page] -= 1\n", ""),
    Mutant(
        "a release frees what another request holds",
        PAGES,
        "if self._holders[page] == 0:",
        "if self._holders[page] <= 1:",
    ),
    Mutant(
        "a page that was cached stays evictable when held",
        PAGES,
        "            self._holders[page] += 1\n            self._move(page, Owner.HELD)\n",
        "            self._holders[page] += 1\n",
    ),
    Mutant("a free page can be held", PAGES, '"hold", Owner.HELD, Owner.CACHED', '"hold", *Owner'),
    Mutant("a held page can be evicted", PAGES, '"evict", Owner.CACHED', '"evict", Owner.CACHED, Owner.HELD'),
    Mutant("a page can be released twice", PAGES, '"release", Owner.HELD', '"release", Owner.HELD, Owner.FREE'),
    Mutant(
        "one call may release a page twice",
        PAGES,
        "if len(pages) > 1 and len(set(pages)) != len(pages):",
        "if False:",
    ),
    Mutant(
        "an evicted page stays marked as the tree's",
        PAGES,
        "        self._in_tree[page] = 0\n",
        "",
    ),
    Mutant(
        "another lease's pages can be settled",
        PAGES,
        'self._require_lease(pages, lease, "settle", Owner.LEASED)',
        'self._require(pages, "settle", Owner.LEASED)',
    ),
    Mutant(
        "a fenced lease can be settled", PAGES, '"settle", Owner.LEASED', '"settle", Owner.LEASED, Owner.FENCED'
    ),
    Mutant(
        "fencing frees the pages at once",
        PAGES,
        "            self._move(page, Owner.FENCED)\n",
        "            del self._lease[page]\n            self._to_free(page)\n",
    ),
    Mutant(
        "a reclaimed page remembers its lease",
        PAGES,
        "            del self._lease[page]\n            self._to_free(page)\n",
        "            self._to_free(page)\n",
    ),
    Mutant(
        "one page more than there are can be had",
        PAGES,
        "if count > len(self._free):",
        "if count > len(self._free) + 1:",
    ),
    # -- the tree
    Mutant(
        "a prompt matches another tenant's pages",
        RADIX,
        "        node = self._roots.get(salt)\n        if node is None:\n            return Match([])",
        '        node = self._roots.get(salt) or self._roots.get("")\n'
        "        if node is None:\n            return Match([])",
    ),
    Mutant(
        "a partly filled page matches as a whole one",
        RADIX,
        "if child is None or len(child.key) < step:",
        "if child is None:",
    ),
    Mutant(
        "a match is a token too long",
        RADIX,
        "Match(pages, tail_page, tail)",
        "Match(pages, tail_page, tail and tail + 1)",
    ),
    Mutant(
        "the neighbour before is not looked at",
        RADIX,
        "node.keys[max(0, place - 1) : place + 1]",
        "node.keys[place : place + 1]",
    ),
    Mutant("common tokens are counted in twos", RADIX, "while high - low > 1:", "while high - low > 2:"),
    Mutant(
        "a page copied from is not held",
        RADIX,
        "pages = match.pages if match.tail_page is None else [*match.pages, match.tail_page]",
        "pages = match.pages",
    ),
    Mutant(
        "an acquired page stays a candidate for eviction",
        RADIX,
        "        self.pool.hold(pages)\n        for page in pages:\n            self._idle.pop(page, None)\n",
        "        self.pool.hold(pages)\n",
    ),
    Mutant(
        "recency within a prompt is reversed",
        RADIX,
        "for page in reversed(self.pool.release(pages)):",
        "for page in self.pool.release(pages):",
    ),
    Mutant("the youngest is evicted first", RADIX, "next(iter(self._idle))", "next(reversed(self._idle))"),
    Mutant(
        "a page that the tree has already is not exchanged",
        RADIX,
        "elif child.page != kept[index] and len(key) == step:",
        "elif child.page < 0:",
    ),
    Mutant(
        "the exchanged page is not held",
        RADIX,
        "                self.pool.hold([child.page])\n",
        "",
    ),
    Mutant("the page given in exchange leaks", RADIX, "                self.pool.release([kept[index]])\n", ""),
    Mutant(
        "a shorter sibling goes while it is held",
        RADIX,
        "if self.pool.owner(shorter.page) is Owner.CACHED:",
        "if shorter.page >= 0:",
    ),
    Mutant(
        "an eviction is not told",
        RADIX,
        "self.log.entries.append((False, node.hash))",
        "pass",
    ),
    Mutant("the tree's hash ignores what came before", RADIX, "next_hash(parent.hash, key)", "next_hash(0, key)"),
    Mutant("the hash chain ignores the parent", HASHING, "key=parent.to_bytes(8", "key=(0).to_bytes(8"),
    Mutant("the hash ignores the salt", HASHING, "blake2b(salt.encode()", 'blake2b(b""'),
    Mutant(
        "a partly filled page has a hash",
        HASHING,
        "range(0, len(data) - step + 1, step)",
        "range(0, len(data), step)",
    ),
    # -- the holder's side of a lease
    Mutant(
        "a fenced lease is freed after 30 s",
        HOLDER,
        "        for key, part in self._parts.items():\n"
        "            lease, writer = key\n            if part.fenced:\n",
        "        for key, part in list(self._parts.items()):\n"
        "            lease, writer = key\n"
        "            if part.fenced and now >= part.deadline + 30:\n"
        "                del self._parts[key]\n"
        '                effects.append(Reclaimed(lease, "acknowledged", writer=writer))\n'
        "            elif part.fenced:\n",
    ),
    Mutant("an expired lease is not fenced", HOLDER, "elif now >= part.deadline:", "elif part.deadline < 0:"),
    Mutant("the holder skips the epoch", HOLDER, "if message.epoch != self.epoch:", "if message.epoch < 0:"),
    Mutant(
        "the holder hears strangers",
        HOLDER,
        "self._parts.get((lease, agent))\n        if part is None:",
        "next((self._parts[k] for k in self._parts if k[0] == lease), None)\n        if part is None:",
    ),
    Mutant(
        "a late completion settles a fenced lease",
        HOLDER,
        '        if part.fenced:\n            return [Reclaimed(lease, "acknowledged", writer=agent)]\n',
        "",
    ),
    Mutant(
        "a completion counts without its pages being written",
        HOLDER,
        "if message.pages != total or part.written != total:",
        "if message.pages != total:",
    ),
    Mutant(
        "a completion's own count is not looked at",
        HOLDER,
        "if message.pages != total or part.written != total:",
        "if part.written != total:",
    ),
    Mutant(
        "digests are not checked", HOLDER, "if self.digests and part.verified != part.announced:", "if total < 0:"
    ),
    Mutant(
        "pages written out of order are accepted",
        HOLDER,
        "if first != part.written or len(pages) != count or",
        "if len(pages) != count or",
    ),
    Mutant(
        "more pages written than leased are accepted",
        HOLDER,
        "if first != part.written or len(pages) != count or",
        "if first != part.written or",
    ),
    Mutant(
        "layers of other pages than those begun are accepted",
        HOLDER,
        " or (part.layer and count != part.group):",
        ":",
    ),
    Mutant(
        "layers written out of order are accepted",
        HOLDER,
        "if not layers or layers.start != part.layer or",
        "if not layers or",
    ),
    Mutant(
        "more layers than there are are accepted",
        HOLDER,
        " or layers.stop > self._layers:",
        ":",
    ),
    Mutant(
        "a page counts as written after its first layer",
        HOLDER,
        "if part.layer == self._layers:",
        "if part.layer:",
    ),
    Mutant(
        "an abort of a fenced lease fences it again",
        HOLDER,
        "if key[0] == lease and not part.fenced]",
        "if key[0] == lease]",
    ),
    Mutant(
        "a writer's death frees the pages of all writers",
        HOLDER,
        "for lease, writer in self._parts if writer == agent]",
        "for lease, writer in self._parts]",
    ),
    Mutant(
        "a silent writer is trusted",
        HOLDER,
        "elif part.unanswered * PING_INTERVAL >= SILENCE:",
        "elif part.unanswered < 0:",
    ),
    Mutant(
        "what a writer says counts for one of its leases only",
        HOLDER,
        "            if known == writer:\n                part.unanswered = 0\n",
        "            if known == writer:\n                part.unanswered = 0\n                return\n",
    ),
    Mutant(
        "nobody who answers is heard",
        HOLDER,
        "                part.unanswered = 0\n",
        "                pass\n",
    ),
    Mutant(
        "a lease is silent by what its writer left unanswered before",
        HOLDER,
        "self._parts[key] = _Part(now + seconds, tuple(pages), nonce)",
        "before = max((p.unanswered for (_, w), p in self._parts.items() if w == writer), default=0)\n"
        "        self._parts[key] = _Part(now + seconds, tuple(pages), nonce, unanswered=before)",
    ),
    Mutant(
        "each look around is a ping that the writer leaves unanswered",
        HOLDER,
        "            elif writer in self._pinged:\n                continue\n",
        "",
    ),
    Mutant(
        "a fenced lease's writer is asked once only",
        HOLDER,
        "                    effects.append(NotifyWriter(writer, Release(lease, self.epoch, nonce=part.nonce)))\n",
        "",
    ),
    Mutant(
        "nobody is pinged", HOLDER, "effects.append(NotifyWriter(writer, Ping(lease, self.epoch, nonce)))", "pass"
    ),
    # -- the writer's side of a lease
    Mutant(
        "Stopped is sent while a write is under way",
        WRITER,
        "            if lease.posted:\n                return []\n",
        "",
    ),
    Mutant(
        "pages are let go of while a write reads them",
        WRITER,
        "            if lease.posted:\n                return []\n",
        "            if lease.posted:\n                return [Failed(key, lease.stopping)]\n",
    ),
    Mutant(
        "a release leaves no tombstone",
        WRITER,
        '            _remember(self._early, early, "released by the decode worker", EARLY)\n',
        "",
    ),
    Mutant(
        "a stranger's releases take the tombstones' places",
        WRITER,
        '_remember(self._early, early, "released by the decode worker", EARLY)',
        '_remember(self._ended, early, "released by the decode worker", TOMBSTONES)',
    ),
    Mutant(
        "a tombstone is not looked at",
        WRITER,
        "if key in self._leases or ended is not None:",
        "if key in self._leases:",
    ),
    Mutant(
        "Complete overtakes writes",
        WRITER,
        "                if lease.posted:\n                    break\n",
        "",
    ),
    Mutant(
        "a write is announced before those before it",
        WRITER,
        "while lease.posted and lease.posted[0].ended:\n            write = lease.posted.popleft()\n",
        "while write in lease.posted:\n            lease.posted.remove(write)\n",
    ),
    Mutant(
        "layers that go together are not bounded",
        WRITER,
        "min(there, max(wanted, PIECES // max(1, len(push.local))))",
        "there",
    ),
    Mutant("a write that failed counts as written", WRITER, "        if not ok:\n", "        if ok is None:\n"),
    Mutant(
        "the writer's clock stops nothing",
        WRITER,
        "if now >= lease.deadline and not lease.stopping]",
        "if lease.deadline < 0]",
    ),
    Mutant(
        "a write is posted after the deadline",
        WRITER,
        "if not lease.stopping and now >= lease.deadline:",
        "if lease.deadline < 0:",
    ),
    Mutant(
        "a release of another life stops a lease",
        WRITER,
        "if lease is None or lease.epoch != message.epoch:",
        "if lease is None:",
    ),
    Mutant(
        "a holder's death ends the leases of all holders",
        WRITER,
        "[key for key in self._leases if key[0] == agent]",
        "list(self._leases)",
    ),
    Mutant(
        "pages are announced one by one whatever their number",
        WRITER,
        "lease.announced += len(write.push.local)",
        "lease.announced += 1",
    ),
    Mutant("there is no bound on writes under way", WRITER, " and len(lease.posted) < WINDOW:", ":"),
    # -- digests
    Mutant(
        "a digest leaves out the last layer",
        DIGEST,
        "found[:, within] = digests.reshape(len(blocks), len(run), cut.tokens)",
        "found[:, within] = digests.reshape(len(blocks), len(run), cut.tokens)\n        found[:, -1] = 1",
    ),
    Mutant(
        "a part's digest is of the first heads",
        LAYOUT,
        " + kind.first * self.head_bytes(kind)",
        "",
    ),
    Mutant(
        "a digest is of other heads too", DIGEST, "kind.parts, kind.count, cut.tokens", "kind.parts, 1, cut.tokens"
    ),
    Mutant("a digest is of K alone", DIGEST, "kind.parts, kind.count, cut.tokens", "1, kind.count, cut.tokens"),
    Mutant(
        "what arrived is taken for what was written",
        DIGEST,
        "        tokens = self._measure(blocks, layers, cut)\n        values",
        "        tokens = self._measure(blocks, layers, cut)\n"
        "        tokens = self._kept.of(*self._cells(blocks, layers, cut)) if self._kept else tokens\n"
        "        values",
    ),
    Mutant(
        "what was written is what is there now",
        DIGEST,
        "if self._kept is None or not cut.complete:",
        "if self._kept or not cut.complete:",
    ),
    Mutant(
        "digests of some heads are kept as of all",
        DIGEST,
        "if self._kept is not None and blocks and cut.complete:",
        "if self._kept is not None and blocks:",
    ),
    Mutant(
        "what came wrong is kept",
        DIGEST,
        "[block for block in blocks if block in digested.measured]",
        "list(digested.measured)",
    ),
    Mutant(
        "half a page is as the other", DIGEST, "[block % cut.blocks for block in blocks]", "[0 for _ in blocks]"
    ),
    Mutant(
        "a page is known when one of its tokens is",
        DIGEST,
        "np.flatnonzero((tokens == 0).any((1, 2)))",
        "np.flatnonzero((tokens == 0).all((1, 2)))",
    ),
    Mutant("a page of which some is known is sent as known", DIGEST, "not tokens.all()", "not tokens.any()"),
    Mutant("what is measured replaces what is known", KEPT, "np.where(known == 0, measured, known)", "measured"),
    Mutant("what another may write stays known", KEPT, "self.table[list(pages)] = 0", "pass"),
    Mutant("a copied page keeps the digests that it had", KEPT, "self.table[target] = self.table[source]", "pass"),
    Mutant("tokens of a page may be exchanged", KEPT, "| place) * np.uint64(FOLD)", ") * np.uint64(FOLD)"),
    Mutant(
        "layers may be exchanged", KEPT, "keys_of_places(first + layers, size)[first:]", "keys_of_places(1, size)"
    ),
    Mutant("a token's words may be exchanged", KEPT, "words + keys[shift : shift + count]", "words"),
    Mutant("one sum says enough", KEPT, "(0, SHIFT_BYTES // 4)", "(0, 0)"),
    # -- the engine
    Mutant("a push does not hold its pages", PUSHES, "        self._cache.pool.hold(pages)\n", ""),
    Mutant(
        "a request that ends under a push lets go of its pages",
        PUSHES,
        "if lease is not None and lease.readings and pages:",
        "if pages is None:",
    ),
    Mutant(
        "preempted pages are not released",
        ENGINE,
        "            self.pages.release(self.requests.of(sequence))\n",
        "",
    ),
    Mutant(
        "an aborted lease is free at once",
        LEASES,
        "            self._cache.pool.fence(job.leased, job.lease.id)\n",
        "            self._cache.pool.reclaim(job.leased, job.lease.id)\n            job.leased = []\n",
    ),
    Mutant("an abort at decode is not told", LEASES, "            self._connector.revoke(job.lease.id)\n", ""),
    Mutant(
        "an abort at prefill is not told",
        PUSHES,
        "            self._connector.withdraw(job.key, reason)\n",
        "            pass\n",
    ),
    Mutant(
        "a completion of another length is taken",
        LEASES,
        "if complete.tokens != len(sequence.tokens):",
        "if complete.tokens < 0:",
    ),
    Mutant(
        "a completion that crosses an abort leaks",
        LEASES,
        "            self._cache.pool.reclaim(pages, lease)\n            return None\n",
        "            return None\n",
    ),
    Mutant(
        "a page is pushed before it is full",
        PUSHES,
        "else end // lease.block - lease.first",
        "else -(-end // lease.block) - lease.first",
    ),
    Mutant(
        "a cached page is pushed one too far",
        PUSHES,
        "whole * self._cache.page_size // lease.block - lease.first)",
        "whole * self._cache.page_size // lease.block - lease.first + 1)",
    ),
    Mutant(
        "what the holder has already shifts what is sent",
        PUSHES,
        "ours, lease.first + lease.pushed, lease.first + ready)",
        "ours, lease.pushed, ready)",
    ),
    Mutant(
        "the first layer is not sent",
        "connector/transfer_thread.py",
        "                else:\n                    self.push(key, Push(last.local",
        "                elif layer:\n                    self.push(key, Push(last.local",
    ),
    Mutant(
        "pages are held after their push has ended",
        PUSHES,
        "            self._cache.tree.release(reading.pages)\n            self._stats.sent_pages",
        "            self._stats.sent_pages",
    ),
    Mutant(
        "a failed push keeps its pages",
        PUSHES,
        "        for reading in lease.readings:\n            self._cache.tree.release(reading.pages)\n",
        "",
    ),
    Mutant(
        "one router's end is the end of all requests",
        ENGINE,
        "for job in self.jobs.values() if job.session == session]",
        "for job in self.jobs.values()]",
    ),
    Mutant(
        "a lease that does not fit the prompt is taken",
        PUSHES,
        "pages == len(lease.pages)\n",
        "pages >= 0\n",
    ),
    # -- its cache
    Mutant(
        "the tail page is not copied",
        CACHE,
        "self._copy(match.tail_page, fresh[0])",
        "pass",
    ),
    Mutant(
        "the tail page is copied to the wrong place",
        CACHE,
        "match.tail_page, fresh[0])",
        "match.tail_page, fresh[-1])",
    ),
    Mutant(
        "the tail page leaks",
        INFLIGHT,
        "launched.held += self._cache.take_copying()",
        "self._cache.take_copying()",
    ),
    Mutant(
        "the tail page goes before it is copied",
        INFLIGHT,
        "        launched.held += self._cache.take_copying()\n",
        "        for pages in self._cache.take_copying():\n            self._cache.tree.release(pages)\n",
    ),
    Mutant(
        "what a step in flight computes is shared at once",
        CACHE,
        "whole = sequence.done // self.page_size",
        "whole = sequence.computed // self.page_size",
    ),
    Mutant(
        "a request that ends in flight keeps what is not computed yet",
        CACHE,
        "self.tree.insert(sequence.tokens[: sequence.done], pages,",
        "self.tree.insert(sequence.tokens[: sequence.computed], pages,",
    ),
    # -- steps in flight
    Mutant(
        "pages go with their request though a step reads them",
        INFLIGHT,
        "        self._hold(launched, before)\n        pages = ",
        "        pages = ",
    ),
    Mutant(
        "a page is given in exchange though a step reads it",
        INFLIGHT,
        "        self._hold(launched, before)\n        self._cache.share",
        "        self._cache.share",
    ),
    Mutant(
        "what a step holds is not held from the prompt's beginning on",
        INFLIGHT,
        "        if pages != before:\n",
        "        if pages is None:\n",
    ),
    Mutant(
        "a step that has ended holds its pages for ever",
        INFLIGHT,
        "            self.ended()\n        for pages",
        "            self._steps.pop(0)\n        for pages",
    ),
    Mutant(
        "who waits for a leader goes when its last chunk is launched",
        "core/scheduler.py",
        "s for s in running if s.done < len(s.tokens) - 1 and",
        "s for s in running if s.computed < len(s.tokens) - 1 and",
    ),
    Mutant(
        "more is taken for computed than is cached",
        CACHE,
        "sequence.computed = match.tokens(self.page_size)",
        "sequence.computed = min(len(sequence.tokens) - 1, match.tokens(self.page_size) + 1)",
    ),
    Mutant("what a lease builds on is not held", CACHE, "        self.tree.acquire(Match(match.pages))\n", ""),
    Mutant(
        "a page that is being written is shared",
        CACHE,
        "whole = sequence.done // self.page_size",
        "whole = self.pages_for(sequence.computed)",
    ),
    Mutant(
        "tokens that were not computed enter the tree",
        CACHE,
        "self.tree.insert(sequence.tokens[: sequence.done], pages,",
        "self.tree.insert(sequence.tokens[: len(pages) * self.page_size], pages,",
    ),
    Mutant(
        "a cached last page is held though its room is needed",
        CACHE,
        "if match.tail_page is not None and missing > self.available:",
        "if False:",
    ),
    Mutant(
        "cached pages count twice at admission",
        CACHE,
        "        idle = sum(self.pool.owner(page) is Owner.CACHED for page in match.pages)",
        "        idle = 0",
    ),
    Mutant(
        "eviction makes a page too little room",
        CACHE,
        "self.tree.evict(count - self.pool.count(Owner.FREE))",
        "self.tree.evict(count - self.pool.count(Owner.FREE) - 1)",
    ),
    Mutant(
        "a decode writes past its pages",
        CACHE,
        "self.pages_for(sequence.computed + tokens) - len(sequence.pages)",
        "self.pages_for(sequence.computed) - len(sequence.pages)",
    ),
    # -- what is read back
    Mutant("what is lent is not held", LOANS, "        self._cache.pool.hold(pages)\n", ""),
    Mutant(
        "only the pages that are lent are held, not those before them",
        LOANS,
        "        self._cache.pool.hold(pages)\n        self.lent[id] = list(pages)\n",
        "        self._cache.pool.hold(pages[skip:])\n        self.lent[id] = list(pages[skip:])\n",
    ),
    Mutant(
        "what comes back from a reader leaks",
        LOANS,
        "self._cache.tree.release(self.lent.pop(id))",
        "del self.lent[id]",
    ),
    Mutant("a gap before a loan is not seen", READBACK, "len(matched) * size < loan.first or wanted", "wanted"),
    Mutant(
        "more pages are read than the prompt has",
        READBACK,
        "wanted = min(len(reading.tokens) - 1, lent)",
        "wanted = max(len(reading.tokens) - 1, lent)",
    ),
    Mutant(
        "a declined loan is not given back",
        READBACK,
        '            connector.withdraw(key, "nothing to read")\n',
        "",
    ),
    Mutant(
        "pages that came wrong enter the tree",
        READBACK,
        "        reading = self.reads.pop(key)\n"
        "        self._cache.tree.release(reading.pages)\n"
        "        self.stats.count",
        "        reading = self.reads.pop(key)\n"
        "        count = len(reading.pages) * self._cache.page_size\n"
        "        self._cache.tree.release(\n"
        "            self._cache.tree.insert(reading.tokens[:count], reading.pages, reading.salt)\n"
        "        )\n"
        "        self.stats.count",
    ),
    Mutant(
        "pages of a read that failed leak",
        READBACK,
        "        self._cache.tree.release(reading.pages)\n        self.stats.count",
        "        self.stats.count",
    ),
    Mutant(
        "a request that is gone comes back when its read ends",
        READBACK,
        "            reading.sequence = None\n            self._connector.withdraw(key, reason)\n",
        "            self._connector.withdraw(key, reason)\n",
    ),
    Mutant(
        "a read goes on after its request",
        READBACK,
        "            reading.sequence = None\n            self._connector.withdraw(key, reason)\n",
        "            reading.sequence = None\n            self.failed(key, reason)\n",
    ),
    Mutant(
        "a loan outlives its request",
        LOANS,
        "            self._connector.revoke(id)\n",
        "            pass\n",
    ),
    Mutant(
        "a loan ends when its request does",
        LOANS,
        "            self._connector.revoke(id)\n",
        "            self.returned(id)\n",
    ),
    Mutant(
        "a prompt is admitted before its first read page is here",
        ENGINE,
        "                if push.complete is not None:\n                    self._read(self.readback.ended(key))\n",
        "                self._read(self.readback.ended(key))\n",
    ),
    Mutant(
        "who waited to read goes to the end of the queue",
        "core/waiting_queue.py",
        "        self._sequences.insert(self._at(sequence), sequence)\n",
        "        self._sequences.append(sequence)\n",
    ),
    Mutant("what is read onto is not held", CACHE, "        self.tree.acquire(Match(pages))\n", ""),
    Mutant(
        "without room to read, what was held stays held",
        CACHE,
        "            self.tree.release(pages)\n            raise\n",
        "            raise\n",
    ),
    Mutant("a reader does not ask whether its lender lives", WRITER, "if lease.reading}", "if lease is None}"),
    Mutant("a lease of another worker is taken", PUSHES, "if stranger is not None:", "if stranger == 0:"),
    Mutant(
        "a lease of an earlier life is taken",
        PROTOCOL,
        "if (self.writer, self.writer_epoch) == (worker.agent, worker.epoch):",
        "if self.writer == worker.agent:",
    ),
    Mutant("a read is announced as a write", WRITER, "if not lease.reading:", "if lease:"),
    Mutant(
        "a reader can complete a loan",
        HOLDER,
        "if part.loan and not isinstance(message, Stopped):",
        "if part.loan and isinstance(message, Written):",
    ),
    Mutant(
        "pages are read before their digests are here",
        READS,
        "if read is None or read.digests is not None:",
        "if read is not None:",
    ),
    Mutant(
        "a block that was not lent is right",
        READS,
        "known.get(block) != digest",
        "known.get(block, digest) != digest",
    ),
    Mutant(
        "half a page is read",
        READBACK,
        "min(len(reading.tokens) - 1, lent) // size",
        "-(-min(len(reading.tokens) - 1, lent) // size)",
    ),
    Mutant("what is read begins where the loan does", READBACK, "(begin - loan.first) // block,", "0 // block,"),
    Mutant("a loan that begins in the middle of a page is read", READBACK, "if loan.first % theirs or", "if"),
    # -- several ranks
    Mutant(
        "who has read takes the loan back from the others",
        PARTS,
        "not (grant.loan and _given_back(event))",
        "not (grant.loan and event is None)",
    ),
    Mutant(
        "what is lent is what would be written",
        GROUP,
        "found = (to.agent, loan.id), pairs(to.fingerprint, self.endpoint.fingerprint)",
        "found = (to.agent, loan.id), [p[::-1] for p in pairs(self.endpoint.fingerprint, to.fingerprint)]",
    ),
    Mutant(
        "a lease is back with the first of its parts",
        PARTS,
        "            if not others:\n",
        "            if True:\n",
    ),
    Mutant("a part that failed fails nothing", PARTS, "elif grant.failed is None and", "elif grant is None and"),
    Mutant(
        "the holder's other parts go on after one has failed",
        PARTS,
        "                effects.append(StopParts(event.lease, event.reason))\n",
        "                pass\n",
    ),
    Mutant(
        "the writer's other parts go on after one has failed",
        PARTS,
        "                effects.append(StopParts(key, event.reason))\n",
        "                pass\n",
    ),
    Mutant(
        "pages are done when they are in one part", PARTS, "            if not left:\n", "            if True:\n"
    ),
    Mutant(
        "ranks that do not agree settle a lease",
        PARTS,
        "if any(complete != grant.settled[0] for",
        "if any(complete is None for",
    ),
    Mutant("only rank 0 is told", GROUP, "            self._others.command(command)\n", "            pass\n"),
    Mutant(
        "a rank's heads are counted from the model's first",
        LAYOUT,
        "first = chosen[0] - held.start if",
        "first = chosen[0] if",
    ),
    Mutant("every block is a page's first", LAYOUT, " + place * (self.tokens * kind.row_bytes)", " + 0 * place"),
    Mutant("V goes where K is", LAYOUT, "[:, None] * kind.heads", "[:, None] * 0"),
    Mutant("a layer begins where the page does", LAYOUT, "begin[:, None] + starts", "begin[:, None] + 0 * starts"),
    Mutant("heads of a layer go with those of another", LAYOUT, "[layer].append(head)", "[0].append(head)"),
    Mutant("a block's place is its page's", LAYOUT, "* a_page + place % a_page for", "* a_page for"),
    Mutant(
        "one of the copies of a head is always the one written",
        LAYOUT,
        "having[readers[head] % len(having)]",
        "having[0]",
    ),
    # -- a prompt's log-probabilities
    Mutant(
        "a prompt that is scored skips what is cached",
        CACHE,
        "self.tree.match(sequence.tokens[: sequence.reusable]",
        "self.tree.match(sequence.tokens[:-1]",
    ),
    Mutant(
        "a preempted prompt is scored again",
        "core/output_processor.py",
        "            sequence.scored = place + len(prompt)\n",
        "            pass\n",
    ),
    Mutant(
        "decode scores what prefill has scored", LEASES, "        sequence.scored = sequence.prompt  #", "        #"
    ),
    # -- who carries it out
    Mutant(
        "a death that shows again is another",
        EXECUTOR,
        "        if self._agent.knows(agent):\n            log.warning(",
        "        if True:\n            log.warning(",
    ),
    Mutant(
        "a write does not wait for the holder's word",
        EXECUTOR,
        "if not self._reads.waits(part, push) and not self._unconfirmed.waits(part, push):",
        "if not self._reads.waits(part, push):",
    ),
    Mutant(
        "a read does not wait for the digests",
        EXECUTOR,
        "if not self._reads.waits(part, push) and not self._unconfirmed.waits(part, push):",
        "if not self._unconfirmed.waits(part, push):",
    ),
    Mutant(
        "a death is told of before what was decided earlier",
        EXECUTOR,
        "waiting.extend(self._carry_out(waiting.popleft()))",
        "waiting.extendleft(reversed(list(self._carry_out(waiting.popleft()))))",
    ),
    Mutant(
        "anybody may confirm a lease",
        EXECUTOR,
        "(nonce is not None and nonce != pong.nonce)",
        "False",
    ),
    Mutant(
        "a lease that was not granted is confirmed",
        EXECUTOR,
        "if not self._receiver.wants(ping.lease, agent):",
        "if False:",
    ),
    Mutant(
        "a lease is confirmed whatever the nonce",
        EXECUTOR,
        "if effects or not self._agent.knows(agent):",
        "if not self._agent.knows(agent):",
    ),
    Mutant("what was read is right", EXECUTOR, "        return not wrong\n", "        return True\n"),
    Mutant(
        "what was written is right",
        EXECUTOR,
        "self._receiver.verified(lease, agent, len(right))",
        "self._receiver.verified(lease, agent, total)",
    ),
    Mutant(
        "a write's digests are those of nothing",
        EXECUTOR,
        "self._digested[ended.key, ended.push] = ended.digests.values",
        "self._digested[ended.key, ended.push] = [0] * len(ended.digests.values)",
    ),
    Mutant("a part that ended waits for its word", EXECUTOR, "        self._unconfirmed.close(part)\n", ""),
    Mutant("a part that ended is read under", EXECUTOR, "        self._reads.close(part)\n", ""),
    Mutant("a part that ended is open", EXECUTOR, "        self._open_leases.close(part)\n", ""),
    Mutant(
        "a part that ended keeps its digests",
        EXECUTOR,
        "            del self._digested[each]\n",
        "            pass\n",
    ),
    Mutant("copies outlive their peer", EXECUTOR, "        self._copies.died(agent)\n", ""),
    Mutant(
        "a death is no proof for the writer",
        EXECUTOR,
        "[*self._receiver.died(agent), *self._sender.died(agent)]",
        "self._receiver.died(agent)",
    ),
    Mutant(
        "a death is no proof for the holder",
        EXECUTOR,
        "[*self._receiver.died(agent), *self._sender.died(agent)]",
        "self._sender.died(agent)",
    ),
    Mutant(
        "a withdrawal is of one part",
        EXECUTOR,
        "                parts = self._open_leases.parts(key)\n",
        "                parts = self._open_leases.parts(key)[:1]\n",
    ),
    Mutant(
        "a writer forgets the nonce",
        EXECUTOR,
        "self._sender.open(part, lease.epoch, deadline, reading, lease.nonce)",
        "self._sender.open(part, lease.epoch, deadline, reading)",
    ),
    Mutant(
        "a lease for the dead is not given back",
        EXECUTOR,
        "blocks, now, lease.seconds, lease.nonce)\n            else:\n                effects.append(refused)",
        "blocks, now, lease.seconds, lease.nonce)\n            else:\n                pass",
    ),
    Mutant(
        "a loan for the dead is not given back",
        EXECUTOR,
        "blocks, self._agent.sent(agent))\n            else:\n                effects.append(refused)",
        "blocks, self._agent.sent(agent))\n            else:\n                pass",
    ),
    Mutant(
        "a writer's clock does not run",
        EXECUTOR,
        "[*self._receiver.tick(now), *self._sender.tick(now)]",
        "self._receiver.tick(now)",
    ),
    Mutant(
        "a holder's clock does not run",
        EXECUTOR,
        "[*self._receiver.tick(now), *self._sender.tick(now)]",
        "self._sender.tick(now)",
    ),
    Mutant(
        "who is asked to stop does not know whom to answer",
        EXECUTOR,
        "if sender is not None and sender.agent == agent:",
        "if sender is None:",
    ),
    Mutant(
        "a question that is lost is not asked again", UNCONFIRMED, "each.pinged = now", "each.pinged = now + 1e9"
    ),
    Mutant(
        "what waited is pushed backwards",
        UNCONFIRMED,
        "[] if found is None else found.waiting",
        "[] if found is None else found.waiting[::-1]",
    ),
    Mutant("a rank without a part of a lease has it open", OPEN, "        if parts:\n", "        if True:\n"),
    Mutant(
        "a lease is open without its parts",
        OPEN,
        "                del self._leases[key]\n",
        "                pass\n",
    ),
    Mutant(
        "a copy that failed went well",
        COPIES,
        "EndedCopy(key, push, copy.reads, copy.ok, self._digests.take(copy.digests))",
        "EndedCopy(key, push, copy.reads, True, self._digests.take(copy.digests))",
    ),
    Mutant(
        "a read is digested before it has ended",
        COPIES,
        "_Copy(transfer, None, reads=True)",
        "_Copy(transfer, self._digests.arrived(post.push.local, post.layers, None), reads=True)",
    ),
    Mutant(
        "what was to be copied is forgotten when any peer dies",
        COPIES,
        "deque(post for post in self._posts if post.key[0] != agent)",
        "deque()",
    ),
    Mutant(
        "all copies go with a peer that died",
        COPIES,
        "[each for each in self._copies if each[0][0] == agent]",
        "list(self._copies)",
    ),
    Mutant(
        "a loan is told again and again",
        PENDING,
        "        self._parts = [part for part in self._parts if part not in done]\n",
        "",
    ),
    Mutant("no message is early", EARLY, "return lease > self._granted", "return False"),
    Mutant(
        "an early message is forgotten",
        EARLY,
        "        self._messages.append((lease, agent, data))\n",
        "        pass\n",
    ),
    Mutant(
        "a rank has a part of everything",
        RANKS,
        "in pairs(ours, theirs) if from_ == self._rank",
        "in pairs(ours, theirs)",
    ),
    Mutant(
        "a push does not wait for what opens its lease",
        THREAD,
        "isinstance(first := self._held[0], _After) and first.commands > self._taken",
        "isinstance(first := self._held[0], _After) and first.commands < 0",
    ),
    Mutant(
        "messages are fetched after the commands",
        THREAD,
        "        arrived = self._agent.notifications()\n        if self._intake is None:\n"
        "            self._held += self._waiting(0.0)\n        else:\n",
        "        if self._intake is None:\n            self._held += self._waiting(0.0)\n"
        "        arrived = self._agent.notifications()\n        if self._intake is not None:\n",
    ),
    Mutant(
        "a copy under way has ended",
        AGENT,
        "                return None\n            if transfer.handle is not None:\n",
        "                return True\n            if transfer.handle is not None:\n",
    ),
    Mutant("a copy that NIXL gave up went well", AGENT, 'transfer.state == "DONE")', 'transfer.state != "PROC")'),
    Mutant(
        "the layers of a page go to its first ones",
        AGENT,
        "np.arange(layers.start, layers.stop, layers.step, dtype=np.int32)",
        "np.arange(len(layers), dtype=np.int32)",
    ),
]

"""One step's batch as a pure function of the state: continuous batching with chunked prefill under a token budget.

Order within a step: decodes first (they are what clients watch), then prefills under way, then admissions, first
come first served. A decode computes what came behind its prompt since its last step: mostly one token, more where
some were forced. Each has one at least, and what is more as far as there are free pages for it, within the budget.
Pages for a whole prompt are taken at admission, so only decodes can run out; then the
youngest sequences give way and are recomputed later from what the radix tree still has. An admission leaves one
page for each running sequence, and nothing overtakes a waiting sequence that does not fit, so none starves.

A sequence whose next page a running prefill is about to compute waits for that page; those behind it in the queue
continue. It waits only as long as the two prompts are the same, so it never loses time.

Chunked prefill in decode batches is from Sarathi-Serve (Agrawal et al., OSDI 2024).
"""

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

from kvasir_engine.core.sequence import Sequence


@dataclass(frozen=True)
class Limits:
    """`tokens`: most new tokens a step computes; `running`: most sequences at once; `page_size` in tokens."""

    tokens: int
    running: int
    page_size: int


class PageQueries(Protocol):
    """The scheduler's queries about pages, which change nothing."""

    @property
    def available(self) -> int:
        """Pages that are free or can be evicted."""
        ...

    def cost(self, sequence: Sequence) -> tuple[int, int]:
        """The cost of admitting the sequence: (available pages that it takes, tokens that are cached)."""
        ...

    def releasable(self, sequence: Sequence) -> int:
        """The number of pages that become available when the sequence releases its pages."""
        ...


@dataclass(frozen=True)
class Plan:
    """What one step does, in this order: `preempt`, `admit`, then compute `chunks` (sequence, new tokens).

    `follow` lists sequences that wait for another one's pages: (sequence, its leader, tokens they share).
    """

    preempt: tuple[Sequence, ...] = ()
    admit: tuple[Sequence, ...] = ()
    chunks: tuple[tuple[Sequence, int], ...] = ()
    follow: tuple[tuple[Sequence, Sequence, int], ...] = ()


def schedule(
    running: Seq[Sequence], waiting: Iterable[Sequence], pool: PageQueries, limits: Limits, leased: int = 0
) -> Plan:
    """Plan a step for `running` (in order of arrival) and `waiting` (in order of service). Changes nothing.

    `leased`: sequences whose prompt another worker is computing into pages here; they will run.
    """
    available, budget = pool.available, limits.tokens
    chunks: dict[Sequence, int] = {}
    preempted: dict[Sequence, None] = {}
    decodes: list[tuple[Sequence, int]] = []
    prefills: list[tuple[Sequence, int]] = []
    for sequence in running:
        remaining = sequence.remaining
        if remaining == 1 or (remaining > 1 and sequence.computed >= sequence.prompt):
            decodes.append((sequence, remaining))
        elif remaining > 1:
            prefills.append((sequence, remaining))

    size, left = limits.page_size, len(decodes)
    for sequence, remaining in decodes:
        left -= 1
        if sequence in preempted or budget == 0:
            continue
        room = len(sequence.pages) * size - sequence.computed
        if room <= 0:
            for victim in reversed(running):
                if available > 0:
                    break
                if victim in preempted or victim.arrival < sequence.arrival:
                    continue
                available += pool.releasable(victim)
                preempted[victim] = None
                budget += chunks.pop(victim, 0)
            if sequence in preempted:
                continue
            available -= 1
            room += size
        count = 1
        if remaining > 1:  # each decode behind it keeps a token and a page
            count = max(1, min(remaining, room + max(0, available - left) * size, budget - left))
            available -= max(0, -(-(count - room) // size))
        chunks[sequence] = count
        budget -= count

    for sequence, remaining in prefills:
        if sequence not in preempted and budget > 0:
            chunks[sequence] = min(remaining, budget)
            budget -= chunks[sequence]

    admitted: list[Sequence] = []
    follow: list[tuple[Sequence, Sequence, int]] = []
    # Those whose prompt's KV is not all there for others to use; its last chunk may be in flight.
    leaders = dict.fromkeys(s for s in running if s.done < len(s.tokens) - 1 and s not in preempted)
    active = len(running) - len(preempted) + leased
    for sequence in () if preempted else waiting:
        if active >= limits.running or (budget == 0 and not sequence.remote):
            break
        if sequence.leader in leaders and sequence.leader.done < sequence.shared:
            continue
        cost, cached = pool.cost(sequence)
        if not sequence.remote and (found := _leader(sequence, cached, leaders, limits.page_size)) is not None:
            follow.append((sequence, *found))
            continue
        if cost + active > available:
            break
        available -= cost
        active += 1
        admitted.append(sequence)
        if not sequence.remote:
            chunks[sequence] = min(len(sequence.tokens) - cached, budget)
            budget -= chunks[sequence]
            leaders[sequence] = None
    return Plan(tuple(preempted), tuple(admitted), tuple(chunks.items()), tuple(follow))


def _leader(
    sequence: Sequence, cached: int, leaders: Iterable[Sequence], page_size: int
) -> tuple[Sequence, int] | None:
    """The one of `leaders` that is about to compute the next page of `sequence`, and the tokens of whole pages that
    they share."""
    end = (cached // page_size + 1) * page_size
    for leader in leaders:
        last = min(sequence.reusable, len(leader.tokens))  # what comes behind has to be computed
        if leader.done < end <= last and leader.salt == sequence.salt:
            shared = 0
            while (until := shared + page_size) <= last and (
                leader.tokens[shared:until] == sequence.tokens[shared:until]
            ):
                shared = until
            if shared >= end:
                return leader, shared
    return None

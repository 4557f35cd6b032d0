"""One step's batch as a pure function of the state: continuous batching with chunked prefill under a token budget.

Order within a step: decodes first (they are what clients watch), then prefills under way, then admissions, first
come first served. Pages for a whole prompt are taken at admission, so only decodes can run out; then the
youngest sequences give way and are recomputed later from what the radix tree still has. An admission leaves one
page for each running sequence, and nothing overtakes a waiting sequence that does not fit, so none starves.

Chunked prefill in decode batches is from Sarathi-Serve (Agrawal et al., OSDI 2024).
"""

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

from kvasir_engine.scheduler.sequence import Sequence


@dataclass(frozen=True)
class Limits:
    """`tokens`: most new tokens a step computes; `running`: most sequences at once; `page_size` in tokens."""

    tokens: int
    running: int
    page_size: int


class Pool(Protocol):
    """What the scheduler asks about pages. Queries only."""

    @property
    def available(self) -> int:
        """Pages that are free or can be evicted."""
        ...

    def cost(self, sequence: Sequence) -> tuple[int, int]:
        """Admitting the sequence: (pages it would take from the available ones, tokens it finds cached)."""
        ...

    def releasable(self, sequence: Sequence) -> int:
        """Pages that become available when the sequence lets go of its pages."""
        ...


@dataclass(frozen=True)
class Plan:
    """What one step does, in this order: `preempt`, `admit`, then compute `chunks` (sequence, new tokens)."""

    preempt: tuple[Sequence, ...] = ()
    admit: tuple[Sequence, ...] = ()
    chunks: tuple[tuple[Sequence, int], ...] = ()


def schedule(
    running: Seq[Sequence], waiting: Iterable[Sequence], pool: Pool, limits: Limits, leased: int = 0
) -> Plan:
    """Plan a step for `running` (in order of arrival) and `waiting` (in order of service). Changes nothing.

    `leased`: sequences whose prompt another worker is computing into pages here; they will run.
    """
    available, budget = pool.available, limits.tokens
    chunks: dict[Sequence, int] = {}
    preempted: dict[Sequence, None] = {}
    decodes = [s for s in running if s.remaining == 1]
    prefills = [s for s in running if s.remaining > 1]

    for sequence in decodes:
        if sequence in preempted or budget == 0:
            continue
        if sequence.computed == len(sequence.pages) * limits.page_size:
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
        chunks[sequence] = 1
        budget -= 1

    for sequence in prefills:
        if sequence not in preempted and budget > 0:
            chunks[sequence] = min(sequence.remaining, budget)
            budget -= chunks[sequence]

    admitted: list[Sequence] = []
    active = len(running) - len(preempted) + leased
    for sequence in () if preempted else waiting:
        if active >= limits.running or (budget == 0 and not sequence.remote):
            break
        cost, cached = pool.cost(sequence)
        if cost + active > available:
            break
        available -= cost
        active += 1
        admitted.append(sequence)
        if not sequence.remote:
            chunks[sequence] = min(len(sequence.tokens) - cached, budget)
            budget -= chunks[sequence]
    return Plan(tuple(preempted), tuple(admitted), tuple(chunks.items()))

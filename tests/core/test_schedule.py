"""The scheduler as a function: budgets, order, preemption and fairness."""

from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from kvasir_engine.core.scheduler import Limits, schedule
from kvasir_engine.core.sequence import Sequence
from kvasir_engine.protocol import Sampling

PAGE = 4


@dataclass
class Pool:
    """So many pages; nothing is cached or shared, unless told."""

    available: int
    cached: dict[Sequence, int] = field(default_factory=dict)

    def cost(self, sequence: Sequence) -> tuple[int, int]:
        found = self.cached.get(sequence, 0)
        return -(-len(sequence.tokens) // PAGE) - found // PAGE, found

    def releasable(self, sequence: Sequence) -> int:
        return len(sequence.pages)


def waiting(length: int, arrival: int, remote: bool = False) -> Sequence:
    return Sequence(f"r{arrival}", prompt(arrival, length), Sampling(max_tokens=9), arrival, remote=remote)


def prompt(first: int, length: int) -> list[int]:
    """Prompts that begin differently for each `first`."""
    return [first, *range(1, length)]


def running(length: int, computed: int, arrival: int) -> Sequence:
    sequence = waiting(length, arrival)
    sequence.computed = sequence.done = computed
    sequence.pages = list(range(-(-max(computed, 1) // PAGE) if computed == length - 1 else -(-length // PAGE)))
    return sequence


def test_decodes_come_first_then_prefills_then_admissions_within_the_budget() -> None:
    decode, prefill, new = running(9, 8, 1), running(20, 4, 2), waiting(30, 3)
    plan = schedule([decode, prefill], [new], Pool(50), Limits(20, 8, PAGE))
    assert plan.chunks == ((decode, 1), (prefill, 16), (new, 3))
    assert plan.admit == (new,)


def test_a_prompt_that_does_not_fit_is_not_overtaken() -> None:
    big, small = waiting(40, 1), waiting(4, 2)
    assert schedule([], [big, small], Pool(9), Limits(64, 8, PAGE)).admit == ()
    assert schedule([], [big, small], Pool(12), Limits(64, 8, PAGE)).admit == (big, small)


def test_the_youngest_gives_way_when_a_decode_needs_a_page() -> None:
    old, middle, young = running(9, 8, 1), running(9, 8, 2), running(9, 8, 3)
    plan = schedule([old, middle, young], [], Pool(0), Limits(64, 8, PAGE))
    assert plan.preempt == (young,)
    assert plan.chunks == ((old, 1), (middle, 1))


def test_the_last_one_standing_preempts_itself_and_nobody_older() -> None:
    old, young = running(10, 9, 1), running(9, 8, 2)
    plan = schedule([old, young], [], Pool(0), Limits(64, 8, PAGE))
    assert plan.preempt == (young,)
    assert plan.chunks == ((old, 1),)


def test_nothing_is_admitted_in_a_step_that_preempts() -> None:
    plan = schedule([running(9, 8, 1), running(9, 8, 2)], [waiting(1, 3)], Pool(0), Limits(64, 8, PAGE))
    assert plan.preempt
    assert not plan.admit


def test_a_remote_prompt_takes_pages_and_no_budget() -> None:
    remote, local = waiting(400, 1, remote=True), waiting(8, 2)
    plan = schedule([], [remote, local], Pool(200), Limits(8, 8, PAGE))
    assert plan.admit == (remote, local)
    assert plan.chunks == ((local, 8),)


def test_leases_count_as_running() -> None:
    assert schedule([], [waiting(4, 1)], Pool(50), Limits(64, 2, PAGE), leased=2).admit == ()


def test_what_is_cached_is_not_computed() -> None:
    new = waiting(21, 1)
    plan = schedule([], [new], Pool(50, {new: 18}), Limits(64, 8, PAGE))
    assert plan.chunks == ((new, 3),)


def test_those_that_share_what_is_being_computed_wait_for_it_and_others_do_not() -> None:
    leader = running(20, 4, 0)
    follower, other, late = waiting(20, 1), waiting(20, 2), waiting(20, 3)
    follower.tokens[:16] = leader.tokens[:16]
    late.tokens[:8] = leader.tokens[:8]
    found = Pool(99, {follower: 4, late: 4})
    plan = schedule([leader], [follower, other, late], found, Limits(64, 8, PAGE))
    assert plan.admit == (other,)
    leader.computed = leader.done = 12
    found = Pool(99, {follower: 12, late: 8})
    plan = schedule([leader], [follower, late], found, Limits(64, 8, PAGE))
    assert plan.admit == (late,)
    leader.computed = leader.done = 16
    assert schedule([leader], [follower], Pool(99, {follower: 16}), Limits(64, 8, PAGE)).admit == (follower,)


def test_of_those_that_come_together_the_first_leads() -> None:
    first, second = waiting(20, 1), waiting(20, 2)
    second.tokens[:12] = first.tokens[:12]
    assert schedule([], [first, second], Pool(99), Limits(64, 8, PAGE)).admit == (first,)
    second.salt = "another tenant"
    assert schedule([], [first, second], Pool(99), Limits(64, 8, PAGE)).admit == (first, second)


@st.composite
def states(draw: st.DrawFn) -> tuple[list[Sequence], list[Sequence], int, Limits]:
    arrival = iter(range(100))
    active = []
    for _ in range(draw(st.integers(0, 6))):
        length = draw(st.integers(1, 40))
        active.append(
            running(length, draw(st.sampled_from([length - 1, draw(st.integers(0, length - 1))])), next(arrival))
        )
    queue = [
        waiting(draw(st.integers(1, 40)), next(arrival), draw(st.booleans()))
        for _ in range(draw(st.integers(0, 6)))
    ]
    return active, queue, draw(st.integers(0, 30)), Limits(draw(st.integers(8, 64)), draw(st.integers(1, 8)), PAGE)


@given(states())
def test_a_plan_can_always_be_carried_out(state: tuple[list[Sequence], list[Sequence], int, Limits]) -> None:
    active, queue, available, limits = state
    plan = schedule(active, queue, Pool(available), limits)
    chunks = dict(plan.chunks)
    assert len(chunks) == len(plan.chunks)
    assert sum(chunks.values()) <= limits.tokens
    assert all(0 < count <= s.remaining for s, count in chunks.items())
    assert not set(plan.preempt) & set(chunks)
    assert list(plan.admit) == queue[: len(plan.admit)]
    pages = available + sum(len(s.pages) for s in plan.preempt)
    pages -= sum(s.computed == len(s.pages) * PAGE for s in chunks if s in active)
    pages -= sum(-(-len(s.tokens) // PAGE) for s in plan.admit)
    assert pages >= 0
    kept = [s for s in active if s not in plan.preempt]
    assert kept == active[: len(kept)], "an older sequence gave way to a younger one"
    assert plan.chunks or not active or (available == 0 and len(active) == 1), (
        "sequences run and nothing was planned"
    )


def test_what_follows_is_found_out_once_and_then_waits_for_all_that_is_shared() -> None:
    leader, follower = running(20, 4, 0), waiting(20, 1)
    follower.tokens[:16] = leader.tokens[:16]
    plan = schedule([leader], [follower], Pool(99, {follower: 4}), Limits(64, 8, PAGE))
    assert plan.follow == ((follower, leader, 16),)
    follower.leader, follower.shared = leader, 16
    asked: list[Sequence] = []
    pool = Pool(99, {follower: 12})
    found = pool.cost
    pool.cost = lambda sequence: asked.append(sequence) or found(sequence)  # type: ignore[method-assign, func-returns-value]
    leader.computed = leader.done = 12
    plan = schedule([leader], [follower], pool, Limits(64, 8, PAGE))
    assert (plan.admit, plan.follow, asked) == ((), (), [])
    assert schedule([], [follower], pool, Limits(64, 8, PAGE)).admit == (follower,), "its leader is gone"


def test_the_last_token_is_never_waited_for() -> None:
    leader, follower = running(16, 4, 0), waiting(16, 1)
    follower.tokens[:] = leader.tokens
    plan = schedule([leader], [follower], Pool(99, {follower: 4}), Limits(64, 8, PAGE))
    assert plan.follow == ((follower, leader, 12),)


def grown(length: int, computed: int, arrival: int, pages: int) -> Sequence:
    """A sequence whose prompt is computed, with tokens behind it that are not."""
    sequence = running(length, computed, arrival)
    sequence.prompt, sequence.pages = computed, list(range(pages))
    return sequence


def test_a_decode_computes_all_that_came_behind_its_prompt_and_takes_pages_for_it() -> None:
    forced, after = grown(30, 7, 1, 2), running(9, 8, 2)
    plan = schedule([forced, after], [waiting(4, 3)], Pool(8), Limits(64, 8, PAGE))
    assert plan.chunks[:2] == ((forced, 23), (after, 1))
    assert plan.admit == ()  # 6 pages for the first, one for the second, and one is left for two that run


def test_what_is_forced_leaves_each_other_decode_its_token() -> None:
    forced, decodes = grown(60, 7, 1, 2), [running(8, 7, n) for n in range(2, 6)]
    plan = schedule([forced, *decodes], [], Pool(50), Limits(10, 8, PAGE))
    assert plan.chunks == ((forced, 6), *((each, 1) for each in decodes))


def test_nobody_gives_way_for_more_than_one_token() -> None:
    forced, young = grown(30, 7, 1, 2), running(9, 8, 2)
    plan = schedule([forced, young], [], Pool(2), Limits(64, 8, PAGE))
    assert (plan.preempt, plan.chunks) == ((), ((forced, 5), (young, 1)))
    forced.computed = 8
    plan = schedule([forced, young], [], Pool(1), Limits(64, 8, PAGE))
    assert (plan.preempt, plan.chunks) == ((young,), ((forced, 4),))  # as for one token: there is one page


def test_a_constrained_sequence_waits_for_its_token_and_others_do_not() -> None:
    constrained, free = running(9, 8, 1), running(9, 8, 2)
    for each in (constrained, free):
        each.awaited, each.computed = 1, 9
        each.pages = list(range(3))
    constrained.constraint = object()  # type: ignore[assignment]
    assert schedule([constrained, free], [], Pool(9), Limits(64, 8, PAGE)).chunks == ((free, 1),)

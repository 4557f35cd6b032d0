"""Results that lag one step: the same tokens as without, and no page out of a step's hands before it has ended."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pair import PROMPT, Pair
from simulation import Network, Worker
from toy import LateRunner, reference

from kvasir_engine.core.engine import Engine
from kvasir_engine.core.engine_thread import EngineThread
from kvasir_engine.core.inflight_steps import InflightStep, InflightSteps
from kvasir_engine.core.kv_cache_manager import KVCacheManager
from kvasir_engine.core.scheduler import Limits
from kvasir_engine.core.sequence import Sequence
from kvasir_engine.executor.step import FinishedStep
from kvasir_engine.kv.pages import Owner
from kvasir_engine.protocol import Delta, Sampling, Submit
from kvasir_engine.sampling.sampler import Sampled

LIMITS = Limits(tokens=12, running=4, page_size=4)
STOP = 7


def engine_of(pages: int = 12, limits: Limits = LIMITS, overlap: bool = True) -> Engine:
    return Worker(Network(), "both", "b", pages, limits, overlap).engine


def submit(engine: Engine, request: str, prompt: list[int], **sampling: object) -> None:
    engine.submit(1, Submit(request, prompt, Sampling(**{"max_tokens": 4, **sampling})))  # type: ignore[arg-type]


def collect(engine: Engine, tokens: dict[str, list[int]], finished: dict[str, str]) -> None:
    for delta in engine.drain().get(1, []):
        assert isinstance(delta, Delta)
        assert delta.failure is None, delta.failure
        assert delta.index == len(tokens.setdefault(delta.id, [])), "a token twice, or one left out"
        tokens[delta.id] += delta.tokens
        if delta.finish is not None:
            assert delta.id not in finished
            finished[delta.id] = delta.finish


def test_a_step_is_launched_before_the_one_before_it_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, events, tokens = engine_of(), [], {}
    launch = engine.runner.launch

    def noted(*args: object) -> object:
        events.append(f"launch {len(events)}")
        step = launch(*args)  # type: ignore[arg-type]
        wait = step.wait
        monkeypatch.setattr(step, "wait", lambda: (events.append("wait"), wait())[1])
        return step

    monkeypatch.setattr(engine.runner, "launch", noted)
    submit(engine, "a", PROMPT, max_tokens=3)
    while engine.busy:
        engine.step()
        collect(engine, tokens, {})
    assert [event.split()[0] for event in events] == ["launch", "launch", "wait", "launch", "wait", "wait"]
    assert tokens["a"] == reference(PROMPT, 3)


def test_a_sequence_that_must_end_is_not_computed_further() -> None:
    engine = engine_of()
    submit(engine, "a", PROMPT, max_tokens=3)
    while engine.busy:
        engine.step()
    assert engine.runner.computed == len(PROMPT) + 2  # type: ignore[attr-defined]


def test_what_a_step_in_flight_computes_is_waited_for_and_not_computed_again() -> None:
    engine = engine_of()
    submit(engine, "a", PROMPT, max_tokens=2)
    engine.step()  # all of the prompt is in flight
    submit(engine, "b", PROMPT, max_tokens=2)
    while engine.busy:
        engine.step()
    shared = len(PROMPT) // LIMITS.page_size * LIMITS.page_size
    assert engine.runner.computed == len(PROMPT) + 1 + len(PROMPT) - shared + 1  # type: ignore[attr-defined]


def test_the_token_after_a_stop_is_nobodys_and_its_pages_stay_until_its_step_has_ended() -> None:
    prompt = next(p for p in ([n, 2, 3] for n in range(50)) if len(set(reference(p, 3))) == 3)
    stop, tokens, finished = reference(prompt, 3)[1], {}, {}
    engine = engine_of()
    submit(engine, "a", prompt, max_tokens=9, stop_token_ids=[stop])
    while not finished:
        engine.step()
        engine.check()
        collect(engine, tokens, finished)
    assert (tokens["a"], finished["a"]) == (reference(prompt, 3)[:2], "stop")
    assert not engine.jobs
    assert engine.cache.pool.count(Owner.HELD) > 0, "the pages of a step in flight were let go of"
    assert engine.busy
    engine.step()
    collect(engine, tokens, finished)
    assert engine.cache.pool.count(Owner.HELD) == 0
    assert tokens["a"] == reference(prompt, 3)[:2]
    assert not engine.busy


def test_what_an_aborted_request_leaves_to_a_step_cannot_be_leased_before_it_has_ended() -> None:
    engine = engine_of(pages=4)
    submit(engine, "a", PROMPT, max_tokens=5)
    engine.step()  # three pages, in flight
    engine.abort(1, "a")
    engine.check()
    assert engine.cache.pool.available == 1
    submit(engine, "b", PROMPT[::-1])
    engine.step()
    assert engine.running == [] or engine.running[0].id != "b" or engine.cache.pool.available == 1
    tokens: dict[str, list[int]] = {}
    while engine.busy:
        engine.step()
        engine.check()
        collect(engine, tokens, {})
    assert tokens == {"b": reference(PROMPT[::-1], 4)}
    assert engine.cache.pool.available == 4


def sequence(tokens: list[int], arrival: int = 0) -> Sequence:
    return Sequence(f"s{arrival}", tokens, Sampling(max_tokens=1), arrival)


def cached(pages: int, tokens: list[int]) -> tuple[KVCacheManager, list[tuple[int, int]]]:
    """A cache of pages of four tokens that has computed `tokens`, and what it copies from now on."""
    copies: list[tuple[int, int]] = []
    cache = KVCacheManager(pages, 4, lambda source, target: copies.append((source, target)))
    if tokens:
        first = sequence(tokens)
        cache.admit(first)
        first.computed = first.done = len(tokens)
        cache.tree.release(cache.detach(first, keep=True))
    return cache, copies


def flown(cache: KVCacheManager, *sequences: Sequence) -> InflightSteps:
    """A step with all tokens of these, in flight."""
    inflight = InflightSteps(cache)
    chunks = [(each, len(each.tokens) - each.computed) for each in sequences]
    inflight.add(InflightStep(chunks, {}, FinishedStep(Sampled([], [])), None))
    for each in sequences:
        each.computed = len(each.tokens)
    return inflight


def test_a_page_that_is_copied_to_stays_until_a_step_after_the_copy_has_ended() -> None:
    """The device copies when it comes to it: leased before, the page could be overwritten after its writer."""
    cache, copies = cached(8, [1, 2, 3, 4, 5, 6, 7])
    second = sequence([1, 2, 3, 4, 5, 6, 9, 9], 1)
    cache.admit(second)
    ((source, target),) = copies
    cache.tree.release(cache.detach(second, keep=False))  # aborted before a step was launched
    assert cache.pool.owner(source) is cache.pool.owner(target) is Owner.HELD
    for pages in cache.take_copying():
        cache.tree.release(pages)
    assert cache.pool.owner(source) is Owner.CACHED
    assert cache.pool.owner(target) is Owner.FREE


def test_a_page_that_is_copied_from_stays_until_the_step_has_ended() -> None:
    """Evicted and leased before, it could be overwritten before the device has copied from it."""
    cache, copies = cached(8, [1, 2, 3, 4, 5, 6, 7])
    second = sequence([1, 2, 3, 4, 5, 6, 9, 9], 1)
    cache.admit(second)
    ((source, _),) = copies
    inflight = flown(cache, second)
    assert cache.pool.owner(source) is Owner.HELD
    inflight.ended()
    assert cache.pool.owner(source) is Owner.CACHED


def test_what_a_request_leaves_is_shared_as_far_as_it_is_computed() -> None:
    """The step that computes its last token is in flight: whoever found that token cached would read nothing."""
    cache, _ = cached(8, [])
    ending = sequence([1, 2, 3, 4, 5, 6, 7, 8])
    cache.admit(ending)
    ending.done = 7
    inflight = flown(cache, ending)
    cache.tree.release(inflight.detach(ending, keep=True))
    inflight.ended()
    assert cache.tree.match([1, 2, 3, 4, 5, 6, 7, 8], "").tokens(4) == 7


def test_a_page_that_is_given_in_exchange_stays_until_the_step_that_reads_it_has_ended() -> None:
    """Two have computed the same prompt beside each other, and one's pages are shared first."""
    cache, _ = cached(8, [])
    first, second = sequence([1, 2, 3, 4, 5]), sequence([1, 2, 3, 4, 6], 1)
    for each in (first, second):
        cache.admit(each)
        each.computed = each.done = 4
    inflight = flown(cache, first, second)
    own = second.pages[0]
    inflight.share(first)
    inflight.share(second)
    assert second.pages[0] == first.pages[0] != own
    assert cache.pool.owner(own) is Owner.HELD
    inflight.ended()
    assert cache.pool.owner(own) is Owner.FREE


def test_steps_that_are_dropped_hold_nothing_any_more() -> None:
    cache, _ = cached(8, [])
    aborted = sequence([1, 2, 3, 4, 5])
    cache.admit(aborted)
    inflight = flown(cache, aborted)
    cache.tree.release(inflight.detach(aborted, keep=False))
    assert cache.pool.count(Owner.HELD) == 2
    inflight.drop()
    assert cache.pool.count(Owner.FREE) == 8


def test_a_step_that_fails_late_fails_its_requests_and_lets_go_of_all_pages(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = engine_of()
    thread = EngineThread(engine)  # not started: the test takes its steps
    submit(engine, "a", PROMPT)
    assert thread._step()
    with monkeypatch.context() as patch:

        def fault() -> None:
            raise RuntimeError("a test's fault")

        assert isinstance(engine.runner, LateRunner)
        queue = engine.runner.queue
        queue[0] = fault
        patch.setattr(engine.inflight.oldest.step, "wait", fault)
        assert thread._step()
    queue.clear()
    (failure,) = engine.drain()[1]
    assert isinstance(failure, Delta)
    assert failure.failure is not None
    engine.check()
    assert not engine.jobs
    assert engine.cache.pool.count(Owner.HELD) == 0


def test_a_handoffs_pages_go_only_when_they_are_computed() -> None:
    pair = Pair(overlap=True)
    lease = pair.lease("a", PROMPT)
    pair.submit("a", PROMPT, lease)
    pair.prefill.engine.step()
    pair.prefill.run_commands()
    assert pair.prefill.writes == []  # launched and not computed
    pair.run()
    assert pair.tokens_of("a") == reference(PROMPT, 3)
    assert pair.is_idle()


def test_the_time_between_steps_is_counted_while_there_is_work() -> None:
    now = [0.0]
    engine = engine_of(overlap=False)
    engine.requests.clock = lambda: now[0]
    submit(engine, "a", PROMPT, max_tokens=3)
    now[0] = 100.0  # nothing has run yet: that is no idle time between steps
    for _ in range(3):
        engine.step()
        now[0] += 0.25
    assert engine.stats.idle_seconds == pytest.approx(0.5)
    now[0] += 50.0  # nothing to do
    submit(engine, "b", PROMPT, max_tokens=1)
    engine.step()
    assert engine.stats.idle_seconds == pytest.approx(0.5)


def test_with_a_step_in_flight_there_is_no_time_between_steps_but_the_devices_own() -> None:
    now = [0.0]
    engine = engine_of()
    engine.requests.clock = lambda: now[0]
    submit(engine, "a", PROMPT, max_tokens=4)
    for _ in range(3):
        engine.step()
        now[0] += 1.0
    assert engine.stats.idle_seconds == 0.0
    engine.inflight.oldest.step.gap = 0.125  # type: ignore[misc]
    while engine.busy:
        engine.step()
    assert engine.stats.idle_seconds == 0.125


@example([([1], 4, [], 0, 0), ([1], 6, [1], 0, 0)], {}, 6)
@example([([1], 4, [], 0, 0), ([1], 6, [1], 0, 1), ([1, 1], 1, [], 0, 6)], {}, 6)
@settings(max_examples=60, deadline=None)
@given(
    requests=st.lists(
        st.tuples(
            st.lists(st.integers(0, 2), min_size=1, max_size=14),
            st.integers(1, 8),
            st.lists(st.integers(0, 49), max_size=20),
            st.integers(0, 3),
            st.integers(0, 6),
        ),
        min_size=1,
        max_size=6,
    ),
    aborted=st.dictionaries(st.integers(0, 5), st.integers(1, 6), max_size=2),
    pages=st.integers(6, 12),
)
def test_tokens_and_reasons_are_those_of_the_synchronous_engine(
    requests: list[tuple[list[int], int, list[int], int, int]], aborted: dict[int, int], pages: int
) -> None:
    """Stops, lengths, shared prefixes, preemption and clients that go away."""
    outcomes = []
    for overlap in (False, True):
        engine = engine_of(pages, overlap=overlap)
        tokens: dict[str, list[int]] = {}
        finished: dict[str, str] = {}
        steps = 0
        while steps < 8 or engine.busy:
            for i, (prompt, count, stops, least, when) in enumerate(requests):
                if when == steps:
                    submit(
                        engine, f"r{i}", sorted(prompt), max_tokens=count, stop_token_ids=stops, min_tokens=least
                    )
                if aborted.get(i) == steps - when:
                    engine.abort(1, f"r{i}")
            engine.step()
            engine.check()
            collect(engine, tokens, finished)
            steps += 1
            assert steps < 300, "it hangs"
        assert engine.cache.pool.available == pages
        outcomes.append((tokens, finished))
    (right, why), (ours, our_why) = outcomes
    for i, (prompt, count, stops, least, _) in enumerate(requests):
        whole = reference(sorted(prompt), count)
        end = next((n for n, token in enumerate(whole, 1) if token in stops), count)
        for tokens, finished in outcomes:
            some = tokens.get(f"r{i}", [])
            if least == 0:  # with more, a stop token that is impossible makes another continuation
                assert some == whole[: len(some)]
                assert f"r{i}" not in finished or len(some) == end
        if i not in aborted:
            assert ours[f"r{i}"] == right[f"r{i}"]
            assert our_why[f"r{i}"] == why[f"r{i}"]

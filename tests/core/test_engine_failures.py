"""A step that raises fails its requests by name, and neither the engine nor a page is lost."""

import queue
import time
from collections.abc import Iterator

import pytest
from simulation import Network, Worker
from toy import reference

from kvasir_engine.core.engine import Engine
from kvasir_engine.core.engine_thread import FENCED_SECONDS, EngineThread, FenceWatch
from kvasir_engine.core.scheduler import Limits
from kvasir_engine.kv.pages import Owner
from kvasir_engine.protocol import Delta, LogitsProcessors, Sampling, Step, Submit, ToRouter

LIMITS = Limits(tokens=12, running=4, page_size=4)


@pytest.fixture
def engine() -> Engine:
    return Worker(Network(), "both", "b", 12, LIMITS).engine


def run(engine: Engine, request: str, prompt: list[int], count: int) -> list[int]:
    engine.submit(1, Submit(request, prompt, Sampling(max_tokens=count)))
    tokens: list[int] = []
    while engine.jobs:
        engine.step()
        for frame in engine.drain().get(1, []):
            assert isinstance(frame, Delta)
            assert frame.failure is None, frame.failure
            tokens += frame.tokens
    return tokens


@pytest.mark.parametrize("broken", ["forward", "_copy_page"])
def test_a_step_that_raises_fails_its_requests_and_no_others(
    engine: Engine, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    thread = EngineThread(engine)  # not started: the test takes its steps
    run(engine, "cached", [1, 2, 3, 4, 5, 6, 7], 2)

    def fault(*_: object) -> None:
        raise RuntimeError("a test's fault")

    engine.submit(1, Submit("victim", [1, 2, 3, 4, 5, 6, 9], Sampling(max_tokens=2)))
    with monkeypatch.context() as patch:
        patch.setattr(*((engine.runner, "forward") if broken == "forward" else (engine.cache, "_copy")), fault)
        assert thread._step()
    (failure,) = engine.drain()[1]
    assert isinstance(failure, Delta)
    assert failure.failure is not None
    assert failure.failure.code == "internal_error"
    engine.check()
    assert not engine.jobs
    assert engine.cache.pool.count(Owner.HELD) == 0
    assert run(engine, "next", [1, 2, 3, 4, 5, 6, 9], 3) == reference([1, 2, 3, 4, 5, 6, 9], 3)


def test_a_dead_transfer_thread_makes_the_worker_unhealthy(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker(Network(), "decode", "d", 12, LIMITS)
    monkeypatch.setattr(worker.thread, "is_alive", lambda: False)
    thread = EngineThread(worker.engine)
    thread.start()
    try:
        assert thread.unhealthy_reason() == "the transfer thread is gone"
    finally:
        thread.stop()


@pytest.mark.parametrize("checked", [False, True])
def test_a_lost_page_is_found_at_the_next_step_where_pages_are_checked(engine: Engine, checked: bool) -> None:
    thread = EngineThread(engine, check_pages=checked)
    thread.start()
    try:
        batches: queue.SimpleQueue[list[ToRouter]] = queue.SimpleQueue()
        session = thread.attach(batches.put)
        thread.post(lambda engine: engine.cache.pool.hold(engine.cache.pool.take(1)))  # nobody's
        if checked:
            thread.join(60)
            assert thread.unhealthy_reason() == "the engine's thread is gone"
        else:
            thread.post(lambda engine: engine.submit(session, Submit("r", [1, 2], Sampling(max_tokens=1))))
            while not any(isinstance(frame, Step) and frame.deltas for frame in batches.get(timeout=60)):
                pass
            assert thread.unhealthy_reason() is None
    finally:
        thread.stop()


def test_a_pool_whose_fences_do_not_go_is_unhealthy_and_a_burst_of_them_is_not() -> None:
    watch = FenceWatch(100)
    assert not watch.stuck(26, 0.0)
    assert not watch.stuck(26, FENCED_SECONDS - 1)
    assert not watch.stuck(25, FENCED_SECONDS)  # some came back
    assert not watch.stuck(100, FENCED_SECONDS + 1)
    assert watch.stuck(26, 2 * FENCED_SECONDS + 1)
    assert not watch.stuck(0, 2 * FENCED_SECONDS + 2)


def test_a_worker_whose_fences_do_not_go_says_so(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    thread = EngineThread(engine)
    thread.start()
    try:
        pool = engine.cache.pool
        pool.fence(pool.lease(5, 1), 1)
        now = time.monotonic()
        assert thread.unhealthy_reason() is None
        monkeypatch.setattr("kvasir_engine.core.engine_thread.time.monotonic", lambda: now + FENCED_SECONDS + 1)
        assert thread.unhealthy_reason() == "5 pages wait for proof that their writers have stopped"
    finally:
        thread.stop()


BAD: list[tuple[str, list[int], Sampling, str]] = [
    ("no tokens", [], Sampling(max_tokens=1), "bad_request"),
    ("a token beyond the vocabulary", [1, 50], Sampling(max_tokens=1), "bad_request"),
    ("a negative token", [-1], Sampling(max_tokens=1), "bad_request"),
    ("nothing to generate", [1], Sampling(max_tokens=0), "bad_request"),
    (
        "more replayed than there are",
        [1, 2],
        Sampling(max_tokens=1, processors=LogitsProcessors(replayed=2)),
        "bad_request",
    ),
    (
        "a bias of no token",
        [1],
        Sampling(max_tokens=1, processors=LogitsProcessors(logit_bias=[(50, 1.0)])),
        "bad_request",
    ),
    ("a prompt as long as the context", [1] * 64, Sampling(max_tokens=1), "context_length_exceeded"),
]


@pytest.mark.parametrize(("what", "tokens", "sampling", "code"), BAD, ids=[case[0] for case in BAD])
def test_a_bad_request_is_refused_by_name(
    engine: Engine, what: str, tokens: list[int], sampling: Sampling, code: str
) -> None:
    engine.submit(1, Submit("bad", tokens, sampling))
    (answer,) = engine.drain()[1]
    assert isinstance(answer, Delta)
    assert answer.failure is not None
    assert answer.failure.code == code
    assert not engine.jobs


def test_preempted_sequences_come_back_and_say_the_same(engine: Engine) -> None:
    prompts = {f"r{n}": [n, n + 1, n, n, n + 1, n, n] for n in range(4)}
    for request, prompt in prompts.items():
        engine.submit(1, Submit(request, prompt, Sampling(max_tokens=14)))
    tokens: dict[str, list[int]] = {request: [] for request in prompts}
    for request, new in steps(engine):
        tokens[request] += new
    assert engine.stats.preemptions > 0
    assert tokens == {request: reference(prompt, 14) for request, prompt in prompts.items()}


def steps(engine: Engine) -> Iterator[tuple[str, list[int]]]:
    while engine.jobs:
        engine.step()
        engine.check()
        for frame in engine.drain().get(1, []):
            assert isinstance(frame, Delta)
            yield frame.id, frame.tokens

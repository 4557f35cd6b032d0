"""Faults that other engines had, each as the schedule that showed it, under its name there."""

import itertools
import queue
from collections.abc import Callable

import msgspec
import pytest
import torch
from pair import OTHER, PROMPT, ROUTER, Pair
from simulation import Network, Worker
from toy import reference

from kvasir_engine.connector import notifications
from kvasir_engine.core.engine_thread import EngineThread
from kvasir_engine.core.leases import LEASE_SECONDS
from kvasir_engine.core.scheduler import Limits
from kvasir_engine.forward_batch import ForwardBatch
from kvasir_engine.kv.pages import Owner
from kvasir_engine.protocol import Sampling, Step, Submit, ToRouter

LIMITS = Limits(tokens=12, running=4, page_size=4)
ANOTHER = [8, 8, 2, 8, 8, 1, 8, 8, 8, 0]


@pytest.fixture
def pair() -> Pair:
    return Pair()


def connector(pair: Pair, request: str, prompt: list[int]) -> list[int]:
    """A whole handoff: its pages, and its tokens are checked."""
    lease = pair.lease(request, prompt)
    pair.submit(request, prompt, lease)
    pair.run()
    assert pair.tokens_of(request) == reference(prompt, 3)
    return lease.pages


def test_vllm_52234_kv_of_an_aborted_request_is_not_in_the_next_ones_answer() -> None:
    pair = Pair(decode_pages=6)
    aborted = pair.begin("aborted", PROMPT)
    pair.decode.engine.abort(ROUTER, "aborted")
    late = pair.prefill.writes
    lease = pair.lease("next", ANOTHER)
    assert not set(lease.pages) & set(aborted.pages)
    pair.submit("next", ANOTHER, lease)
    assert late
    pair.run()  # the late writes end among the next request's
    assert pair.tokens_of("next") == reference(ANOTHER, 3)
    assert pair.is_idle()


def test_sglang_24527_a_write_that_is_late_meets_no_reallocated_page(pair: Pair) -> None:
    expired = pair.begin("late", PROMPT)
    pair.network.wait(LEASE_SECONDS)
    pair.decode.take_events()
    pool = pair.decode.engine.cache.pool
    assert {pool.owner(page) for page in expired.pages} == {Owner.FENCED}
    leases = {f"next{n}": pair.lease(f"next{n}", [n, *ANOTHER]) for n in range(2)}  # all that can be had
    assert not {page for lease in leases.values() for page in lease.pages} & set(expired.pages)
    for n, (request, lease) in enumerate(leases.items()):
        pair.submit(request, [n, *ANOTHER], lease)
    assert pair.prefill.writes
    pair.run()  # the late write ends first
    for n, request in enumerate(leases):
        assert pair.tokens_of(request) == reference([n, *ANOTHER], 3)
    assert pair.failures["late"][0] == "lease_expired"
    assert pair.is_idle()


@pytest.mark.parametrize("issue", ["sglang 17259", "sglang 22716"])
def test_sglang_17259_and_22716_what_one_request_is_told_is_never_taken_by_another(issue: str, pair: Pair) -> None:
    mine, theirs = pair.lease("same", PROMPT), pair.lease("same", ANOTHER, session=OTHER)
    assert mine.id != theirs.id
    if issue == "sglang 17259":  # both at once, and the messages of the second come first
        pair.submit("same", PROMPT, mine)
        pair.submit("same", ANOTHER, theirs, session=OTHER)
        pair.prefill.engine.step()
        pair.confirm()
        while pair.prefill.writes:
            pair.prefill.end_write(len(pair.prefill.writes) - 1)
    else:  # a slot is used again while a message for its first user is on its way
        pair.submit("same", ANOTHER, theirs, session=OTHER)
        pair.decode.engine.abort(OTHER, "same")
        pair.submit("same", PROMPT, mine)
    pair.run()
    assert pair.tokens_of("same") == reference(PROMPT, 3)
    assert pair.is_idle()


def test_sglang_22716_a_message_for_an_earlier_life_of_decode_is_refused_by_its_epoch(pair: Pair) -> None:
    lease = pair.begin("r", PROMPT)
    while pair.prefill.writes:
        pair.prefill.end_write()
    (complete,) = [m for m in pair.network.messages(pair.decode) if isinstance(m, notifications.Complete)]
    reborn = Pair()
    again = reborn.lease("other", ANOTHER)
    assert again.id == lease.id
    stale = msgspec.structs.replace(complete, epoch=complete.epoch - 1)
    reborn.network.wire.forge(reborn.prefill.agent, reborn.decode.agent, notifications.encode(stale))
    reborn.decode.receive()
    reborn.decode.take_events()
    assert reborn.decode.engine.stats.rejected_messages == 1
    assert {reborn.decode.engine.cache.pool.owner(page) for page in again.pages} == {Owner.LEASED}
    reborn.submit("other", ANOTHER, again)
    reborn.run()
    assert reborn.tokens_of("other") == reference(ANOTHER, 3)


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
def test_sglang_30233_an_aborted_prefill_leaves_no_garbage_for_the_next_of_its_prefix(steps: int) -> None:
    pair, long = Pair(limits=Limits(tokens=5, running=4, page_size=4)), [*PROMPT, *ANOTHER]
    pair.submit("aborted", long, pair.lease("aborted", long))
    for _ in range(steps):
        pair.prefill.engine.step()
    for worker in (pair.prefill, pair.decode):
        worker.engine.abort(ROUTER, "aborted")
        worker.check()
    connector(pair, "next", long)
    connector(pair, "again", [*long[:13], 4, 4, 4])
    assert pair.is_idle()


def test_vllm_46283_pages_of_an_abort_before_the_prompt_is_sent_come_back_at_once(pair: Pair) -> None:
    pair.lease("r", PROMPT)
    pair.decode.engine.abort(ROUTER, "r")
    pair.deliver()  # no clock runs
    assert pair.is_idle()


@pytest.mark.parametrize("gone", ["aborted", "dead"])
def test_vllm_41269_a_prompts_pages_at_prefill_do_not_wait_for_a_decode_that_will_not_come(gone: str) -> None:
    pair = Pair()
    pair.begin("r", PROMPT)
    assert pair.prefill.engine.cache.pool.count(Owner.HELD) == 3
    if gone == "dead":
        pair.network.kill(pair.decode)
        pair.prefill.take_events()
        pair.prefill.check()
    else:
        pair.decode.engine.abort(ROUTER, "r")
        pair.deliver()
        assert pair.is_idle()
    assert pair.prefill.engine.cache.pool.count(Owner.HELD) == 0
    assert not pair.prefill.engine.unfinished


def test_sglangs_release_after_30_s_no_time_is_long_enough_to_reuse_what_may_be_written(pair: Pair) -> None:
    lease = pair.begin("r", PROMPT)
    pair.decode.engine.abort(ROUTER, "r")
    pool = pair.decode.engine.cache.pool
    for _ in range(100):
        pair.network.now += 31.0
        pair.decode.tick()
        pair.decode.run_commands()
        pair.decode.take_events()
        assert {pool.owner(page) for page in lease.pages} == {Owner.FENCED}
    pair.deliver()  # the writer has stopped, and says so
    assert pair.is_idle()


@pytest.mark.parametrize("steps", range(1, 7))
def test_mini_sglangs_schedule_an_abort_between_launch_and_result_leaves_no_page_free_and_cached(
    steps: int,
) -> None:
    engine = Worker(Network(), "both", "b", 12, LIMITS).engine
    thread, frames = EngineThread(engine, check_pages=True), queue.SimpleQueue[list[ToRouter]]()
    session = thread.attach(frames.put)
    compute, launches = engine.runner.forward, itertools.count(1)

    def forward(batch: ForwardBatch, on_layer: Callable[[int], None] | None = None) -> torch.Tensor:
        if next(launches) == steps:  # the abort comes while the batch is computed
            thread.post(lambda engine: engine.abort(session, "victim"))
        return compute(batch, on_layer)

    engine.runner.forward = forward  # type: ignore[method-assign]
    for request, prompt, count in (("victim", PROMPT, 9), ("other", [*PROMPT[:5], 2, 2], 6)):
        submit = Submit(request, prompt, Sampling(max_tokens=count))
        thread.post(lambda engine, submit=submit: engine.submit(session, submit))
    thread.start()
    try:
        tokens: list[int] = []
        while len(tokens) < 6:
            for step in frames.get(timeout=60):
                for delta in step.deltas if isinstance(step, Step) else []:
                    tokens += delta.tokens if delta.id == "other" else []
        assert tokens == reference([*PROMPT[:5], 2, 2], 6)
    finally:
        thread.stop()
    engine.check()
    assert next(launches) > steps
    assert not engine.jobs
    pool = engine.cache.pool
    assert pool.count(Owner.HELD) == 0
    assert pool.available == pool.size

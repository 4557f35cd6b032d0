"""The handoff's router side, and streams that do not break, against workers on real sockets."""

import asyncio
from collections.abc import Callable

import pytest
from fake_worker import (
    PAGE,
    Die,
    Fabric,
    Fail,
    FakeWorker,
    Moment,
    always,
    cluster,
    continuation,
    next_token,
    once,
    request,
)
from prometheus_client import generate_latest

from kvasir_engine.engine_client import EngineError
from kvasir_engine.kv.hashing import page_hashes
from kvasir_engine.protocol import CacheEvent, CacheEvents, Load, Reserve, Resync, Submit

PROMPT = list(range(100, 140))


def pairs(prefills: int = 2, decodes: int = 2) -> tuple[list[FakeWorker], list[FakeWorker]]:
    fabric = Fabric()
    return (
        [FakeWorker("prefill", fabric, f"p{n}") for n in range(prefills)],
        [FakeWorker("decode", fabric, f"d{n}") for n in range(decodes)],
    )


@pytest.mark.parametrize("batch", [1, 3])
async def test_a_prompt_goes_through_both_workers_and_every_token_comes_once(batch: int) -> None:
    (p,), (d,) = pairs(1, 1)
    d.batch = batch
    async with cluster(p, d) as running:
        outputs = [output async for output in running.client.generate(request(PROMPT, 10, logprobs=0))]
        await running.until(lambda: not p.live and not d.live)
    tokens = [token for output in outputs for token in output.tokens]
    assert tokens == continuation(PROMPT, 10)
    assert [one.logprob for output in outputs for one in output.logprobs or []] == [
        -float(token) for token in tokens
    ]
    assert outputs[-1].finish_reason == "length"
    assert outputs[0].cached_tokens == PAGE
    (reserve,) = [frame for frame in d.frames if isinstance(frame, Reserve)]
    (submit,) = [frame for frame in p.frames if isinstance(frame, Submit)]
    assert reserve.writer.agent == "p0"
    assert submit.to is not None
    assert submit.to.agent == "d0"
    assert submit.lease is not None
    assert d.aborted == p.aborted == []


@pytest.mark.parametrize("role", ["decode", "both"])
async def test_without_a_prefill_worker_the_decode_worker_does_it_all(role: str) -> None:
    d = FakeWorker(role, Fabric())  # type: ignore[arg-type]
    async with cluster(d) as running:
        assert await running.generate(PROMPT, 10) == continuation(PROMPT, 10)
    assert [type(frame) for frame in d.frames if isinstance(frame, Submit | Reserve)] == [Submit]


async def test_a_short_remainder_skips_prefill() -> None:
    (p,), (d,) = pairs(1, 1)
    d.cached = PROMPT[:32]
    async with cluster(p, d, threshold=16) as running:
        await running.until(
            lambda: (
                bool(running.pool.ready()) and all(len(w.prefixes) for w in running.pool.ready() if w.name == "d0")
            )
        )
        assert await running.generate(PROMPT, 5) == continuation(PROMPT, 5)
        assert await running.generate(PROMPT[::-1], 5) == continuation(PROMPT[::-1], 5)
    assert [type(frame) for frame in d.frames if isinstance(frame, Submit | Reserve)] == [Submit, Reserve]


async def test_a_decode_worker_that_grants_no_lease_does_it_all() -> None:
    (p,), (d,) = pairs(1, 1)
    d.grants = False
    async with cluster(p, d) as running:
        assert await running.generate(PROMPT, 6) == continuation(PROMPT, 6)
    assert not [frame for frame in p.frames if isinstance(frame, Submit)]


@pytest.mark.parametrize(
    ("sampling", "reason"), [({}, "length"), ({"stop_token_ids": [next_token(PROMPT)]}, "stop")]
)
async def test_a_request_that_ends_with_its_first_token_is_aborted_at_decode(
    sampling: dict[str, list[int]], reason: str
) -> None:
    (p,), (d,) = pairs(1, 1)
    async with cluster(p, d) as running:
        wanted = request(PROMPT, 1 if reason == "length" else 9, **sampling)
        outputs = [output async for output in running.client.generate(wanted)]
        await running.until(lambda: bool(d.aborted) and not d.live)
    assert [token for output in outputs for token in output.tokens] == continuation(PROMPT, 1)
    assert outputs[-1].finish_reason == reason
    assert p.aborted == []


@pytest.mark.parametrize("after", [1, 3])
async def test_closing_the_generator_aborts_on_both_workers(after: int) -> None:
    (p,), (d,) = pairs(1, 1)
    p.writes = after > 1  # else P has sent the first token, and its writes do not end
    async with cluster(p, d) as running:
        stream = running.client.generate(request(PROMPT, 100_000))
        for _ in range(after):
            await anext(stream)
        await stream.aclose()
        await running.until(lambda: bool(d.aborted) and not d.live and not p.live)
        assert bool(p.aborted) == (after == 1)
        assert running.pool.ready()[0].requests == 0


DEATHS: list[tuple[str, Callable[[], Callable[[Moment, int], None]]]] = [
    ("prefill", lambda: once("submit", Die())),
    ("prefill", lambda: once("first", Die())),
    ("prefill", lambda: once("handoff", Die())),
    ("prefill", lambda: once("submit", Fail("lease_expired"))),
    ("prefill", lambda: once("first", Fail("transfer_failed"))),
    ("decode", lambda: once("reserve", Die())),
    ("decode", lambda: once("leased", Die())),
    ("decode", lambda: once("token", Die(), 0)),
    ("decode", lambda: once("token", Die(), 1)),
    ("decode", lambda: once("token", Die(), 7)),
    ("decode", lambda: once("reserve", Fail("overloaded"))),
    ("decode", lambda: once("token", Fail("kv_digest_mismatch"), 0)),
    ("decode", lambda: once("token", Fail("engine_failed"), 7)),
]


@pytest.mark.parametrize("spare", [True, False], ids=["spare", "alone"])
@pytest.mark.parametrize(("role", "death"), DEATHS)
async def test_a_worker_that_fails_is_not_seen_by_the_client(
    role: str, death: Callable[[], Callable[[Moment, int], None]], spare: bool
) -> None:
    """With a spare worker of its role another takes over; a lone prefill worker is done without."""
    prefills, decodes = pairs(2 if spare else 1, 2 if spare or role == "decode" else 1)
    hook = death()  # shared: whichever worker gets there first fails, and no other
    for worker in prefills if role == "prefill" else decodes:
        worker.hook = hook
    async with cluster(*prefills, *decodes) as running:
        outputs = [
            output
            async for output in running.client.generate(request(PROMPT, 20, min_tokens=3, logprobs=0, seed=5))
        ]
        await running.until(lambda: not any(worker.live for worker in running.workers))
    tokens = [token for output in outputs for token in output.tokens]
    assert tokens == continuation(PROMPT, 20)
    assert [one.logprob for output in outputs for one in output.logprobs or []] == [
        -float(token) for token in tokens
    ]
    assert [output.finish_reason for output in outputs if output.finish_reason] == ["length"]
    assert outputs[-1].cached_tokens <= len(PROMPT)


async def test_a_continuation_asks_for_what_is_left() -> None:
    _, decodes = pairs(0, 2)
    hook = once("token", Die(), 7)
    for worker in decodes:
        worker.hook = hook
    async with cluster(*decodes) as running:
        await running.generate(PROMPT, 20, min_tokens=9, seed=3, temperature=0.5)
        assert running.retries("decode_lost") == 1
    first, second = sorted(
        (frame for worker in decodes for frame in worker.frames if isinstance(frame, Submit)),
        key=lambda frame: len(frame.tokens),
    )
    done = len(second.tokens) - len(first.tokens)
    assert second.tokens == PROMPT + continuation(PROMPT, done)
    assert done == 7
    assert (second.sampling.max_tokens, second.sampling.min_tokens) == (13, 2)
    assert (second.sampling.seed, second.sampling.temperature) == (3, 0.5)
    assert first.id != second.id


async def test_prefills_death_after_decode_began_changes_nothing() -> None:
    (p,), (d,) = pairs(1, 1)
    p.acknowledges = False
    async with cluster(p, d) as running:
        stream = running.client.generate(request(PROMPT, 50))
        tokens = []
        for _ in range(5):
            tokens += (await anext(stream)).tokens
        await p.stop()
        tokens += [token async for output in stream for token in output.tokens]
        assert running.retries("prefill_lost") == 0
    assert tokens == continuation(PROMPT, 50)


async def test_a_worker_that_comes_back_goes_on_with_the_stream() -> None:
    """The only worker loses its socket in the middle, and is there again."""
    d = FakeWorker("decode", Fabric(), hook=once("token", Die(), 5))
    async with cluster(d) as running:

        async def restart() -> None:
            await running.until(lambda: d.server is None)
            await d.start()

        restarting = asyncio.create_task(restart())
        assert await running.generate(PROMPT, 20) == continuation(PROMPT, 20)
        await restarting
        assert d.epoch == 2


async def test_when_no_worker_is_left_the_error_has_the_reason() -> None:
    d = FakeWorker("decode", Fabric(), "d0", hook=once("token", Die(), 5))
    seen: list[int] = []
    async with cluster(d) as running:
        with pytest.raises(EngineError, match="could finish the request: decode_lost") as caught:
            await running.generate(PROMPT, 20, seen=seen)
        assert (caught.value.code, caught.value.status) == ("no_worker", 503)
        assert seen == continuation(PROMPT, 5)
        with pytest.raises(EngineError, match="no worker is ready") as caught:
            await running.generate(PROMPT, 20)
        assert (caught.value.code, caught.value.status) == ("no_worker", 503)


async def test_where_all_workers_are_overloaded_that_is_the_error() -> None:
    full, busy = (FakeWorker("both", Fabric(), name, hook=always("submit", Fail("overloaded"))) for name in "ab")
    async with cluster(full, busy) as running:
        with pytest.raises(EngineError, match="all workers are overloaded") as caught:
            await running.generate(PROMPT, 20)
        assert (caught.value.code, caught.value.status) == ("overloaded", 503)


async def test_a_worker_that_failed_at_a_request_does_not_get_it_again() -> None:
    _, (bad, good) = pairs(0, 2)
    bad.cached = PROMPT  # the best place, were it not for this
    bad.hook = always("submit", Fail("engine_failed"))
    async with cluster(bad, good) as running:
        (worker,) = [w for w in running.pool.ready() if w.name == bad.name]
        await running.until(lambda: bool(len(worker.prefixes)))
        assert await running.generate(PROMPT, 5) == continuation(PROMPT, 5)
        assert running.retries("engine_failed") == 1


async def test_a_handoff_that_fails_at_decode_speaks_against_prefill() -> None:
    """D may tell of P's death before P's socket does: the only D is not given up for that."""
    (p,), (d,) = pairs(1, 1)
    p.writes = False
    original = d._reserve

    async def reports(*args: object) -> None:
        reserving = asyncio.ensure_future(original(*args))  # type: ignore[arg-type]
        await running.until(lambda: bool(p.live))
        reserving.cancel()
        raise Fail("writer_died")

    d._reserve = reports  # type: ignore[method-assign, assignment]
    async with cluster(p, d) as running:
        assert await running.generate(PROMPT, 8) == continuation(PROMPT, 8)
        assert running.retries("writer_died") == 1
        await running.until(lambda: not p.live and not d.live)
    assert p.aborted


async def test_what_a_worker_has_counts_before_it_says_so_and_not_after_its_end() -> None:
    _, decodes = pairs(0, 2)
    for d in decodes:
        d.gate = asyncio.Event()
    async with cluster(*decodes) as running:
        streams = []
        for n in range(6):
            streams.append(running.client.generate(request([n, *PROMPT], 9)))
            await anext(streams[-1])  # each has begun, which no worker has reported as load
        assert [len(d.live) for d in decodes] == [3, 3]
        assert [w.requests for w in running.pool.ready()] == [3, 3]
        for stream in streams:
            await stream.aclose()
        assert [w.requests for w in running.pool.ready()] == [0, 0]


async def test_prompts_that_are_queued_count_until_their_first_token_or_end() -> None:
    _, (d,) = pairs(0, 1)
    never = asyncio.Event()

    async def stuck(*_: object) -> None:
        await never.wait()

    d._generate = stuck  # type: ignore[method-assign, assignment]
    async with cluster(d) as running:
        (worker,) = running.pool.ready()
        stream = running.client.generate(request(PROMPT, 9))
        first = asyncio.ensure_future(anext(stream))
        await running.until(lambda: worker.queued_tokens == len(PROMPT))
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        assert worker.queued_tokens == 0
        await running.until(lambda: bool(d.aborted))


async def test_a_request_that_every_worker_fails_at_ends() -> None:
    _, decodes = pairs(0, 8)
    for worker in decodes:
        worker.hook = always("submit", Fail("engine_failed", "it hurts"))
    async with cluster(*decodes) as running:
        with pytest.raises(EngineError, match="could finish the request: engine_failed"):
            await running.generate(PROMPT, 20)
    assert sum(isinstance(frame, Submit) for worker in decodes for frame in worker.frames) == 6


async def test_the_requests_own_fault_is_not_retried() -> None:
    _, decodes = pairs(0, 2)
    for worker in decodes:
        worker.hook = always("submit", Fail("context_length_exceeded"))
    async with cluster(*decodes) as running:
        with pytest.raises(EngineError) as caught:
            await running.generate(PROMPT, 20)
    assert caught.value.status == 400
    assert sum(isinstance(frame, Submit) for worker in decodes for frame in worker.frames) == 1


async def test_workers_that_differ_on_a_token_are_an_error_and_not_a_wrong_token() -> None:
    (p,), (d,) = pairs(1, 1)
    d.wrong_tokens = True
    seen: list[int] = []
    async with cluster(p, d) as running:
        with pytest.raises(EngineError) as caught:
            await running.generate(PROMPT, 20, seen=seen)
        await running.until(lambda: not d.live)
    assert caught.value.code == "token_mismatch"
    assert len(seen) <= 1


async def test_many_streams_at_once_share_the_sockets() -> None:
    prefills, decodes = pairs()
    prompts = [[n, *PROMPT] for n in range(40)]
    async with cluster(*prefills, *decodes) as running:
        answers = await asyncio.gather(*(running.generate(prompt, 15) for prompt in prompts))
        assert all(worker.requests == 0 for worker in running.pool.ready())
    assert answers == [continuation(prompt, 15) for prompt in prompts]
    assert all(any(isinstance(frame, Reserve) for frame in d.frames) for d in decodes)


async def test_workers_that_cannot_pair_are_named_once_and_decode_does_it_alone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    fabric = Fabric()
    p = FakeWorker("prefill", fabric, "p0", dtype="float32")
    d = FakeWorker("decode", fabric, "d0")
    with caplog.at_level("INFO", "router"):
        async with cluster(p, d) as running:
            for _ in range(2):
                assert await running.generate(PROMPT, 4) == continuation(PROMPT, 4)
            await d.drain()
            await running.until(lambda: len(running.pool.ready()) == 1)
    said = [line for line in caplog.messages if "cannot pair" in line]
    assert len(said) == 1
    assert "prefill=p0 decode=d0" in said[0]
    assert "dtype: 'float32', 'bfloat16'" in said[0]


@pytest.mark.parametrize(
    ("change", "why"),
    [({"version": 99}, "protocol version: 2 to 3, 99"), ({"model": "other"}, "model: 'tiny', 'other'")],
)
async def test_a_worker_that_does_not_fit_is_refused_by_name(change: dict[str, object], why: str) -> None:
    d = FakeWorker("decode", Fabric(), "d0", **change)  # type: ignore[arg-type]
    async with cluster(d, model="tiny", ready=0) as running:
        await running.until(lambda: "refused" in running.client.unready_workers())
        assert why in running.client.unready_workers()
        assert running.client.unready_reason() == "no worker is ready: 1 refused", "clients learn of no names"


async def test_a_draining_worker_gets_nothing_new_and_finishes_what_it_has() -> None:
    _, decodes = pairs(0, 2)
    async with cluster(*decodes) as running:
        stream = running.client.generate(request(PROMPT, 30))
        tokens = (await anext(stream)).tokens
        (busy,) = [d for d in decodes if d.live]
        await busy.drain()
        await running.until(lambda: len(running.pool.ready()) == 1)
        for _ in range(3):
            assert await running.generate(PROMPT, 3) == continuation(PROMPT, 3)
        tokens += [token async for output in stream for token in output.tokens]
    assert tokens == continuation(PROMPT, 30)
    assert sum(isinstance(frame, Submit) for frame in busy.frames) == 1


async def test_a_worker_that_discovery_drops_finishes_what_it_has() -> None:
    _, (gone, stays) = pairs(0, 2)
    async with cluster(gone, stays) as running:
        gone.load = Load()
        running.pool.set_workers({gone.url: gone.name})
        await running.until(lambda: [w.name for w in running.pool.ready()] == [gone.name])
        stream = running.client.generate(request(PROMPT, 30))
        tokens = (await anext(stream)).tokens
        running.pool.set_workers({stays.url: stays.name})
        tokens += [token async for output in stream for token in output.tokens]
        await running.until(lambda: not gone.sockets)
        assert running.retries("decode_lost") == 0
    assert tokens == continuation(PROMPT, 30)


async def test_a_request_is_held_while_a_worker_that_is_known_is_on_its_way() -> None:
    _, (d,) = pairs(0, 1)
    async with cluster(d) as running:
        await d.stop()
        await running.until(lambda: running.client.unready_reason() is not None)
        asked = asyncio.create_task(running.generate(PROMPT, 20))
        waiting = asyncio.create_task(running.client.wait_ready())
        await asyncio.sleep(0.05)
        assert not asked.done()
        assert not waiting.done()
        await d.start()
        assert await asked == continuation(PROMPT, 20)
        assert await waiting is None
        assert running.retries("decode_lost") == 0


async def test_a_request_is_refused_at_once_where_no_worker_is_known() -> None:
    async with cluster() as running:
        assert await running.client.wait_ready() == "no worker is known"
        with pytest.raises(EngineError, match="no worker is known"):
            await running.generate(PROMPT, 20)


async def test_requests_are_held_without_a_worker_where_one_is_started_for_them() -> None:
    _, (d,) = pairs(0, 1)
    async with cluster(d, hold_seconds=60.0, hold_requests=2) as running:
        running.pool.set_workers({})
        assert running.client.unready_reason() is None, "the router must get the requests that a worker starts for"
        waiting = [asyncio.create_task(running.client.wait_ready()) for _ in range(2)]
        await running.until(lambda: running.registry.get_sample_value("kvasir_router_held") == 2)
        assert await running.client.wait_ready() == "no worker is known", "no more than two"
        running.pool.set_workers({d.url: d.name})
        assert await asyncio.gather(*waiting) == [None, None]
        assert running.registry.get_sample_value("kvasir_router_held") == 0
        assert await running.generate(PROMPT, 20) == continuation(PROMPT, 20)


async def test_a_request_is_held_no_longer_than_it_may_and_gives_its_place_back() -> None:
    async with cluster(hold_seconds=0.05, hold_requests=1) as running:
        assert await running.client.wait_ready() == "no worker is known"
    async with cluster(hold_seconds=60.0, hold_requests=1) as running:
        left = asyncio.create_task(running.client.wait_ready())
        await running.until(lambda: running.registry.get_sample_value("kvasir_router_held") == 1)
        left.cancel()
        await asyncio.gather(left, return_exceptions=True)
        assert running.registry.get_sample_value("kvasir_router_held") == 0


async def test_readiness_and_the_workers_metric() -> None:
    (p,), (d,) = pairs(1, 1)
    async with cluster(p, d) as running:
        value = running.registry.get_sample_value
        assert running.client.unready_reason() is None
        assert running.client.max_length == 1000
        assert value("kvasir_router_workers", {"role": "decode", "state": "ready"}) == 1
        await d.stop()
        await running.until(lambda: running.client.unready_reason() is not None)
        assert running.client.unready_reason() == "no decode worker is ready"
        assert running.client.max_length == 1000, "what came before the loss is not too long now"
        assert value("kvasir_router_workers", {"role": "unknown", "state": "connecting"}) == 1
        assert value("kvasir_router_workers", {"role": "prefill", "state": "ready"}) == 1
        await d.start()
        await running.until(lambda: running.client.unready_reason() is None)


async def test_an_endpoint_picker_reads_queue_and_kv_of_all_workers() -> None:
    (p,), (d, other) = pairs(1, 2)
    p.load = Load(running=1, waiting=4)
    d.load = Load(running=2, waiting=3, free_pages=1, cached_pages=1)
    other.load = Load(running=1)
    async with cluster(p, d, other) as running:
        pages = sum(
            w.peer.endpoint.region.pages for w in running.pool.ready() if w.peer and w.peer.role == "decode"
        )

        def value(name: str, **labels: str) -> float | None:
            found: float | None = running.registry.get_sample_value(f"vllm:{name}", labels)
            return found

        await running.until(lambda: value("num_requests_waiting") == 7)
        assert value("num_requests_running") == 4
        assert value("kv_cache_usage_perc") == pytest.approx(1 - 2 / pages)
        assert value("cache_config_info", block_size=str(PAGE), num_gpu_blocks=str(pages)) == 1
        text = generate_latest(running.registry).decode()
        assert "# TYPE vllm:num_requests_waiting gauge" in text
    async with cluster() as running:
        assert running.registry.get_sample_value("vllm:num_requests_waiting") == 0
        assert running.registry.get_sample_value("vllm:kv_cache_usage_perc") == 0


async def test_the_longest_prefix_wins_and_lost_cache_events_are_asked_for_again() -> None:
    _, decodes = pairs(0, 3)
    knowing = decodes[1]
    knowing.cached = PROMPT
    async with cluster(*decodes) as running:
        (worker,) = [w for w in running.pool.ready() if w.name == knowing.name]
        await running.until(lambda: len(worker.prefixes) == len(PROMPT) // PAGE)
        for _ in range(3):
            await running.generate(PROMPT, 2)
        assert sum(isinstance(frame, Submit) for frame in knowing.frames) == 3
        knowing.cached = list(range(8))
        await knowing.send(CacheEvents(knowing.seq + 5, [CacheEvent(stored=page_hashes([9] * PAGE, PAGE))]))
        await running.until(lambda: sum(isinstance(frame, Resync) for frame in knowing.frames) == 2)
        await running.until(lambda: not worker.prefixes.degraded and len(worker.prefixes) == 2)


async def test_a_request_whose_last_worker_leaves_after_it_was_let_in_is_held_too() -> None:
    _, (d,) = pairs(0, 1)
    async with cluster(d, hold_seconds=60.0, hold_requests=1) as running:
        assert await running.client.wait_ready() is None
        running.pool.set_workers({})
        answer = asyncio.create_task(running.generate(PROMPT, 20))
        await running.until(lambda: running.client.load.held == 1)
        running.pool.set_workers({d.url: d.name})
        assert await answer == continuation(PROMPT, 20)
        assert running.client.load.report().held == 0


async def test_what_the_operator_is_told_counts_every_sequence_once() -> None:
    _, (d,) = pairs(0, 1)
    async with cluster(d, hold_seconds=60.0, hold_requests=4) as running:
        running.pool.set_workers({})
        waiting = asyncio.create_task(running.client.wait_ready())
        await running.until(lambda: running.client.load.held == 1)
        running.pool.set_workers({d.url: d.name})
        assert await waiting is None
        await running.generate(PROMPT, 5)
        await running.generate(PROMPT, 5)
        load = running.client.load.report()
        assert (load.arrivals, load.held, load.ttft.count, load.decode.count) == (2, 0, 2, 2)
        assert load.itl.count == 8
        assert load.idle > 0

"""A prompt's log-probabilities: whole, once, with the first token, whoever computes and whoever dies."""

import asyncio
from typing import Any

import pytest
from fake_worker import (
    PAGE,
    Cluster,
    Die,
    Fabric,
    FakeWorker,
    cluster,
    continuation,
    once,
    prompt_logprobs,
    request,
)

from kvasir_engine.engine_client import EngineError, Output
from kvasir_engine.kv.hashing import page_hashes
from kvasir_engine.protocol import LOGPROB_START, PROMPT_LOGPROBS, Reserve, Submit

PROMPT = list(range(100, 140))


def worker(role: Any, name: str, fabric: Fabric, *, knows: bool = True, **how: Any) -> FakeWorker:
    capabilities = how.pop("capabilities", (PROMPT_LOGPROBS, LOGPROB_START)) if knows else ()
    return FakeWorker(role, fabric, name, capabilities=capabilities, **how)


async def outputs_of(running: Cluster, count: int = 6, start: int = 0) -> list[Output]:
    asked = request(PROMPT, count, prompt_logprobs=0, logprob_start=start)
    async with asyncio.timeout(60):
        return [each async for each in running.client.generate(asked)]


def right(outputs: list[Output], count: int = 6, start: int = 1) -> None:
    assert [token for output in outputs for token in output.tokens] == continuation(PROMPT, count)
    told = [output for output in outputs if output.prompt_logprobs is not None]
    assert [output.prompt_logprobs for output in told] == [prompt_logprobs(PROMPT)[start - 1 :]]
    assert told == [next(output for output in outputs if output.tokens)]
    assert outputs[-1].finish_reason == "length"


def has_served(worker: FakeWorker) -> bool:
    """Whether it has been asked, and has ended."""
    return bool(asked_of(worker)) and not worker.live


def asked_of(worker: FakeWorker) -> list[int | None]:
    return [frame.sampling.prompt_logprobs for frame in worker.frames if isinstance(frame, Submit | Reserve)]


@pytest.mark.parametrize("who", ["prefill", "decode", "alone"])
async def test_they_come_once_with_the_first_token(who: str) -> None:
    fabric = Fabric()
    decode = worker("decode", "d", fabric, grants=who == "prefill")
    workers = [decode] if who == "alone" else [worker("prefill", "p", fabric), decode]
    async with cluster(*workers) as running:
        right(await outputs_of(running))


async def test_tokens_wait_for_them_where_decode_is_ahead_of_prefills_last_word() -> None:
    fabric, late = Fabric(), asyncio.Event()
    prefill, decode = worker("prefill", "p", fabric, late_scores=late), worker("decode", "d", fabric)
    async with cluster(prefill, decode) as running:
        asking = asyncio.create_task(outputs_of(running))
        await running.until(lambda: has_served(decode))
        assert not asking.done()
        late.set()
        right(await asking)


@pytest.mark.parametrize(("moment", "at"), [("scores", 0), ("scores", 3), ("submit", 0), ("first", 1)])
async def test_they_are_asked_for_again_when_prefill_dies_before_it_has_told_all(moment: Any, at: int) -> None:
    fabric = Fabric()
    prefills = [worker("prefill", f"p{n}", fabric) for n in range(3)]
    for each in prefills[:2]:
        each.hook = once(moment, Die(), at)
    decodes = [worker("decode", f"d{n}", fabric) for n in range(3)]
    async with cluster(*prefills, *decodes) as running:
        right(await outputs_of(running))


async def test_they_are_asked_for_again_when_prefill_dies_though_decode_has_ended() -> None:
    fabric = Fabric()
    prefills = [worker("prefill", f"p{n}", fabric, late_scores=asyncio.Event()) for n in range(2)]
    decode = worker("decode", "d", fabric)
    async with cluster(*prefills, decode) as running:
        asking = asyncio.create_task(outputs_of(running))
        await running.until(lambda: has_served(decode))
        assert not asking.done()
        busy, idle = sorted(prefills, key=lambda each: not each.live)
        assert idle.late_scores is not None
        idle.late_scores.set()
        await busy.stop()
        right(await asking)


@pytest.mark.parametrize("at", [1, 4])
async def test_after_a_failover_they_are_not_told_twice(at: int) -> None:
    fabric = Fabric()
    prefill = worker("prefill", "p", fabric)
    decodes = [worker("decode", f"d{n}", fabric) for n in range(3)]
    for each in decodes[:2]:
        each.hook = once("token", Die(), at)
    async with cluster(prefill, *decodes) as running:
        right(await outputs_of(running))
    asked = [each for one in (prefill, *decodes) for each in asked_of(one)]
    assert set(asked) <= {0, None}


@pytest.mark.parametrize("scores", [0, 2, 38])
async def test_a_worker_that_ends_without_all_of_them_has_failed(scores: int) -> None:
    fabric = Fabric()
    async with cluster(worker("decode", "d", fabric, scores=scores)) as running:
        with pytest.raises(EngineError, match="bad_frame") as raised:
            await outputs_of(running)
        assert raised.value.status == 503
        assert await running.generate(PROMPT, 3) == continuation(PROMPT, 3)


async def test_workers_of_an_older_version_are_not_asked() -> None:
    fabric = Fabric()
    old = [worker("decode", f"old{n}", fabric, knows=False) for n in range(3)]
    decode = worker("decode", "d", fabric)
    async with cluster(worker("prefill", "p", fabric, knows=False), decode, *old) as running:
        for _ in range(3):
            right(await outputs_of(running))
    assert asked_of(decode) == [0] * 3
    assert not any(asked_of(each) for each in old)


async def test_who_does_not_know_them_may_go_on_once_they_are_told() -> None:
    fabric = Fabric()
    knowing, old = worker("decode", "new", fabric), worker("decode", "old", fabric, knows=False)
    knowing.hook = once("token", Die(), 2)
    async with cluster(knowing, old) as running:
        right(await outputs_of(running))
    assert (asked_of(knowing), asked_of(old)) == ([0], [None])


async def test_where_nobody_knows_them_the_error_names_the_field() -> None:
    fabric = Fabric()
    async with cluster(worker("decode", "d", fabric, knows=False)) as running:
        with pytest.raises(EngineError, match=r"no decode worker .* prompt_logprobs") as raised:
            await outputs_of(running)
        assert (raised.value.code, raised.value.status) == ("no_worker", 503)


async def test_a_cached_prompt_is_placed_as_one_that_is_not() -> None:
    """A decode worker that has it would have to compute it whole: prefill does."""
    fabric = Fabric()
    prefill, decode = worker("prefill", "p", fabric), worker("decode", "d", fabric, cached=PROMPT)
    async with cluster(prefill, decode, threshold=20) as running:
        pages = page_hashes(PROMPT, PAGE)
        await running.until(lambda: any(each.prefixes.longest(pages) for each in running.pool.ready()))
        right(await outputs_of(running))
    assert asked_of(prefill) == [0]
    reserve = next(frame for frame in decode.frames if isinstance(frame, Reserve))
    assert reserve.lend_from is None


@pytest.mark.parametrize("start", [1, 2, 17, 36, 39, 40, 1000])
@pytest.mark.parametrize("alone", [False, True])
async def test_from_a_place_on_only_those_are_told(start: int, alone: bool) -> None:
    fabric = Fabric()
    workers = (
        [worker("decode", "d", fabric)]
        if alone
        else [worker("prefill", "p", fabric), worker("decode", "d", fabric)]
    )
    async with cluster(*workers) as running:
        right(await outputs_of(running, start=start), start=start)


async def test_a_prompt_that_is_cached_up_to_the_place_is_placed_as_such() -> None:
    """Decode has all but the few tokens that are scored."""
    fabric = Fabric()
    prefill, decode = worker("prefill", "p", fabric), worker("decode", "d", fabric, cached=PROMPT)
    async with cluster(prefill, decode, threshold=20) as running:
        pages = page_hashes(PROMPT, PAGE)
        await running.until(lambda: any(each.prefixes.longest(pages) for each in running.pool.ready()))
        right(await outputs_of(running, start=36), start=36)
    assert asked_of(prefill) == []
    assert asked_of(decode) == [0]


async def test_the_place_is_asked_only_of_workers_that_know_it_and_once() -> None:
    fabric = Fabric()
    old = [worker("decode", f"old{n}", fabric, capabilities=(PROMPT_LOGPROBS,)) for n in range(3)]
    decode = worker("decode", "d", fabric)
    decode.hook = once("token", Die(), 2)
    async with cluster(decode, *old) as running:
        right(await outputs_of(running, start=30), start=30)
        with pytest.raises(EngineError, match=r"no decode worker .* logprob_start_len"):
            await outputs_of(running, start=30)
    later = [frame.sampling for each in old for frame in each.frames if isinstance(frame, Submit | Reserve)]
    assert [(each.prompt_logprobs, each.logprob_start) for each in later] == [(None, 0)]

"""A request with penalties and the like: asked of workers that know them, and continued with what they need."""

import pytest
from fake_worker import Die, Fabric, FakeWorker, cluster, continuation, once, request

from kvasir_engine.engine_client import EngineError
from kvasir_engine.protocol import PROCESSORS, LogitsProcessors, Reserve, Submit

PROMPT = list(range(100, 140))
ASKED = LogitsProcessors(presence_penalty=0.5, bad_words=[[3, 4]])


def worker(role: str, name: str, fabric: Fabric, *, knows: bool = True) -> FakeWorker:
    return FakeWorker(role, fabric, name, capabilities=(PROCESSORS,) if knows else ())  # type: ignore[arg-type]


def asked_of(worker: FakeWorker) -> list[LogitsProcessors | None]:
    return [frame.sampling.processors for frame in worker.frames if isinstance(frame, Submit | Reserve)]


async def test_whoever_goes_on_is_told_how_many_tokens_are_not_the_prompts() -> None:
    fabric = Fabric()
    prefill = worker("prefill", "p", fabric)
    decodes = [worker("decode", f"d{n}", fabric) for n in range(2)]
    for each in decodes:
        each.hook = once("token", Die(), at=5)
    last = worker("decode", "d2", fabric)
    async with cluster(prefill, *decodes, last) as running:
        outputs = running.client.generate(request(PROMPT, 12, processors=ASKED, min_tokens=2))
        tokens = [token async for output in outputs for token in output.tokens]
    assert tokens == continuation(PROMPT, 12)
    frames = [
        frame for each in (prefill, *decodes, last) for frame in each.frames if isinstance(frame, Submit | Reserve)
    ]
    assert frames
    for frame in frames:
        processors = frame.sampling.processors
        assert processors is not None
        assert processors.replayed == len(frame.tokens) - len(PROMPT)
        assert (processors.presence_penalty, processors.bad_words) == (0.5, [[3, 4]])


async def test_a_request_without_them_tells_nobody_of_them() -> None:
    fabric = Fabric()
    decodes = [worker("decode", f"d{n}", fabric, knows=False) for n in range(2)]
    decodes[0].hook = decodes[1].hook = once("token", Die(), at=3)
    async with cluster(*decodes) as running:
        assert await running.generate(PROMPT, 2) == continuation(PROMPT, 2)
        assert await running.generate(PROMPT, 2, processors=None) == continuation(PROMPT, 2)
    assert asked_of(decodes[0]) + asked_of(decodes[1]) == [None, None]


@pytest.mark.parametrize("prefill_knows", [False, True])
async def test_workers_of_an_older_version_are_not_asked(prefill_knows: bool) -> None:
    fabric = Fabric()
    old = [worker("decode", f"old{n}", fabric, knows=False) for n in range(3)]
    prefill, decode = worker("prefill", "p", fabric, knows=prefill_knows), worker("decode", "d", fabric)
    async with cluster(prefill, decode, *old) as running:
        for _ in range(4):
            assert await running.generate(PROMPT, 3, processors=ASKED) == continuation(PROMPT, 3)
    assert not any(asked_of(each) for each in old)
    assert asked_of(decode) == [ASKED] * 4
    assert asked_of(prefill) == [ASKED] * 4 * prefill_knows


async def test_where_nobody_knows_them_the_error_names_them() -> None:
    fabric = Fabric()
    prefill, decode = worker("prefill", "p", fabric), worker("decode", "d", fabric, knows=False)
    async with cluster(prefill, decode) as running:
        with pytest.raises(EngineError, match=r"no decode worker .* presence_penalty, bad_words") as raised:
            await running.generate(PROMPT, 3, processors=ASKED)
        assert (raised.value.code, raised.value.status) == ("no_worker", 503)
        assert await running.generate(PROMPT, 3) == continuation(PROMPT, 3)


async def test_where_who_knew_them_is_lost_the_request_ends_and_no_other_is_asked() -> None:
    fabric = Fabric()
    knowing, old = worker("decode", "new", fabric), worker("decode", "old", fabric, knows=False)
    knowing.hook = once("token", Die(), at=2)
    async with cluster(knowing, old) as running:
        with pytest.raises(EngineError) as raised:
            await running.generate(PROMPT, 6, processors=ASKED)
        assert raised.value.status == 503
    assert asked_of(old) == []

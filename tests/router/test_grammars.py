"""A request with a grammar: asked of workers that compile them, and continued with what they need."""

import pytest
from fake_worker import Die, Fabric, FakeWorker, cluster, continuation, once, request

from kvasir_engine.engine_client import EngineError
from kvasir_engine.protocol import GRAMMAR, PROCESSORS, Grammar, LogitsProcessors, Reserve, Submit

PROMPT = list(range(100, 140))
ASKED = Grammar("json_object")


def worker(role: str, name: str, fabric: Fabric, *, knows: bool = True) -> FakeWorker:
    capabilities = (PROCESSORS, GRAMMAR) if knows else (PROCESSORS,)
    return FakeWorker(role, fabric, name, capabilities=capabilities)  # type: ignore[arg-type]


def grammars_of(worker: FakeWorker) -> list[Grammar | None]:
    return [frame.sampling.grammar for frame in worker.frames if isinstance(frame, Submit | Reserve)]


@pytest.mark.parametrize("prefill_knows", [False, True])
async def test_workers_that_compile_none_are_not_asked(prefill_knows: bool) -> None:
    fabric = Fabric()
    old = [worker("decode", f"old{n}", fabric, knows=False) for n in range(3)]
    prefill, decode = worker("prefill", "p", fabric, knows=prefill_knows), worker("decode", "d", fabric)
    async with cluster(prefill, decode, *old) as running:
        for _ in range(4):
            assert await running.generate(PROMPT, 3, grammar=ASKED) == continuation(PROMPT, 3)
    assert not any(grammars_of(each) for each in old)
    assert grammars_of(decode) == [ASKED] * 4
    assert grammars_of(prefill) == [ASKED] * 4 * prefill_knows


async def test_where_nobody_compiles_them_the_error_names_the_grammar() -> None:
    fabric = Fabric()
    prefill, decode = worker("prefill", "p", fabric), worker("decode", "d", fabric, knows=False)
    async with cluster(prefill, decode) as running:
        with pytest.raises(EngineError, match="no decode worker that is ready knows grammar") as raised:
            await running.generate(PROMPT, 3, grammar=ASKED)
        assert (raised.value.code, raised.value.status) == ("no_worker", 503)
        assert await running.generate(PROMPT, 3) == continuation(PROMPT, 3)


async def test_whoever_goes_on_is_told_how_many_tokens_the_grammar_has_seen() -> None:
    fabric = Fabric()
    decodes = [worker("decode", f"d{n}", fabric) for n in range(3)]
    for each in decodes[:2]:
        each.hook = once("token", Die(), at=5)
    async with cluster(*decodes) as running:
        outputs = running.client.generate(request(PROMPT, 12, grammar=ASKED))
        tokens = [token async for output in outputs for token in output.tokens]
    assert tokens == continuation(PROMPT, 12)
    frames = [frame for each in decodes for frame in each.frames if isinstance(frame, Submit | Reserve)]
    for frame in frames:
        replayed = len(frame.tokens) - len(PROMPT)
        assert frame.sampling.grammar == ASKED
        assert frame.sampling.processors == (LogitsProcessors(replayed=replayed) if replayed else None)

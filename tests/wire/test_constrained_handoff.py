"""Grammars over real sockets and real handoffs: one text, wherever it is written, and when a worker fails in it."""

import asyncio
from collections.abc import Callable

import pytest
from toy import ToyRunner, following
from toy_grammar import END, Places, ToyMatcher, grammar_of, service
from wire_harness import ToyWorker, served

from kvasir_engine.engine_client import EngineError, GenerateRequest
from kvasir_engine.protocol import Grammar, Sampling

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5]
FORCED = [([n], [n]) for n in (11, 12, 13)]
CHOICE: tuple[list[int], list[int]] = ([1, 2, 3], [1, 4])
PLACES: Places = [CHOICE, *FORCED, CHOICE, CHOICE, CHOICE, *FORCED, CHOICE, *FORCED]
SAMPLING = Sampling(30, grammar=grammar_of(PLACES), stop_token_ids=[END])


def expected() -> list[int]:
    """The toy's logits are 1 for one token, else 0: where that is not allowed, the lowest that is allowed comes."""
    matcher, tokens = ToyMatcher(PLACES), list(PROMPT)
    while tokens[-1] != END:
        best = following(tokens)
        tokens.append(best if best in matcher.allowed() else matcher.allowed()[0])
        matcher.accept(tokens[-1])
    return tokens[len(PROMPT) :]


def failing(worker: ToyWorker, step: int) -> Callable[[], int]:
    """Let a worker's step of this number fail, once. How many it has launched."""
    launch, launched = worker.engine.runner.launch, 0

    def launch_or_fail(*args: object) -> object:
        nonlocal launched
        launched += 1
        if launched == step:
            raise RuntimeError("a test's fault")
        return launch(*args)  # type: ignore[arg-type]

    worker.engine.runner.launch = launch_or_fail  # type: ignore[method-assign,assignment]
    return lambda: launched


@pytest.mark.asyncio
@pytest.mark.parametrize("jump", [False, True])
async def test_the_text_is_the_same_when_a_worker_fails_within_it(jump: bool) -> None:
    with service(jump) as first, service(jump) as second, service(jump) as third:
        decodes = ToyWorker("decode", 0x62, second), ToyWorker("decode", 0x63, third)
        async with served(ToyWorker("prefill", 0x61, first), *decodes) as it:
            assert isinstance(it.prefill.engine.runner, ToyRunner)
            broken = [failing(each, 3) for each in decodes[:1]]
            for turn in range(6):
                request = GenerateRequest("r", PROMPT, SAMPLING, f"salt-{turn}")
                async with asyncio.timeout(60):
                    tokens = [token async for output in it.client.generate(request) for token in output.tokens]
                assert tokens == expected()
                if broken[0]() >= 3:
                    break
            assert broken[0]() >= 3
            assert it.prefill.engine.stats.sent_pages > 0
            assert (sum(each.engine.stats.requests.forced for each in decodes) > 0) == jump


@pytest.mark.asyncio
async def test_a_grammar_that_no_worker_compiles_is_the_requests_fault_and_is_tried_once() -> None:
    with service() as first, service() as second:
        async with served(ToyWorker("prefill", 0x71, first), ToyWorker("decode", 0x72, second)) as it:
            bad = Sampling(4, grammar=Grammar("regex", "nonsense"))
            with pytest.raises(EngineError, match="it is no list of sets") as raised:
                await asyncio.wait_for(anext(it.client.generate(GenerateRequest("r", PROMPT, bad))), 60)
            assert (raised.value.code, raised.value.status) == ("bad_request", 400)
            assert sum(each.engine.stats.failures.get("bad_request", 0) for each in it.workers) == 1
            await it.generate_undisturbed(PROMPT)
            await it.wait_idle()

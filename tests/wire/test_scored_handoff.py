"""Log-probabilities of prompts over real sockets and a real handoff: whole, once, with the first token."""

import asyncio

import pytest
from toy import following, reference
from wire_harness import running_workers

from kvasir_engine.engine_client import GenerateRequest
from kvasir_engine.protocol import Sampling

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, *range(30)]  # two steps of prefill


@pytest.mark.asyncio
@pytest.mark.parametrize("start", [1, 25])
@pytest.mark.parametrize("beside", [0, 5])
async def test_prefill_scores_what_decode_continues(beside: int, start: int) -> None:
    async with running_workers() as it:

        async def ask(place: int, most: int | None) -> None:
            prompt = [place, *PROMPT]
            request = GenerateRequest("r", prompt, Sampling(8, prompt_logprobs=most, logprob_start=start), "salt")
            async with asyncio.timeout(60):
                outputs = [output async for output in it.client.generate(request)]
            assert [token for output in outputs for token in output.tokens] == reference(prompt, 8)
            told = [output.prompt_logprobs for output in outputs if output.prompt_logprobs is not None]
            if most is None:
                assert told == []
                return
            assert len(told) == 1
            assert told[0] is outputs[0].prompt_logprobs
            likeliest = [following(prompt[:end]) for end in range(start, len(prompt))]
            assert [score.top[0][0] for score in told[0]] == likeliest
            ranks = [1 if token == first else 2 for token, first in zip(prompt[start:], likeliest, strict=True)]
            assert [score.rank for score in told[0]] == ranks

        for _ in range(2):  # the second time it is cached on both
            await asyncio.gather(ask(0, 1), *(ask(place, 3 if place % 2 else None) for place in range(1, beside)))
        if not beside:
            assert it.prefill.engine.stats.requests.cached == start - 1
        assert it.prefill.engine.stats.sent_pages > 0
        await it.wait_idle()

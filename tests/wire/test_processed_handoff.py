"""Logits processors over real sockets and a real handoff: what the router's client gets is what one loop makes."""

import asyncio

import pytest
import torch
from toy import VOCAB, ToyRunner, following
from wire_harness import running_workers

from kvasir_engine.engine_client import GenerateRequest
from kvasir_engine.protocol import LogitsProcessors, Sampling
from kvasir_engine.sampling.sampler import SampleRequest, sample
from kvasir_engine.sampling.token_history import TokenHistory

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5]
TABLE = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(8)) * 2
TABLE[:, :4] += 4.0
ASKED = LogitsProcessors(
    presence_penalty=0.5,
    frequency_penalty=0.7,
    repetition_penalty=1.2,
    logit_bias=[(5, 3.0)],
    bad_words=[[0, 1], [2, 2]],
    allowed_token_ids=[*range(12)],
)


def expected(sampling: Sampling) -> list[int]:
    assert sampling.processors is not None
    tokens = list(PROMPT)
    for _ in range(sampling.max_tokens):
        work = TokenHistory(sampling.processors, len(PROMPT)).work(tokens, None)
        request = SampleRequest(sampling, len(tokens), len(tokens) - len(PROMPT), work)
        tokens += sample(TABLE[following(tokens)].unsqueeze(0), [request]).tokens
    return tokens[len(PROMPT) :]


@pytest.mark.asyncio
async def test_a_handoffs_tokens_are_those_of_one_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = ToyRunner.forward
    monkeypatch.setattr(ToyRunner, "forward", lambda *args, **more: TABLE[forward(*args, **more).argmax(-1)])
    async with running_workers() as it:
        for place, temperature in enumerate((0.0, 0.9)):
            sampling = Sampling(12, temperature=temperature, seed=4, processors=ASKED)
            request = GenerateRequest("r", PROMPT, sampling, f"salt-{place}")
            async with asyncio.timeout(60):
                tokens = [token async for output in it.client.generate(request) for token in output.tokens]
            assert tokens == expected(sampling)
        assert it.prefill.engine.stats.sent_pages > 0

"""Penalties and the like count a sequence's own tokens, wherever and however it is computed."""

from typing import Any

import msgspec
import pytest
import torch
from pair import LIMITS, PROMPT, ROUTER, Pair
from simulation import Network, Worker
from toy import VOCAB, ToyRunner, following

from kvasir_engine.core.scheduler import Limits
from kvasir_engine.protocol import Delta, LogitsProcessors, Sampling, Submit
from kvasir_engine.sampling.sampler import SampleRequest, sample
from kvasir_engine.sampling.token_history import TokenHistory

COUNT = 14
TABLE = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(8)) * 2
TABLE[:, :4] += 4.0  # few tokens are likely: they come again
KINDS: dict[str, dict[str, Any]] = {
    "presence": {"presence_penalty": 2.0},
    "frequency": {"frequency_penalty": 1.5},
    "repetition": {"repetition_penalty": 1.7},
    "bias": {"logit_bias": [(1, -100.0), (7, 4.0)]},
    "bad words": {"bad_words": [[0, 1], [2, 2], [3], [0, 2, 0], [1, 0, 2]]},
    "allowed": {"allowed_token_ids": [0, 2, 3, 5, 9]},
    "all": {
        "presence_penalty": 0.5,
        "frequency_penalty": -0.4,
        "repetition_penalty": 1.1,
        "logit_bias": [(5, 3.0)],
        "bad_words": [[0, 1], [2, 2]],
        "allowed_token_ids": [*range(9)],
    },
}
DRAWN: list[dict[str, Any]] = [
    {},
    {"temperature": 0.9, "seed": 5, "min_p": 0.05, "min_tokens": 6, "stop_token_ids": [2]},
]


@pytest.fixture(autouse=True)
def _rich_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The toy's logits name one token; here they are a row of the table for each."""
    forward = ToyRunner.forward
    monkeypatch.setattr(ToyRunner, "forward", lambda *args, **more: TABLE[forward(*args, **more).argmax(-1)])


def expected(prompt: list[int], sampling: Sampling) -> list[int]:
    """One token after the other, each from a history of its own."""
    assert sampling.processors is not None
    tokens = list(prompt)
    while len(tokens) < len(prompt) + sampling.max_tokens:
        work = TokenHistory(sampling.processors, len(prompt)).work(tokens, None)
        request = SampleRequest(sampling, len(tokens), len(tokens) - len(prompt), work)
        tokens += sample(TABLE[following(tokens)].unsqueeze(0), [request]).tokens
        if tokens[-1] in sampling.stop_token_ids and len(tokens) - len(prompt) >= sampling.min_tokens:
            break
    return tokens[len(prompt) :]


def ran(worker: Worker, requests: dict[str, tuple[list[int], Sampling]]) -> dict[str, list[int]]:
    said: dict[str, list[int]] = {request: [] for request in requests}
    for request, (prompt, sampling) in requests.items():
        worker.engine.submit(ROUTER, Submit(request, prompt, sampling))
    for _ in range(400):
        worker.engine.step()
        for delta in worker.engine.drain().get(ROUTER, []):
            assert isinstance(delta, Delta)
            assert delta.failure is None, delta.failure
            said[delta.id] += delta.tokens
        if not worker.engine.busy:
            return said
    raise AssertionError("it does not end")


def alone(overlap: bool, pages: int = 12, limits: Limits = LIMITS) -> Worker:
    return Worker(Network(), "both", "b", pages, limits, overlap)


cases = pytest.mark.parametrize("how", DRAWN, ids=["greedy", "drawn"])
kinds = pytest.mark.parametrize("kind", KINDS)


@cases
@kinds
def test_it_matters_and_is_the_same_with_a_token_in_flight(kind: str, how: dict[str, Any]) -> None:
    sampling = Sampling(COUNT, processors=LogitsProcessors(**KINDS[kind]), **how)
    right = expected(PROMPT, sampling)
    assert right != expected(PROMPT, msgspec.structs.replace(sampling, processors=LogitsProcessors()))
    for overlap in (False, True):
        assert ran(alone(overlap), {"a": (PROMPT, sampling)})["a"] == right


@cases
@kinds
@pytest.mark.parametrize("overlap", [False, True])
def test_a_continuation_elsewhere_goes_on_as_if_nothing_had_happened(
    kind: str, how: dict[str, Any], overlap: bool
) -> None:
    """The router replays the prompt and what was generated, and says how much of it that is."""
    sampling = Sampling(COUNT, processors=LogitsProcessors(**KINDS[kind]), **how)
    right = expected(PROMPT, sampling)
    for sent in range(1, len(right)):
        rest = msgspec.structs.replace(
            sampling,
            max_tokens=COUNT - sent,
            min_tokens=max(0, sampling.min_tokens - sent),
            processors=LogitsProcessors(**KINDS[kind], replayed=sent),
        )
        said = ran(alone(overlap), {"a": ([*PROMPT, *right[:sent]], rest)})["a"]
        assert said == right[sent:], sent


@cases
@kinds
@pytest.mark.parametrize("overlap", [False, True])
def test_prefill_samples_the_first_token_and_decode_the_others(
    kind: str, how: dict[str, Any], overlap: bool
) -> None:
    sampling = Sampling(COUNT, processors=LogitsProcessors(**KINDS[kind]), **how)
    pair = Pair(overlap=overlap)
    lease = pair.lease("a", PROMPT, sampling=sampling)
    pair.submit("a", PROMPT, lease, sampling=sampling)
    pair.run()
    assert not pair.failures
    assert pair.tokens_of("a") == expected(PROMPT, sampling)
    assert pair.is_idle()


@pytest.mark.parametrize("overlap", [False, True])
def test_batches_and_preemptions_change_nothing(overlap: bool) -> None:
    requests = {
        f"r{place}": ([place, 1, 1, place], Sampling(COUNT, processors=LogitsProcessors(**KINDS[kind]), **how))
        for place, (kind, how) in enumerate((kind, how) for kind in KINDS for how in DRAWN)
    }
    requests["plain"] = ([1, 2, 3], Sampling(COUNT, temperature=1.0, seed=3))
    worker = alone(overlap, pages=8)
    said = ran(worker, requests)
    assert worker.engine.stats.preemptions > 0
    plain = msgspec.structs.replace(requests["plain"][1], processors=LogitsProcessors())
    requests["plain"] = (requests["plain"][0], plain)
    assert said == {request: expected(*asked) for request, asked in requests.items()}

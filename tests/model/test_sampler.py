"""Sampling: the right distribution, from noise that needs no memory, each row by itself."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvasir_engine.protocol import Sampling
from kvasir_engine.sampling.sampler import SampleRequest, sample
from kvasir_engine.sampling.uniform import uniforms

torch.set_num_threads(1)


def request(position: int = 0, generated: int = 0, **params: object) -> SampleRequest:
    return SampleRequest(Sampling(max_tokens=1, **params), position, generated)  # type: ignore[arg-type]


def draws(logits: torch.Tensor, count: int, **params: object) -> np.ndarray:
    """How often each token is drawn at `count` positions."""
    requests = [request(position, **params) for position in range(count)]
    tokens = sample(logits.expand(count, -1), requests).tokens
    return np.bincount(tokens, minlength=logits.shape[0])


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    """In standard deviations above its mean: a wrong distribution is far out, a right one within a few."""
    used = expected > 0
    degrees = int(used.sum()) - 1
    value = float(((counts[used] - expected[used]) ** 2 / expected[used]).sum())
    return (value - degrees) / math.sqrt(2 * degrees)


def test_the_uniforms_are_splitmix64() -> None:
    # Vigna's splitmix64.c from state 0 gives 0xE220A8397B1DCDAF first; here the state is itself such an output.
    def mix(z: int) -> int:
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    gamma = 0x9E3779B97F4A7C15
    assert mix(gamma) == 0xE220A8397B1DCDAF
    for seed, position in [(0, 0), (1, 7), (2**64 - 1, 8191)]:
        state = mix((seed + gamma) % 2**64)
        expected = (mix((state + (position + 1) * gamma) % 2**64) >> 11) * 2.0**-53
        got = uniforms(np.array([seed], dtype=np.uint64), np.array([position], dtype=np.uint64))
        assert got[0] == expected


def test_the_uniforms_are_even_over_positions_and_over_seeds() -> None:
    n = 20_000
    for seeds, positions in [(np.full(n, 7), np.arange(n)), (np.arange(n), np.full(n, 7))]:
        u = uniforms(seeds.astype(np.uint64), positions.astype(np.uint64))
        assert u.min() >= 0
        assert u.max() < 1
        assert abs(chi_square(np.histogram(u, 50, (0, 1))[0], np.full(50, n / 50))) < 4
        assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 4 / math.sqrt(n)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_drawn_tokens_follow_the_softmax_of_the_tempered_logits(temperature: float) -> None:
    logits = torch.randn(64, generator=torch.Generator().manual_seed(1))
    expected = (logits.double() / temperature).softmax(-1).numpy() * 20_000
    assert abs(chi_square(draws(logits, 20_000, temperature=temperature, seed=3), expected)) < 4


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        ({"top_k": 3}, [0.4, 0.3, 0.15]),
        ({"top_p": 0.69}, [0.4, 0.3]),
        ({"top_p": 0.71}, [0.4, 0.3, 0.15]),
        ({"top_p": 0.0}, [0.4]),
        ({"min_p": 0.3}, [0.4, 0.3, 0.15]),
        ({"top_k": 2, "top_p": 0.5}, [0.4]),  # of the two kept, the first has 4/7
        ({"top_k": 2, "top_p": 0.6}, [0.4, 0.3]),
        ({"top_k": 100, "top_p": 1.0, "min_p": 0.0}, [0.4, 0.3, 0.15, 0.1, 0.05]),
    ],
)
def test_filters_keep_what_they_should_in_proportion(params: dict[str, object], kept: list[float]) -> None:
    probabilities = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05])
    counts = draws(probabilities.log(), 4000, temperature=1.0, seed=1, **params)
    assert (counts > 0).tolist() == [i < len(kept) for i in range(5)]
    if len(kept) > 1:
        expected = np.array(kept) / sum(kept) * 4000
        assert abs(chi_square(counts[: len(kept)], expected)) < 4


def test_top_p_of_a_flat_distribution_reaches_past_the_tokens_sorted_first() -> None:
    counts = draws(torch.linspace(0, 1e-3, 1200), 12_000, temperature=1.0, top_p=0.75, seed=2)
    assert not counts[:299].any()
    assert (counts[301:] > 0).all()


def test_equally_likely_tokens_at_the_cut_are_all_kept() -> None:
    counts = draws(torch.zeros(8), 4000, temperature=1.0, top_k=2, seed=1)
    assert (counts > 0).all()


def test_a_continuation_draws_what_the_whole_would_have() -> None:
    logits = torch.randn(40, 300, generator=torch.Generator().manual_seed(5))
    whole = [request(position, temperature=0.9, top_p=0.95, seed=11) for position in range(40)]
    tokens = sample(logits, whole).tokens
    assert sample(logits[17:], whole[17:]).tokens == tokens[17:]
    assert len(set(tokens)) > 20
    other = [request(position, temperature=0.9, top_p=0.95, seed=12) for position in range(40)]
    assert sample(logits, other).tokens != tokens


params = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 1e-9, 0.3, 1.0, 2.0]),
        "top_k": st.sampled_from([0, 1, 5, 700]),
        "top_p": st.sampled_from([1.0, 0.9, 0.3]),
        "min_p": st.sampled_from([0.0, 0.05]),
        "seed": st.integers(-(2**63), 2**63 - 1),
        "min_tokens": st.integers(0, 2),
        "stop_token_ids": st.lists(st.integers(0, 699), max_size=2),
        "logprobs": st.sampled_from([None, 0, 3]),
    }
)


@settings(max_examples=60, deadline=None)
@given(st.lists(params, min_size=1, max_size=6), st.integers(0, 2**32 - 1))
def test_a_row_does_not_depend_on_the_others(rows: list[dict[str, object]], seed: int) -> None:
    # Coarse logits, as bfloat16 gives, so that there are equals.
    logits = (torch.randn(len(rows), 700, generator=torch.Generator().manual_seed(seed)) * 8).round() / 4
    before = logits.clone()
    requests = [request(i, generated=1, **row) for i, row in enumerate(rows)]
    together = sample(logits, requests)
    assert torch.equal(logits, before)
    for i, one in enumerate(requests):
        alone = sample(logits[i : i + 1], [one])
        assert alone.tokens == [together.tokens[i]]
        if (entry := together.logprobs[i]) is None:
            assert alone.logprobs == [None]
        else:
            assert alone.logprobs[0] is not None
            assert alone.logprobs[0].logprob == pytest.approx(entry.logprob, abs=1e-5)


def test_stop_tokens_are_impossible_until_min_tokens_are_out() -> None:
    logits = torch.tensor([[0.0, 9.0, 1.0]])
    for temperature in (0.0, 1.0):
        early = [
            request(p, generated=1, temperature=temperature, min_tokens=2, stop_token_ids=[1]) for p in range(50)
        ]
        assert 1 not in sample(logits.expand(50, -1), early).tokens
        late = request(generated=2, temperature=temperature, min_tokens=2, stop_token_ids=[1])
        assert sample(logits, [late]).tokens == [1]


def test_logprobs_are_of_the_model_s_own_distribution() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(2))
    plain = logits.log_softmax(-1)
    requests = [
        request(logprobs=4, temperature=0.2, top_k=1),
        request(),
        request(logprobs=0, generated=0, min_tokens=1, stop_token_ids=[int(logits[2].argmax())]),
    ]
    sampled = sample(logits, requests)
    first, second, third = sampled.logprobs
    assert second is None
    assert first is not None
    assert third is not None
    assert first.logprob == pytest.approx(float(plain[0, sampled.tokens[0]]))
    assert [token for token, _ in first.top] == plain[0].topk(4).indices.tolist()
    assert [value for _, value in first.top] == pytest.approx(plain[0].topk(4).values.tolist())
    assert third.top == []
    assert third.logprob == pytest.approx(float(plain[2, sampled.tokens[2]]))


def test_logits_that_are_not_numbers_still_give_a_token_of_the_vocabulary() -> None:
    logits = torch.full((2, 9), float("nan"))
    tokens = sample(logits, [request(), request(temperature=1.0, top_p=0.5, top_k=3)]).tokens
    assert all(0 <= token < 9 for token in tokens)

"""Masks of tokens on both samplers: what a row's mask lacks never comes, and other rows do not notice."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kvasir_engine.protocol import Grammar, LogitsProcessors, Sampling
from kvasir_engine.sampling import sampler as sampler_module
from kvasir_engine.sampling.device_sampler import queue_sample
from kvasir_engine.sampling.sampler import Sampled, SampleRequest, sample
from kvasir_engine.sampling.token_history import TokenHistory
from kvasir_engine.sampling.token_masks import NO_TOKEN, penalties

VOCAB = 1000
GRAMMAR = Grammar("json_object")
LOGITS = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(1)) * 3


def queued(logits: torch.Tensor, requests: list[SampleRequest]) -> Sampled:
    return queue_sample(logits, requests).collect()


def plain(logits: torch.Tensor, requests: list[SampleRequest]) -> Sampled:
    """As where no CPU kernels can run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler_module, "unavailable_reason", lambda: "a test")
        return sample(logits, requests)


samplers = pytest.mark.parametrize("sampler", [sample, plain, queued])
Sampler = Callable[[torch.Tensor, list[SampleRequest]], Sampled]


class Mask:
    def __init__(self, allowed: list[int]) -> None:
        self.allowed = allowed

    def words(self) -> NDArray[np.int32]:
        words = np.zeros(-(-VOCAB // 32), np.uint32)
        for token in self.allowed:
            words[token // 32] |= np.uint32(1) << np.uint32(token % 32)
        return words.view(np.int32)


def asked(allowed: list[int] | None, **how: Any) -> SampleRequest:
    sampling = Sampling(9, grammar=None if allowed is None else GRAMMAR, **how)
    work = None if sampling.processors is None else TokenHistory(sampling.processors, 1).work([5], None)
    return SampleRequest(sampling, 7, 0, work, None if allowed is None else Mask(allowed))


@samplers
def test_the_likeliest_of_those_that_are_allowed_is_chosen(sampler: Sampler) -> None:
    allowed = [3, 31, 32, 63, 64, 998, 999]
    before = LOGITS.clone()
    found = sampler(LOGITS, [asked(allowed), asked(None), asked([999]), asked([0])])
    best = max(allowed, key=lambda token: LOGITS[0, token])
    assert found.tokens == [best, int(LOGITS[1].argmax()), 999, 0]
    assert torch.equal(LOGITS, before)


@samplers
def test_what_is_drawn_is_allowed_and_free_rows_are_drawn_as_without(sampler: Sampler) -> None:
    rng = np.random.default_rng(2)
    for seed in range(30):
        allowed = sorted({int(each) for each in rng.integers(0, VOCAB, 5)})
        drawn: dict[str, Any] = {"temperature": 1.5, "seed": seed, "top_p": 0.9}
        found = sampler(LOGITS, [asked(allowed, **drawn), *[asked(None, **drawn)] * 3])
        assert found.tokens[0] in allowed
        assert found.tokens == [found.tokens[0], *sampler(LOGITS, [asked(None, **drawn)] * 4).tokens[1:]]
        assert found.tokens[:1] == sampler(LOGITS[:1], [asked(allowed, **drawn)]).tokens


@samplers
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_where_nothing_is_left_the_row_has_no_token_and_the_others_have_theirs(
    sampler: Sampler, temperature: float
) -> None:
    barred = asked([7, 8], temperature=temperature, processors=LogitsProcessors(bad_words=[[7], [8]]))
    stops = asked([9], temperature=temperature, min_tokens=2, stop_token_ids=[9])
    found = sampler(LOGITS, [barred, stops, asked([], temperature=temperature, logprobs=1), asked([4])])
    assert found.tokens == [NO_TOKEN, NO_TOKEN, NO_TOKEN, 4]


@samplers
def test_log_probabilities_are_the_models_own(sampler: Sampler) -> None:
    (scored,) = sampler(LOGITS[:1], [asked([11], logprobs=1)]).logprobs
    assert scored is not None
    scores = LOGITS[0].log_softmax(-1)
    assert scored.logprob == pytest.approx(float(scores[11]), abs=1e-5)
    assert scored.top[0][0] == int(LOGITS[0].argmax())


def test_a_sampling_with_a_grammar_is_never_sampled_without_its_mask() -> None:
    with pytest.raises(ValueError, match="no mask"):
        SampleRequest(Sampling(1, grammar=GRAMMAR), 0)


def test_a_mask_adds_nothing_to_what_is_allowed() -> None:
    words = torch.from_numpy(np.stack([Mask([0, 7, 8, 31, 32, 999]).words(), Mask([1, 500]).words()]))
    added = penalties(words, VOCAB)
    assert [(row == 0).nonzero().flatten().tolist() for row in added] == [[0, 7, 8, 31, 32, 999], [1, 500]]
    assert set(added.unique().tolist()) == {0.0, float("-inf")}

"""Penalties, biases, bad words and allowed tokens: as transformers and a plain loop have them, known or awaited."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from kvasir_engine.protocol import LogitsProcessors, Sampling
from kvasir_engine.sampling.device_sampler import queue_sample
from kvasir_engine.sampling.logits_processors import process
from kvasir_engine.sampling.sampler import SampleRequest, sample
from kvasir_engine.sampling.token_history import TokenHistory

VOCAB = 30
INFINITY = float("inf")


def logits_of(seed: int, rows: int = 1) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def ours(logits: torch.Tensor, tokens: list[int], prompt: int, **asked: Any) -> torch.Tensor:
    """One row of logits after `tokens`, of which the first `prompt` are the prompt's."""
    work = TokenHistory(LogitsProcessors(**asked), prompt).work(tokens, None)
    return process(logits, [(0, work)], None)[0]


def plainly(logits: torch.Tensor, tokens: list[int], prompt: int, asked: LogitsProcessors) -> torch.Tensor:
    """What vLLM says, in a loop over the vocabulary."""
    generated, out = tokens[prompt:], logits.clone()
    for token in range(VOCAB):
        value = logits[token]
        if asked.allowed_token_ids is not None and token not in asked.allowed_token_ids:
            value = torch.tensor(-INFINITY)
        for *before, last in asked.bad_words:
            if token == last and generated[len(generated) - len(before) :] == before:
                value = torch.tensor(-INFINITY)
        value = value + dict(asked.logit_bias).get(token, 0.0)
        repetition = torch.tensor(asked.repetition_penalty)
        if token in tokens and repetition != 1:
            value = value / repetition if value > 0 else value * repetition
        count = generated.count(token)
        value = value - torch.tensor(asked.frequency_penalty) * count
        out[token] = value - torch.tensor(asked.presence_penalty) * (count > 0)
    return out


@pytest.mark.parametrize("penalty", [0.5, 1.2, 2.0, 100.0])
def test_the_repetition_penalty_is_that_of_transformers(penalty: float) -> None:
    logits, tokens = logits_of(1), [3, 7, 7, 29, 0, 3]
    right = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([tokens]), logits.clone())[0]  # type: ignore[arg-type]
    torch.testing.assert_close(ours(logits, tokens, 4, repetition_penalty=penalty), right, rtol=1e-6, atol=0)


def test_bad_words_are_those_of_transformers() -> None:
    words = [[4], [5, 6], [9, 9], [1, 2, 3], [2, 2, 3], [9, 1, 2, 8]]
    theirs = NoBadWordsLogitsProcessor([list(word) for word in words])
    for tokens in ([5], [9], [9, 9], [9, 1, 2], [1, 2], [2], [7, 7, 7, 7, 7], [3, 5, 9, 1, 2]):
        logits = logits_of(2)
        right = theirs(torch.tensor([tokens]), logits.clone())[0]  # type: ignore[arg-type]
        assert torch.equal(ours(logits, tokens, 0, bad_words=words), right), tokens


def test_a_bias_is_that_of_transformers() -> None:
    logits, biases = logits_of(3), [(5, 2.5), (0, -100.0), (29, 100.0)]
    theirs = SequenceBiasLogitsProcessor({(token,): bias for token, bias in biases})  # type: ignore[arg-type]
    right = theirs(torch.tensor([[1]]), logits.clone())[0]  # type: ignore[arg-type]
    torch.testing.assert_close(ours(logits, [1], 1, logit_bias=biases), right, rtol=1e-6, atol=0)


asked_for = st.builds(
    LogitsProcessors,
    presence_penalty=st.sampled_from([0.0, 0.7, -2.0]),
    frequency_penalty=st.sampled_from([0.0, 0.3, 2.0, -1.1]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.5]),
    logit_bias=st.dictionaries(st.integers(0, VOCAB - 1), st.sampled_from([-100.0, 1.5, 100.0]), max_size=3).map(
        lambda biases: list(biases.items())
    ),
    bad_words=st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=4), max_size=5),
    allowed_token_ids=st.none() | st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=9),
)
context = st.lists(st.integers(0, 4), min_size=2, max_size=12)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(asked_for, context, st.integers(1, 12)), min_size=1, max_size=4), st.integers(0, 99))
def test_rows_are_what_a_loop_over_the_vocabulary_makes_of_them_with_tokens_known_or_awaited(
    asked: list[tuple[LogitsProcessors, list[int], int]], seed: int
) -> None:
    logits = logits_of(seed, len(asked) + 1)
    known, awaited = [], []
    for row, (how, tokens, prompt) in enumerate(asked):
        prompt = min(prompt, len(tokens) - 1)
        history = TokenHistory(how, prompt)
        for length in range(prompt, len(tokens)):  # as a sequence grows
            history.work(tokens[:length], None)
        awaited.append((row, history.work(tokens[:-1], len(asked) - 1 - row)))
        known.append((row, history.work(tokens, None)))
        right = plainly(logits[row], tokens, prompt, how)
        assert torch.equal(process(logits, [known[-1]], None)[row], right)
    before = torch.tensor([tokens[-1] for _, tokens, _ in reversed(asked)])
    whole = process(logits, known, None)
    assert torch.equal(process(logits, awaited, before), whole)
    assert torch.equal(whole[-1], logits[-1]), "a row that asks for nothing"
    for row, work in known:
        assert torch.equal(process(logits[row : row + 1], [(0, work)], None)[0], whole[row]), (
            "it depends on the batch"
        )


def test_what_has_grown_since_does_not_change_the_work_of_a_step_that_was_launched() -> None:
    history = TokenHistory(LogitsProcessors(frequency_penalty=1.0, repetition_penalty=1.1), 1)
    tokens = [1, 2]
    work = history.work(tokens, None)
    before = process(logits_of(4), [(0, work)], None)
    history.work(tokens + [2] * 5 + list(range(VOCAB)) * 4, None)
    assert torch.equal(process(logits_of(4), [(0, work)], None), before)


def request(tokens: list[int], prompt: int, asked: LogitsProcessors, **how: Any) -> SampleRequest:
    work = TokenHistory(asked, prompt).work(tokens, None)
    sampling = Sampling(9, processors=asked, **how)
    return SampleRequest(sampling, len(tokens), len(tokens) - prompt, work)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(asked_for, context, st.sampled_from([0.0, 0.8, 2.0]), st.sampled_from([0.0, 0.2])),
        min_size=1,
        max_size=4,
    ),
    st.integers(0, 99),
)
def test_the_queue_samples_what_is_sampled_at_once(
    asked: list[tuple[LogitsProcessors, list[int], float, float]], seed: int
) -> None:
    logits = logits_of(seed, len(asked))
    rows = [
        request(tokens, 1, how, temperature=temperature, min_p=min_p, seed=seed, logprobs=2)
        for how, tokens, temperature, min_p in asked
    ]
    assert queue_sample(logits, rows).collect() == sample(logits, rows)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_only_what_is_left_is_chosen_and_logprobs_are_the_models_own(temperature: float) -> None:
    logits = logits_of(5)
    how = LogitsProcessors(allowed_token_ids=[3, 4, 5, 6], bad_words=[[3], [1, 4]], logit_bias=[(7, 100.0)])
    rows = [
        SampleRequest(
            Sampling(
                9,
                temperature=temperature,
                processors=how,
                logprobs=1,
                min_tokens=3,
                stop_token_ids=[5],
                min_p=0.0,
            ),
            position,
            1,
            TokenHistory(how, 1).work([2, 1], None),
        )
        for position in range(40)
    ]
    sampled = sample(logits.expand(40, -1), rows)
    assert set(sampled.tokens) == {6}
    first = sampled.logprobs[0]
    assert first is not None
    assert first.logprob == pytest.approx(float(logits.log_softmax(-1)[0, 6]))
    assert first.top[0][0] == int(logits.argmax())


def test_min_p_is_of_what_the_processors_leave() -> None:
    logits = torch.full((1, VOCAB), -9.0)
    logits[0, 1:4] = torch.tensor([9.0, 1.0, 1.0])
    how = LogitsProcessors(bad_words=[[1]])
    rows = [
        SampleRequest(
            Sampling(9, temperature=1.0, min_p=0.5, processors=how), place, 0, TokenHistory(how, 1).work([1], None)
        )
        for place in range(60)
    ]
    assert set(sample(logits.expand(60, -1), rows).tokens) == {2, 3}


def test_processors_that_nobody_has_prepared_are_not_ignored() -> None:
    with pytest.raises(ValueError, match="processors"):
        SampleRequest(Sampling(1, processors=LogitsProcessors(presence_penalty=1.0)), 0)

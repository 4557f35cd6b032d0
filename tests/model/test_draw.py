"""Drawing tokens in whole numbers: the plain form, and the GPU's kernel against it in Triton's interpreter."""

from fractions import Fraction

import pytest
import torch
from forked import in_interpreter
from hypothesis import given, settings
from hypothesis import strategies as st

from kvasir_engine.protocol import Sampling
from kvasir_engine.sampling.draw import LARGEST_VOCAB, Draws, draw, nucleus_cut, pick
from kvasir_engine.sampling.masses import UNIT_BITS, masses_of

KINDS = [
    {},
    {"top_p": 0.9},
    {"top_p": 0.0},
    {"top_p": 0.9999},
    {"top_k": 1},
    {"top_k": 40},
    {"min_p": 0.05},
    {"top_k": 50, "top_p": 0.8, "min_p": 0.01},
]


def rows_of(count: int, vocab: int, seed: int = 0) -> Draws:
    params = [
        Sampling(9, temperature=0.4 + i % 5 * 0.4, seed=seed + i, **KINDS[i % len(KINDS)]) for i in range(count)
    ]
    return Draws.of(params, [i * 3 for i in range(count)], vocab)


def by_fractions(weights: list[float], top_k: int, top_p: float, uniform: float) -> int:
    """What `draw` should give, said in the plainest way."""
    masses = [int(Fraction(weight) * (1 << UNIT_BITS)) for weight in weights]
    kept = set(range(len(weights)))
    if top_k:
        last = sorted(weights, reverse=True)[top_k - 1]
        kept = {i for i in kept if weights[i] >= last}
    if top_p < 1:
        total = sum(masses[i] for i in kept)
        wanted, reached = max(1, -int(-(float(total) * top_p) // 1)), 0
        for i in sorted(kept, key=lambda i: -weights[i]):
            reached += masses[i]
            if reached >= wanted:
                kept = {j for j in kept if weights[j] >= weights[i]}
                break
    total = sum(masses[i] for i in kept)
    target = min(int(uniform * float(total)), total - 1)
    for i in sorted(kept):
        target -= masses[i]
        if target < 0:
            return i
    raise AssertionError("nothing is left")


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([3, 97, 1500]), st.booleans())
def test_a_draw_is_what_the_definition_says(seed: int, vocab: int, ties: bool) -> None:
    logits = torch.randn(8, vocab, generator=torch.Generator().manual_seed(seed)) * 3
    logits = logits.round() if ties else logits
    params = [Sampling(9, temperature=1.0, seed=seed + i, **KINDS[i]) for i in range(8)]
    draws = Draws.of(params, list(range(8)), vocab)
    weights = (logits - logits.amax(-1, keepdim=True)).exp()
    right = []
    for row, (_, min_p, top_k, top_p, uniform) in zip(weights, draws.table.tolist(), strict=True):
        kept = torch.where(row < torch.tensor(min_p, dtype=torch.float32), 0.0, row).tolist()
        right.append(by_fractions(kept, int(top_k), top_p, uniform))
    assert draw(logits, draws).tolist() == right


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.0, 0.9999), st.booleans())
def test_the_nucleus_is_the_shortest_sorted_prefix_that_reaches_its_share(
    seed: int, share: float, ties: bool
) -> None:
    logits = torch.randn(700, generator=torch.Generator().manual_seed(seed)) * 4
    weights = ((logits.round() if ties else logits) - logits.max()).clamp_(max=0).exp()
    masses = masses_of(weights)
    cut = nucleus_cut(weights, masses, share)
    assert nucleus_cut(weights, masses, share, few=True) == cut
    wanted = max(1, -int(-(float(int(masses.sum())) * share) // 1))
    assert int(masses[weights >= cut].sum()) >= wanted
    assert int(masses[weights > cut].sum()) < wanted


def test_sums_do_not_depend_on_how_the_row_is_cut_up() -> None:
    masses = masses_of(torch.rand(3, 5000, generator=torch.Generator().manual_seed(1)))
    uniform = torch.tensor([[0.0], [0.31], [1 - 2**-53]], dtype=torch.float64)
    cumulative = masses.cumsum(-1)
    target = (uniform * cumulative[:, -1:]).long().minimum(cumulative[:, -1:] - 1)
    right = torch.searchsorted(cumulative, target, right=True)[:, 0]
    assert pick(masses, uniform).tolist() == right.tolist()
    assert right[0] == 0
    assert right[2] == 4999


def test_the_largest_vocabulary_of_equals_does_not_overflow() -> None:
    logits = torch.zeros(1, LARGEST_VOCAB)
    token = draw(logits, Draws.of([Sampling(9, temperature=1.0, top_p=0.999, seed=5)], [7], LARGEST_VOCAB))
    uniform = Draws.of([Sampling(9, temperature=1.0, seed=5)], [7], LARGEST_VOCAB).table[0, 4]
    assert int(token) == int(uniform * LARGEST_VOCAB)
    with pytest.raises(ValueError, match="at most 524287"):
        draw(torch.zeros(1, LARGEST_VOCAB + 1), rows_of(1, LARGEST_VOCAB))


def interpreted(logits: torch.Tensor, draws: Draws) -> list[int]:
    from kvasir_engine.sampling.draw_triton import draw_rows

    return draw_rows(logits, draws.table).tolist()


def kernel_and_twin() -> None:
    for vocab, seed, ties in ((97, 1, True), (1024, 2, False), (3000, 3, False), (2048, 4, True)):
        logits = torch.randn(16, vocab, generator=torch.Generator().manual_seed(seed)) * 3
        logits = logits.round() if ties else logits
        draws = rows_of(16, vocab, seed)
        right = draw(logits, draws).tolist()
        assert interpreted(logits, draws) == right
        strided = torch.zeros(4, vocab + 8)
        strided[:, :vocab] = logits[:4]
        assert interpreted(strided[:, :vocab], Draws(draws.table[:4])) == right[:4]
        assert interpreted(logits[5:6], Draws(draws.table[5:6])) == right[5:6], "a row depends on the others"
    nothing = torch.full((8, 9), float("nan"))
    assert interpreted(nothing, rows_of(8, 9)) == draw(nothing, rows_of(8, 9)).tolist()
    masked = torch.full((8, 1500), float("-inf"))
    masked[:, 1200] = -3.0
    assert interpreted(masked, rows_of(8, 1500)) == draw(masked, rows_of(8, 1500)).tolist() == [1200] * 8


def test_the_gpus_kernel_draws_what_the_plain_form_does() -> None:
    in_interpreter("test_draw.kernel_and_twin")

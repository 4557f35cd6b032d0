"""The kernels for masked rows against torch, at vocabularies that fill their last word and that do not."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kvasir_engine.cpu_kernels import unavailable_reason

if (reason := unavailable_reason()) is not None:
    pytest.skip(f"CPU kernels cannot run here: {reason}", allow_module_level=True)

from kvasir_engine.cpu_kernels.masked_rows import NONE_ALLOWED, forbid, largest

vocabularies = pytest.mark.parametrize("vocab", [1, 31, 32, 64, 1000, 4097])


def row_of(allowed: NDArray[np.bool_]) -> NDArray[np.int32]:
    bits = np.zeros(-(-len(allowed) // 32) * 32, np.uint8)
    bits[: len(allowed)] = allowed
    return np.packbits(bits, bitorder="little").view(np.int32)


@vocabularies
@pytest.mark.parametrize("share", [0.01, 0.5, 1.0])
def test_the_largest_that_is_allowed_and_nothing_else_stays_possible(vocab: int, share: float) -> None:
    rng = np.random.default_rng(vocab)
    logits = torch.from_numpy(rng.integers(-3, 4, (7, vocab)).astype(np.float32))  # many are equal
    logits[2] = -logits[2].abs()
    allowed = rng.random((7, vocab)) < share
    allowed[:, rng.integers(vocab)] = True
    masks = [(row, row_of(allowed[row])) for row in (6, 0, 2, 3)]
    before, masked = logits.clone(), torch.where(torch.from_numpy(allowed), logits, float("-inf"))
    right = [int(masked[row].argmax()) for row, _ in masks]
    assert largest(logits, masks).tolist() == right
    assert largest(logits, [(5, None), *masks]).tolist() == [int(logits[5].argmax()), *right]
    assert torch.equal(logits, before)
    forbid(logits, masks)
    for row in range(7):
        assert torch.equal(logits[row], masked[row] if row in (6, 0, 2, 3) else before[row])


@vocabularies
def test_where_nothing_is_possible_there_is_none(vocab: int) -> None:
    logits = torch.zeros(3, vocab)
    logits[1] = float("-inf")
    nothing, everything = row_of(np.zeros(vocab, np.bool_)), row_of(np.ones(vocab, np.bool_))
    assert largest(logits, [(0, nothing), (1, everything), (1, None)]).tolist() == [NONE_ALLOWED] * 3
    assert largest(logits, [(2, everything)]).tolist() == [0]


def test_both_zeros_and_both_infinities_are_ordered_as_numbers_are() -> None:
    logits = torch.tensor([[-0.0, 0.0, -1.0], [0.0, float("inf"), 3.0], [float("-inf"), -5.0, -7.0]])
    assert largest(logits, [(0, None), (1, None), (2, None)]).tolist() == [0, 1, 1]

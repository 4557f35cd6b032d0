"""Weights of tokens as integers, whose sums are the same in any order."""

import torch

UNIT_BITS = 44
"""A mass is a weight in units of 2^-44."""


def masses_of(weights: torch.Tensor) -> torch.Tensor:
    """The integer masses of `weights`, int64."""
    return (weights * float(1 << UNIT_BITS)).long()

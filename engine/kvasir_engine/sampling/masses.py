"""Weights of tokens as whole numbers, whose sums are the same in any order."""

import torch

UNIT_BITS = 44
"""A mass is a weight in units of 2^-44."""


def masses_of(weights: torch.Tensor) -> torch.Tensor:
    """What `weights` come to in whole numbers, int64."""
    return (weights * float(1 << UNIT_BITS)).long()

"""What a step on a GPU does between matrix products and attention, as Triton kernels that do several layers' work.

Each does what the plain layers (`model/layers/`) do, and rounds no more often. What a kernel is compiled for
depends on the model alone, never on the number of tokens, so what a first step compiled serves all later ones.
"""

import importlib.util
from functools import cache

import torch


@cache
def has_triton() -> bool:
    """Whether Triton is installed: on Linux, PyTorch for CUDA brings it along."""
    return importlib.util.find_spec("triton") is not None


def takes(tensor: torch.Tensor) -> bool:
    """Whether kernels run on tensors of this one's device."""
    return tensor.device.type == "cuda" and has_triton()

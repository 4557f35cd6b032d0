"""Chooses FlashInfer's kernels by the GPU and the shape. Pure.

The choice must be compiled in: a pod has no compiler, so a kernel that the image lacks would fail at the first
prompt. The choice is made when the model is loaded and does not change, so plans and graphs stay valid.
"""

from typing import Literal

PrefillBackend = Literal["fa2", "fa3"]

HOPPER = (9, 0)
FA3_HEAD_DIMS = (64, 128, 256)


def prefill_backend(capability: tuple[int, int], head_dim: int, fa3_compiled_in: bool) -> PrefillBackend:
    """FA3 on Hopper GPUs, for which it is written; FA2 on all others, and where FA3 is not compiled in.

    FA3 reads the same paged cache, by any stride of its pages. Decoding stays with FA2 on tensor cores: it is the
    kernel that graphs have captured.
    """
    fits = capability == HOPPER and head_dim in FA3_HEAD_DIMS
    return "fa3" if fits and fa3_compiled_in else "fa2"

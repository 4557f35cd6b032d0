"""Compiles kernels for a Hopper GPU when an image is built, on a machine without one.

    python -m kvasir_engine.executor.kernels_ahead triton        # into $TRITON_CACHE_DIR
    python -m kvasir_engine.executor.kernels_ahead flashinfer    # into FlashInfer's package (needs nvcc)
    python -m kvasir_engine.executor.kernels_ahead fa3           # the same, for prompts by FA3

FlashInfer's modules depend on the size of a head and the dtype alone; Triton's kernels on the model's whole shape,
so those of `MODELS` are compiled, and a worker of another model compiles its own when it starts.
"""

import logging
import sys

from kvasir_engine.attention import flashinfer_modules
from kvasir_engine.attention.flashinfer_backend import DTYPES, HEAD_DIMS
from kvasir_engine.executor.gpu_warm_up import KernelShape, warm_up

log = logging.getLogger("model")

CAPABILITY = 90

MODELS: dict[str, KernelShape] = {
    "SmolLM2-135M": KernelShape(576, 9, 3, 64, (1536,), 49_152, 1e-5, False, False, "silu"),
    "Llama-3.2-1B": KernelShape(2048, 32, 8, 64, (8192,), 128_256, 1e-5, False, False, "silu"),
    "Llama-3.1-8B": KernelShape(4096, 32, 8, 128, (14_336,), 128_256, 1e-5, False, False, "silu"),
    "Qwen2.5-7B": KernelShape(3584, 28, 4, 128, (18_944,), 152_064, 1e-6, False, False, "silu"),
    "Qwen3-8B": KernelShape(4096, 32, 8, 128, (12_288,), 151_936, 1e-6, True, False, "silu"),
}
"""On one GPU, in bfloat16."""


class HopperWithoutOne:
    """Triton's driver, as far as compiling asks it."""

    def get_current_target(self) -> object:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", CAPABILITY, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_triton(models: dict[str, KernelShape]) -> None:
    """Compile the kernels of `models` into Triton's cache."""
    import triton

    triton.runtime.driver.set_active(HopperWithoutOne())
    for name, shape in models.items():
        done = warm_up(shape)
        counts = len(done.compiled), len(done.at_hand), done.seconds
        log.info("kernels of %s compiled=%d at_hand=%d seconds=%.1f", name, *counts)


def main(arguments: list[str]) -> None:
    """See the module."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if arguments == ["triton"]:
        compile_triton(MODELS)
    elif arguments == ["flashinfer"]:
        flashinfer_modules.compile_into(flashinfer_modules.ahead_folder(), HEAD_DIMS, DTYPES)
    elif arguments == ["fa3"]:
        flashinfer_modules.compile_into(flashinfer_modules.ahead_folder(), HEAD_DIMS, DTYPES, ("fa3",))
    else:
        raise SystemExit("usage: python -m kvasir_engine.executor.kernels_ahead triton|flashinfer|fa3")


if __name__ == "__main__":
    main(sys.argv[1:])

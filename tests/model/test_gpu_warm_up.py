"""Which Triton kernels a worker compiles before its first step, and what an image brings."""

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import forked

pytest.importorskip("triton")

from kvasir_engine.attention import flashinfer_backend
from kvasir_engine.executor import gpu_warm_up
from kvasir_engine.executor.gpu_warm_up import KernelShape, WarmedUp, log_kernels, use_own_cache
from kvasir_engine.executor.kernels_ahead import MODELS

SHAPE = KernelShape(64, 4, 2, 16, (96,), 160, 1e-6, True, True, "gelu_tanh")


def steps_launch_what_was_warmed_up(kind: str) -> None:
    """In a process of its own: a model's steps, whose kernels are compiled and not run."""
    import fake_flashinfer
    import tiny_models
    import triton
    from sequences import Sequences, random_tokens
    from triton.runtime.jit import JITFunction

    from kvasir_engine import gpu_kernels
    from kvasir_engine.attention.base import AttentionSpec
    from kvasir_engine.executor.kernels_ahead import HopperWithoutOne
    from kvasir_engine.kv.pool import KVPool
    from kvasir_engine.model.layers import cpu
    from kvasir_engine.model.tensor_parallel import shard
    from kvasir_engine.sampling.draw_triton import draw_rows
    from kvasir_engine.sampling.mask_triton import masked

    triton.runtime.driver.set_active(HopperWithoutOne())
    cpu.takes = lambda _: False  # type: ignore[assignment]
    with tempfile.TemporaryDirectory() as folder:
        runner = tiny_models.runner_of(getattr(tiny_models, kind)(vocab_size=160), Path(folder), dtype="bfloat16")
    config = runner.config
    pool = runner.pool = KVPool(runner.pool.shape, runner.pool.pages, torch.device("cpu"))
    spec = AttentionSpec(config.heads, config.attention_scale, config.windows)
    runner._attention = flashinfer_backend.FlashInferBackend(pool, spec, fake_flashinfer, 16)
    gpu_kernels.takes = lambda _: True  # type: ignore[assignment]
    part = shard(config, 0, 1)
    warmed = gpu_warm_up.warm_up(KernelShape.of(config, part, 1, torch.bfloat16, pool.page_size))
    assert warmed.compiled

    lacking: list[str] = []
    launched: set[str] = set()
    original = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        launched.add(self.__name__)
        return original(self, *args, grid=grid, warmup=True, **kwargs)

    JITFunction.run = run

    def listen(*, src: Any, **_: Any) -> None:
        lacking.append(src.name)

    triton.knobs.compilation.listener = listen
    sides = Sequences(runner, [random_tokens(9, 160, seed=1), random_tokens(20, 160, seed=2)], 24)
    for counts in ({0: 5, 1: 1}, {1: 9}, {0: 1, 1: 1}):
        logits = sides.step(counts)
        draw_rows(torch.zeros(len(logits), 160), torch.zeros(len(logits), 5, dtype=torch.float64))
        masked(logits, torch.zeros(1, 5, dtype=torch.int32), [0])
    assert launched == {"_add_norm", "_gated", "_rotary_store", "_settle", "_draw", "_mask"}
    assert lacking == [], "kernels that were not warmed up"


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_steps_launch_no_kernel_that_was_not_warmed_up(kind: str, tmp_path: Path) -> None:
    forked("test_gpu_warm_up.steps_launch_what_was_warmed_up", kind, TRITON_CACHE_DIR=str(tmp_path))


def warm_up_as_a_worker() -> tuple[int, int]:
    """In a process of its own: how many kernels are at hand, and how many have to be compiled."""
    import triton

    from kvasir_engine.executor.kernels_ahead import HopperWithoutOne

    use_own_cache()
    triton.runtime.driver.set_active(HopperWithoutOne())
    done = gpu_warm_up.warm_up(SHAPE)
    return len(done.at_hand), len(done.compiled)


def test_a_worker_compiles_nothing_that_its_image_brings(tmp_path: Path) -> None:
    image, run = tmp_path / "image", tmp_path / "run"
    worker = "test_gpu_warm_up.warm_up_as_a_worker"
    assert forked(worker, TRITON_CACHE_DIR=str(image)) == (0, 9)
    for each in [image, *image.rglob("*")]:
        each.chmod(0o555 if each.is_dir() else 0o444)
    given = {"KVASIR_TRITON_AHEAD": str(image), "KVASIR_RUN_DIR": str(run), "TRITON_CACHE_DIR": ""}
    for _ in range(2):
        assert forked(worker, **given) == (9, 0)
    assert (run / "triton").stat().st_mode & 0o777 == 0o700
    other = {**given, "KVASIR_TRITON_AHEAD": str(tmp_path / "none"), "KVASIR_RUN_DIR": str(tmp_path / "bare")}
    assert forked(worker, **other) == (0, 9)
    for each in [image, *image.rglob("*")]:
        each.chmod(0o755)


def test_a_cache_that_the_environment_names_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    use_own_cache()
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path)


def test_what_is_compiled_ahead_are_models_that_the_kernels_take() -> None:
    assert all(shape.dtype == torch.bfloat16 and shape.vocab for shape in MODELS.values())
    assert all(shape.heads % shape.kv_heads == 0 for shape in MODELS.values())
    assert all(shape.head_dim in flashinfer_backend.HEAD_DIMS for shape in MODELS.values())


def test_one_line_says_which_kernels_were_at_hand(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(gpu_warm_up, "use_own_cache", lambda: None)
    monkeypatch.setattr(gpu_warm_up, "warm_up", lambda _: WarmedUp(("gated", "gated", "draw"), ("settle",), 1.26))
    monkeypatch.setattr(flashinfer_backend, "missing", lambda: None)
    asked: list[Any] = []

    def compiled_in(*args: Any) -> tuple[list[str], list[str]]:
        asked.append(args)
        return ["plain"], ["window"]

    monkeypatch.setattr(gpu_warm_up.flashinfer_modules, "compiled_in", compiled_in)
    with caplog.at_level("INFO", "model"):
        log_kernels(SHAPE, (None, 24))
    assert caplog.messages == [
        "GPU kernels triton: compiled_in=gated,draw not_compiled_in=settle seconds=1.3; "
        "flashinfer: compiled_in=plain not_compiled_in=window"
    ]
    assert asked == [(16, torch.bfloat16, {False, True})]
    caplog.clear()
    monkeypatch.setattr(gpu_warm_up.gpu_kernels, "has_triton", lambda: False)
    monkeypatch.setattr(flashinfer_backend, "missing", lambda: "not there")
    with caplog.at_level("INFO", "model"):
        log_kernels(SHAPE, (None,))
    assert caplog.messages == ["GPU kernels triton: not installed, plain layers instead; flashinfer: not installed"]

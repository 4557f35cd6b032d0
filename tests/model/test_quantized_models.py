"""int8 weights: what stays of a model, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from sequences import Sequences, random_tokens
from tiny_models import llama, qwen3_moe, runner_of

from kvasir_engine.cpu_kernels import unavailable_reason
from kvasir_engine.errors import ModelError
from kvasir_engine.executor.model_runner import ModelRunner

needs_kernels = pytest.mark.skipif(
    unavailable_reason() is not None, reason=f"CPU kernels cannot run here: {unavailable_reason()}"
)
SHAPE: dict[str, Any] = {"head_dim": 32, "hidden_size": 96, "vocab_size": 160, "intermediate_size": 112}
OPTIONS: dict[str, Any] = {"dtype": "bfloat16", "page_size": 16, "pages": 40}


@needs_kernels
@pytest.mark.parametrize(
    "model", [lambda: llama(**SHAPE), lambda: qwen3_moe(**SHAPE, num_experts=16, moe_intermediate_size=48)]
)
def test_logits_are_close_to_those_of_bfloat16_and_not_the_same(model: Any, tmp_path: Path) -> None:
    plain = runner_of(model(), tmp_path, **OPTIONS)
    quantized = ModelRunner(tmp_path, device="cpu", quantization="int8", **OPTIONS)
    prompts = [random_tokens(count, plain.vocab, count) for count in (1, 2, 3, 5)]

    def logits(runner: ModelRunner) -> torch.Tensor:
        sequences = Sequences(runner, prompts, 5)
        return sequences.step({i: len(prompt) for i, prompt in enumerate(prompts)})

    theirs, ours = logits(plain), logits(quantized)
    assert not torch.equal(ours, theirs)
    error = (ours - theirs).norm(dim=1) / theirs.norm(dim=1)
    assert error.max() < 0.1, error


@pytest.mark.parametrize(
    ("params", "reason"),
    [
        ({"dtype": "float32"}, "int8 quantization: its inputs are bfloat16, not float32"),
        pytest.param(
            {"intermediate_size": 90},
            r"int8: no kernel multiplies by a \[180, 96\] matrix \(outputs come in 16s\)",
            marks=needs_kernels,
        ),
    ],
)
def test_what_it_cannot_do_is_refused(params: dict[str, Any], reason: str, tmp_path: Path) -> None:
    sizes = {**SHAPE, **{key: value for key, value in params.items() if key in SHAPE}}
    options = {**OPTIONS, **{key: value for key, value in params.items() if key not in SHAPE}}
    with pytest.raises(ModelError, match=f"^{reason}$"):
        runner_of(llama(**sizes), tmp_path, quantization="int8", **options)


def test_a_processor_without_the_instructions_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "kvasir_engine.executor.model_runner.unavailable_reason", lambda: "the processor has no avx512_bf16"
    )
    with pytest.raises(ModelError, match=r"^int8 quantization: the processor has no avx512_bf16$"):
        runner_of(llama(**SHAPE), tmp_path, quantization="int8", **OPTIONS)

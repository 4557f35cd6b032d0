"""Small random models for tests: transformers' own code writes them and is the reference."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from kvasir_engine.executor.model_runner import ModelRunner

# Matrices this small are slower on several threads, and the machine may have others to serve.
torch.set_num_threads(1)

SIZES: dict[str, Any] = {
    "hidden_size": 48,  # less than heads * head_dim, as it may be
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 151,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
}
LLAMA_3_SCALING = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def llama(**changes: Any) -> Any:
    """A LlamaForCausalLM, the same each time."""
    torch.manual_seed(0)
    return _lively(LlamaForCausalLM(LlamaConfig(**{**SIZES, **changes})))


def mistral(**changes: Any) -> Any:
    """A MistralForCausalLM, the same each time."""
    torch.manual_seed(0)
    return _lively(MistralForCausalLM(MistralConfig(**{**SIZES, "sliding_window": None, **changes})))


def qwen2(**changes: Any) -> Any:
    """A Qwen2ForCausalLM, the same each time."""
    torch.manual_seed(0)
    return _lively(Qwen2ForCausalLM(Qwen2Config(**{**SIZES, **changes})))


def qwen3(**changes: Any) -> Any:
    """A Qwen3ForCausalLM, the same each time."""
    torch.manual_seed(0)
    return _lively(Qwen3ForCausalLM(Qwen3Config(**{**SIZES, **changes})))


def qwen3_moe(**changes: Any) -> Any:
    """A Qwen3MoeForCausalLM, the same each time; its router's choices are far from ties."""
    torch.manual_seed(0)
    sizes = {**SIZES, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
    return _lively(Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**sizes, **changes})))


def gemma3(**changes: Any) -> Any:
    """A Gemma3ForCausalLM, the same each time: two layers with a window to one without."""
    torch.manual_seed(0)
    sizes = {**SIZES, "sliding_window": 24, "sliding_window_pattern": 3, "query_pre_attn_scalar": 40}
    return _lively(Gemma3ForCausalLM(Gemma3TextConfig(**{**sizes, **changes})))


def _lively(model: Any) -> Any:
    """Norm weights are all alike and biases zero at first, which would hide code that ignores them."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(torch.rand_like(parameter) - 0.5)
    return model.eval()


@torch.no_grad()
def reference_logits(model: Any, tokens: list[int]) -> torch.Tensor:
    """transformers' logits [T, vocab] after each of `tokens`, in one shot."""
    logits: torch.Tensor = model(torch.tensor([tokens])).logits[0]
    return logits


def runner_of(model: Any, folder: Path, **params: Any) -> ModelRunner:
    """`model` written to `folder` and loaded by our own code."""
    model.save_pretrained(folder)
    return ModelRunner(folder, **{"dtype": "float32", "device": "cpu", "page_size": 4, "pages": 256, **params})

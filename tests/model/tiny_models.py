"""Small random models for tests: transformers' own code writes them and is the reference."""

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from kvasir_engine.model.runner import ModelRunner

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


def _lively(model: Any) -> Any:
    """Norm weights are all ones at first, which would hide a norm that ignores them."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
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

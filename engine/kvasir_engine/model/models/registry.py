"""The architectures by the names that Hugging Face gives them: from a model's files to a ModelConfig.

Each file beside this one says what its architecture has of its own; what is unknown is refused. Imports no torch.
"""

from collections.abc import Callable
from pathlib import Path

from kvasir_engine.errors import ModelError
from kvasir_engine.model.config import ModelConfig, read_json
from kvasir_engine.model.models import gemma3, llama, mistral, qwen2, qwen3, qwen3_moe
from kvasir_engine.model.models.fields import Values
from kvasir_engine.model.models.llama import decoder

ARCHITECTURES: dict[str, Callable[[Values, ModelConfig], ModelConfig]] = {
    "LlamaForCausalLM": llama.configure,
    "MistralForCausalLM": mistral.configure,
    "Qwen2ForCausalLM": qwen2.configure,
    "Qwen3ForCausalLM": qwen3.configure,
    "Qwen3MoeForCausalLM": qwen3_moe.configure,
    "Gemma3ForCausalLM": gemma3.configure,
}
"""What each changes of a Llama's configuration."""


def load_config(folder: Path) -> ModelConfig:
    """The configuration of the model in `folder`. Raises ModelError."""
    values = read_json(folder / "config.json")
    generation = folder / "generation_config.json"
    eos = read_json(generation).get("eos_token_id") if generation.exists() else None
    return parse_config(values, eos)


def parse_config(values: Values, generation_eos: int | list[int] | None = None) -> ModelConfig:
    """The content of a `config.json` as a ModelConfig. Raises ModelError.

    `generation_eos`, from `generation_config.json`, goes before the one in `config.json`.
    """
    names = values.get("architectures") or []
    architecture = next((name for name in names if name in ARCHITECTURES), None)
    if architecture is None:
        raise ModelError(
            f"architecture {', '.join(names) or 'none'} is not supported; supported: {', '.join(ARCHITECTURES)}"
        )
    if values.get("quantization_config"):
        method = values["quantization_config"].get("quant_method", "unknown")
        raise ModelError(f"config.json: weights quantized by {method} are not supported")
    eos = generation_eos if generation_eos is not None else values.get("eos_token_id")
    return ARCHITECTURES[architecture](values, decoder(architecture, values, eos))

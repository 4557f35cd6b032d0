"""A tiny random Llama as a Hugging Face folder in the cache that pods share: workers of it are cheap in numbers."""

import json

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from e2e.controlplane import binaries

#: Where a pod finds it: the `cache` volume is this user's cache.
URI = "file:///var/cache/kvasir/e2e-tiny"
VOCABULARY = 256
_HIDDEN, _LAYERS, _HEADS, _KV_HEADS, _MIDDLE = 64, 2, 4, 2, 128


def make() -> None:
    """Write the folder; the same weights each time."""
    folder = binaries.cache() / "e2e-tiny"
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.3

    head = _HIDDEN // _HEADS
    tensors = {
        "model.embed_tokens.weight": random(VOCABULARY, _HIDDEN),
        "lm_head.weight": random(VOCABULARY, _HIDDEN),
    }
    tensors["model.norm.weight"] = torch.ones(_HIDDEN)
    for layer in range(_LAYERS):
        name = f"model.layers.{layer}"
        tensors |= {
            f"{name}.self_attn.q_proj.weight": random(_HEADS * head, _HIDDEN),
            f"{name}.self_attn.k_proj.weight": random(_KV_HEADS * head, _HIDDEN),
            f"{name}.self_attn.v_proj.weight": random(_KV_HEADS * head, _HIDDEN),
            f"{name}.self_attn.o_proj.weight": random(_HIDDEN, _HEADS * head),
            f"{name}.mlp.gate_proj.weight": random(_MIDDLE, _HIDDEN),
            f"{name}.mlp.up_proj.weight": random(_MIDDLE, _HIDDEN),
            f"{name}.mlp.down_proj.weight": random(_HIDDEN, _MIDDLE),
            f"{name}.input_layernorm.weight": torch.ones(_HIDDEN),
            f"{name}.post_attention_layernorm.weight": torch.ones(_HIDDEN),
        }
    save_file(tensors, folder / "model.safetensors")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": _LAYERS,
        "hidden_size": _HIDDEN,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _KV_HEADS,
        "head_dim": head,
        "intermediate_size": _MIDDLE,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: place for place, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    described = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 2048}
    (folder / "tokenizer_config.json").write_text(json.dumps(described))

"""A GGUF file as a Hugging Face folder: weights dequantized exactly to float32, and its tokenizer.

Names, and the order of the rotary dimensions, follow llama.cpp's `convert_hf_to_gguf.py`: it stores each head's
rows of Q and K with the two rotary halves interleaved, and here they are put back.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvasir_engine.errors import ModelError

Progress = Callable[[str, int, int], None]
"""Called as (stage, done, total); `total` is 0 while it is not known."""

SHARD_BYTES = 2 << 30

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert(gguf_file: Path, folder: Path, progress: Progress, weights: bool = True) -> None:
    """Write the model in `gguf_file` into `folder`, which exists and is empty. Raises ModelError.

    Without `weights` only what a router needs is written: configuration and tokenizer.
    """
    reader = _open(gguf_file)
    config = _config(gguf_file, reader)
    _write_json(folder / "config.json", config)
    tokens = {key: value for key, value in config.items() if key.endswith("_token_id")}
    _write_json(folder / "generation_config.json", tokens)
    if weights:
        _write_weights(gguf_file, reader, config, folder, progress)
    _write_tokenizer(gguf_file, reader, folder, progress)


def _open(gguf_file: Path) -> Any:
    import gguf

    try:
        return gguf.GGUFReader(gguf_file)
    except OSError as error:
        raise ModelError(f"{gguf_file} cannot be read: {error.strerror}") from None
    except Exception as error:  # the reader checks little itself: a cut file fails wherever its bytes end
        raise ModelError(f"{gguf_file} is not a whole GGUF file: {error}") from None


def _config(gguf_file: Path, reader: Any) -> dict[str, Any]:
    def metadata(key: str, default: Any = None) -> Any:
        field = reader.get_field(key)
        return default if field is None else field.contents()

    def required(key: str) -> Any:
        if (value := metadata(key)) is None:
            raise ModelError(f"{gguf_file} lacks {key}")
        return value

    if (architecture := metadata("general.architecture")) != "llama":
        raise ModelError(f"{gguf_file} has the architecture {architecture!r}; supported in GGUF: 'llama'")
    shapes = {tensor.name: [int(size) for size in tensor.shape] for tensor in reader.tensors}
    if metadata("llama.expert_count", 0):
        raise ModelError(f"{gguf_file} is a mixture of experts, which is not supported")
    if "rope_freqs.weight" in shapes or metadata("llama.rope.scaling.type", "none") != "none":
        raise ModelError(f"{gguf_file} scales its rotary positions, which is supported in safetensors folders only")
    if "token_embd.weight" not in shapes:
        raise ModelError(f"{gguf_file} lacks the tensor token_embd.weight")
    heads, hidden = required("llama.attention.head_count"), required("llama.embedding_length")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": required("llama.feed_forward_length"),
        "num_hidden_layers": required("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata("llama.attention.head_count_kv", heads),
        "head_dim": metadata("llama.attention.key_length", hidden // heads),
        "hidden_act": "silu",
        "max_position_embeddings": required("llama.context_length"),
        "rms_norm_eps": required("llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": metadata("llama.rope.freq_base", 10000.0),
        "vocab_size": shapes["token_embd.weight"][1],
        "tie_word_embeddings": "output.weight" not in shapes,
        "attention_bias": False,
        "mlp_bias": False,
        "dtype": "float32",
    }
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        if (token := metadata(f"tokenizer.ggml.{key}_token_id")) is not None:
            config[f"{name}_token_id"] = token
    return config


def _write_weights(gguf_file: Path, reader: Any, config: dict[str, Any], folder: Path, progress: Progress) -> None:
    import gguf
    from safetensors.numpy import save_file

    elements = sum(int(tensor.n_elements) for tensor in reader.tensors)
    shards = max(1, -(-elements * 4 // SHARD_BYTES))
    shard: dict[str, Any] = {}
    index: dict[str, str] = {}
    done = written = 0

    def flush() -> None:
        nonlocal shard, written
        written += 1
        file = "model.safetensors" if shards == 1 else f"model-{written:05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)  # a cache may be shared between users
        index.update(dict.fromkeys(shard, file))
        shard = {}

    for tensor in reader.tensors:
        name = _name(gguf_file, tensor.name)
        try:
            weight = gguf.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            kind = tensor.tensor_type.name
            raise ModelError(
                f"{gguf_file}: tensor {tensor.name} is quantized as {kind}, which is not supported"
            ) from None
        if ".attn_q." in tensor.name:
            weight = _rotary_halves(weight, config["num_attention_heads"])
        elif ".attn_k." in tensor.name:
            weight = _rotary_halves(weight, config["num_key_value_heads"])
        shard[name] = weight
        done += int(tensor.n_elements)
        progress("converting weights", done * 4, elements * 4)
        if sum(held.nbytes for held in shard.values()) >= SHARD_BYTES and shards > 1:
            flush()
    if shard:
        flush()
    if shards > 1:
        _write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": index})


def _name(gguf_file: Path, name: str) -> str:
    """`blk.3.attn_q.weight` as `model.layers.3.self_attn.q_proj.weight`."""
    *block, stem, kind = name.split(".")
    if stem not in _NAMES or kind != "weight":
        raise ModelError(f"{gguf_file} has the tensor {name}, which the Llama architecture does not")
    return f"model.layers.{block[1]}.{_NAMES[stem]}.weight" if block else f"{_NAMES[stem]}.weight"


def _rotary_halves(weight: Any, heads: int) -> Any:
    """Rows of each head from interleaved (0, d/2, 1, d/2+1, ...) to halves (0, 1, ..., d/2, d/2+1, ...)."""
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns).copy()


def _write_tokenizer(gguf_file: Path, reader: Any, folder: Path, progress: Progress) -> None:
    from kvasir_engine.model.loading.gguf_tokenizer import build_tokenizer

    def metadata(key: str) -> Any:
        field = reader.get_field(key)
        return None if field is None else field.contents()

    progress("converting tokenizer", 0, 1)
    try:
        tokenizer = build_tokenizer(metadata)
    except ModelError as error:
        raise ModelError(f"{gguf_file}: {error}") from None
    tokenizer.write(folder)
    progress("converting tokenizer", 1, 1)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")

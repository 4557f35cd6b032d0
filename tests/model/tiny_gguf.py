"""A GGUF file of a small model, written the way llama.cpp's converter writes one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Quantization

SIZES = {"hidden": 64, "heads": 4, "kv_heads": 2, "layers": 2, "intermediate": 96, "vocab": 270}


def write_gguf(
    path: Path,
    metadata: dict[str, Any] | None = None,
    extra: tuple[str, ...] = (),
    tokenizer: Callable[[gguf.GGUFWriter], None] | None = None,
) -> Path:
    """Random weights in Q4_1, Q8_0 and float32 and a byte-level tokenizer. `metadata` changes or adds keys."""
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, (metadata or {}).pop("general.architecture", "llama"))
    writer.add_context_length(256)
    writer.add_embedding_length(SIZES["hidden"])
    writer.add_block_count(SIZES["layers"])
    writer.add_feed_forward_length(SIZES["intermediate"])
    writer.add_head_count(SIZES["heads"])
    writer.add_head_count_kv(SIZES["kv_heads"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(50000.0)
    for key, value in (metadata or {}).items():
        writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    (tokenizer or add_tokenizer)(writer)

    def add(name: str, *shape: int, quantization: Quantization = Quantization.Q4_1) -> None:
        weight = random.standard_normal(shape, dtype=np.float32) * 0.2
        writer.add_tensor(name, gguf.quantize(weight, quantization), raw_dtype=quantization)

    hidden, intermediate = SIZES["hidden"], SIZES["intermediate"]
    kv = hidden // SIZES["heads"] * SIZES["kv_heads"]
    add("token_embd.weight", SIZES["vocab"], hidden, quantization=Quantization.Q8_0)
    add("output_norm.weight", hidden, quantization=Quantization.F32)
    for layer in range(SIZES["layers"]):
        block = f"blk.{layer}."
        for name in ("attn_norm", "ffn_norm"):
            add(f"{block}{name}.weight", hidden, quantization=Quantization.F32)
        add(f"{block}attn_q.weight", hidden, hidden)
        add(f"{block}attn_k.weight", kv, hidden)
        add(f"{block}attn_v.weight", kv, hidden)
        add(f"{block}attn_output.weight", hidden, hidden)
        add(f"{block}ffn_gate.weight", intermediate, hidden)
        add(f"{block}ffn_up.weight", intermediate, hidden)
        add(f"{block}ffn_down.weight", hidden, intermediate)
    for name in extra:
        add(name, hidden, quantization=Quantization.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_tokenizer(writer: gguf.GGUFWriter) -> None:
    # GPT-2's printable stand-ins for the 256 bytes.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    stand_ins = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    tokens = ["<|end|>", "<|start|>", *stand_ins, *(f"t{i}" for i in range(SIZES["vocab"] - 258))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * (len(tokens) - 2))
    writer.add_token_merges([f"t {i}" for i in range(10)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_pad_token_id(0)
    writer.add_chat_template("{% for message in messages %}{{ message.content }}{% endfor %}")

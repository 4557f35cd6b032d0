"""`kvasir worker` on what cannot be served: one line with what was wrong, status 2, and no port opened."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from kvasir_engine.api.http import server
from kvasir_engine.entrypoints.cli import main

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
    "max_position_embeddings": 512,
}
SHAPES = {
    "embed_tokens": (50, 32),
    "norm": (32,),
    "layers.0.input_layernorm": (32,),
    "layers.0.post_attention_layernorm": (32,),
    "layers.0.self_attn.q_proj": (32, 32),
    "layers.0.self_attn.k_proj": (16, 32),
    "layers.0.self_attn.v_proj": (16, 32),
    "layers.0.self_attn.o_proj": (32, 32),
    "layers.0.mlp.gate_proj": (64, 32),
    "layers.0.mlp.up_proj": (64, 32),
    "layers.0.mlp.down_proj": (32, 64),
}


def configured(folder: Path, **changes: object) -> None:
    (folder / "config.json").write_text(json.dumps({**CONFIG, "tie_word_embeddings": True, **changes}))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    configured(tmp_path)
    weights = {f"model.{name}.weight": torch.ones(shape) for name, shape in SHAPES.items()}
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "tokenizer.json").write_text("{}")
    return tmp_path


def cut_short(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:9000])


def nothing(folder: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("spoil", "flags", "said"),
    [
        (nothing, ["--attention-backend", "cuda"], "attention backend 'cuda' is none of auto, torch, flashinfer"),
        (nothing, ["--overlap", "yes"], "overlap 'yes' is none of auto, on, off"),
        (nothing, ["--device", "cpu", "--enforce-eager"], "enforce-eager: there are CUDA graphs on GPUs only"),
        (
            nothing,
            ["--device", "cpu", "--cuda-graph-max-bs", "8"],
            "cuda-graph-max-bs 8: there are CUDA graphs on GPUs only",
        ),
        (nothing, ["--cuda-graph-max-bs", "99"], "cuda-graph-max-bs 99 is more than max-running 64"),
        (
            nothing,
            ["--cuda-graph-max-bs", "8", "--enforce-eager"],
            "cuda-graph-max-bs 8 and enforce-eager: there are CUDA graphs or there are none",
        ),
        pytest.param(
            nothing,
            ["--attention-backend", "flashinfer"],
            "no attention backend flashinfer: CUDA is not available",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
        (nothing, ["--quantization", "fp8"], "quantization 'fp8' is none of none, int8"),
        (
            nothing,
            ["--quantization", "int8", "--tensor-parallel", "2"],
            "int8 quantization: it takes one rank, not 2",
        ),
        (
            nothing,
            ["--quantization", "int8", "--dtype", "float32"],
            "int8 quantization: its inputs are bfloat16, not float32",
        ),
        (cut_short, [], "model.safetensors is cut short: 9000 bytes, its header says "),
        (
            lambda folder: configured(folder, architectures=["FalconForCausalLM"]),
            [],
            "architecture FalconForCausalLM is not supported; supported: LlamaForCausalLM, MistralForCausalLM, ",
        ),
        (
            lambda folder: configured(folder, intermediate_size=65),
            [],
            "is [64, 32], the configuration makes it [65, 32]",
        ),
        (
            nothing,
            ["--dtype", "int4"],
            "dtype 'int4' is not supported; supported: auto, bfloat16, float16, float32",
        ),
        (nothing, ["--device", "tpu"], "device 'tpu' is not known; known: auto, cpu, cuda"),
        (nothing, ["--kv-cache-memory", "900Ti"], "no memory for the KV pool: 989,560,464,"),
        (nothing, ["--kv-cache-memory", "1023"], "no memory for the KV pool: one page takes 1,024 bytes"),
        (
            nothing,
            ["--kv-cache-memory", "4Ki", "--max-length", "65"],
            "64 tokens, fewer than the maximum length 65",
        ),
        (nothing, ["--kv-cache-memory", "1Kb"], "'1Kb' is no amount of memory"),
        (nothing, ["--max-length", "513"], "maximum length 513 is more than the model's 512 positions"),
        (nothing, ["--tensor-parallel", "5"], "tensor parallel size 5 is no multiple of the model's 2 KV heads"),
    ],
)
def test_it_says_what_is_wrong_and_opens_no_port(
    spoil: Callable[[Path], None],
    flags: list[str],
    said: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spoil(folder)
    opened: list[object] = []
    monkeypatch.setattr(server, "check_port", lambda *address: None)  # it opens the port and closes it
    monkeypatch.setattr(server, "listen", lambda *address: opened.append(address))
    uri = f"file://{folder}"
    command = ["kvasir", "worker", "--role", "both", "--model", uri, "--host", "127.0.0.1", "--port", "0", *flags]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error" in line.lower()]
    assert len(errors) == 1
    assert errors[0].startswith("kvasir: error: ")
    assert said in errors[0]
    assert not opened

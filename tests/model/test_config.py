"""config.json as types, in the forms that transformers 4 and 5 write, and what is refused in it."""

import json
from pathlib import Path
from typing import Any

import pytest

from kvasir_engine.model.config import ARCHITECTURES, Rope, load_config, parse_config
from kvasir_engine.model.errors import ModelError
from kvasir_engine.model.runner import MODELS

LLAMA_3_1_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}


def test_llama_3_1_reads_as_published() -> None:
    config = parse_config(LLAMA_3_1_8B)
    assert config.head_dim == 128
    assert config.rope == Rope(500000.0, "llama3", 8.0, 1.0, 4.0, 8192)
    assert config.eos_ids == (128001, 128008, 128009)
    assert config.dtype == "bfloat16"
    assert config.kv_bytes_per_token(2) == 128 << 10
    assert config.max_length() == 131072
    assert config.max_length(4096) == 4096
    assert config.positions == "rope theta=500000 llama3=8,1,4,8192 dim=128"


def test_transformers_5_rope_parameters_mean_the_same() -> None:
    values = {key: value for key, value in LLAMA_3_1_8B.items() if not key.startswith("rope_")}
    values["rope_parameters"] = {**LLAMA_3_1_8B["rope_scaling"], "rope_theta": 500000.0}
    assert parse_config(values) == parse_config(LLAMA_3_1_8B)


def test_generation_config_names_the_stop_tokens(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_3_1_8B))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 128009}))
    assert load_config(tmp_path).eos_ids == (128009,)


def test_every_supported_architecture_has_code() -> None:
    assert set(MODELS) == set(ARCHITECTURES)


def test_a_sliding_window_limits_the_length() -> None:
    values = {**LLAMA_3_1_8B, "architectures": ["MistralForCausalLM"], "sliding_window": 4096}
    config = parse_config(values)
    assert config.max_length() == 4096
    assert config.max_length(4096) == 4096
    with pytest.raises(ModelError, match="sliding window of 4096"):
        config.max_length(4097)
    assert parse_config({**values, "sliding_window": None}).max_length() == 131072


def test_a_length_beyond_the_positions_is_refused() -> None:
    with pytest.raises(ModelError, match="131073 is more than the model's 131072 positions"):
        parse_config(LLAMA_3_1_8B).max_length(131073)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"architectures": ["BertModel"]}, "BertModel is not supported; supported: LlamaForCausalLM, Mistral"),
        ({"architectures": None}, "none is not supported"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantized by awq"),
        ({"hidden_act": "gelu"}, "activation gelu"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_size": None}, "hidden_size must be a positive integer, not None"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive integer, not 0"),
        ({"vocab_size": "many"}, "vocab_size must be a positive integer, not 'many'"),
        ({"num_key_value_heads": 5}, "32 attention heads cannot share 5 KV heads"),
        ({"hidden_size": 4095}, "4095 is no multiple of 32 heads"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4}}, "yarn is not supported; supported: default, linear"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4}}, "llama3 lacks 'low_freq_factor'"),
        ({"rope_scaling": {"partial_rotary_factor": 0.5}}, "part of the head"),
    ],
)
def test_what_cannot_be_run_is_refused_by_name(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError) as error:
        parse_config({**LLAMA_3_1_8B, **change})
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "does not exist"), ("{", "as JSON"), ("[]", "holds a list"), ("\xff\x00", "as JSON")],
)
def test_a_folder_without_a_readable_configuration_is_refused(
    tmp_path: Path, content: str | None, said: str
) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content, encoding="latin-1")
    with pytest.raises(ModelError, match=said) as error:
        load_config(tmp_path)
    assert "config.json" in str(error.value)

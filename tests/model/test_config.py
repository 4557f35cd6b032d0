"""config.json as types, in the forms that transformers 4 and 5 write, and what is refused in it."""

import json
from pathlib import Path
from typing import Any

import pytest

from kvasir_engine.errors import ModelError
from kvasir_engine.model.config import Experts, Rope
from kvasir_engine.model.models.registry import load_config, parse_config

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


GEMMA_3_1B: dict[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"],
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "max_position_embeddings": 32768,
    "num_attention_heads": 4,
    "num_hidden_layers": 26,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "torch_dtype": "bfloat16",
    "vocab_size": 262144,
}

QWEN3_30B_A3B: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def test_llama_3_1_reads_as_published() -> None:
    config = parse_config(LLAMA_3_1_8B)
    assert config.head_dim == 128
    assert config.rope == Rope(500000.0, "llama3", 8.0, 1.0, 4.0, 8192)
    assert config.eos_ids == (128001, 128008, 128009)
    assert config.dtype == "bfloat16"
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


def test_mistral_has_its_window_in_every_layer_and_its_whole_length() -> None:
    values = {**LLAMA_3_1_8B, "architectures": ["MistralForCausalLM"], "sliding_window": 4096}
    config = parse_config(values)
    assert config.windows == (4096,) * 32
    assert config.max_length() == 131072
    assert config.positions.endswith("dim=128 windows=4096*32")
    assert parse_config({**values, "sliding_window": None}).windows == (None,) * 32


def test_gemma_3_reads_as_published() -> None:
    config = parse_config(GEMMA_3_1B)
    assert config.windows == ((512,) * 5 + (None,)) * 4 + (512, 512)
    assert (config.rope, config.local_rope) == (Rope(1_000_000.0), Rope(10_000.0))
    assert config.attention_scale == 1 / 16
    assert config.embedding_scale == 1152**0.5
    assert config.activation == "gelu_tanh"
    assert config.tied_embeddings  # though the file does not say so
    assert config.positions == (
        "rope theta=1e+06 dim=256 local rope theta=10000 "
        "windows=512*5,all*1,512*5,all*1,512*5,all*1,512*5,all*1,512*2"
    )


def test_transformers_5_says_the_same_of_gemma_3() -> None:
    older = ("rope_theta", "rope_scaling", "rope_local_base_freq", "sliding_window_pattern")
    values = {key: value for key, value in GEMMA_3_1B.items() if key not in older}
    values["rope_parameters"] = {
        "full_attention": {"rope_type": "default", "rope_theta": 1000000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    }
    kinds = (["sliding_attention"] * 5 + ["full_attention"]) * 5
    assert parse_config({**values, "layer_types": kinds[:26]}) == parse_config(GEMMA_3_1B)


def test_a_scaling_of_gemma_3_is_of_its_global_layers() -> None:
    config = parse_config({**GEMMA_3_1B, "rope_scaling": {"rope_type": "linear", "factor": 8.0}})
    assert (config.rope, config.local_rope) == (Rope(1_000_000.0, "linear", 8.0), Rope(10_000.0))


def test_qwen_windows_are_on_when_asked_for_only() -> None:
    off = {**LLAMA_3_1_8B, "architectures": ["Qwen2ForCausalLM"], "sliding_window": 4096, "max_window_layers": 30}
    assert parse_config(off).windows == (None,) * 32
    on = {**off, "use_sliding_window": True}
    assert parse_config(on).windows == (None,) * 30 + (4096,) * 2
    assert parse_config({**on, "layer_types": ["full_attention"] * 32}).windows == (None,) * 32


def test_qwen3_moe_reads_as_published() -> None:
    config = parse_config(QWEN3_30B_A3B)
    assert config.experts == Experts(128, 8, 768, True, frozenset(range(48)))
    assert config.qk_norm
    assert config.head_dim == 128
    every_second = parse_config({**QWEN3_30B_A3B, "decoder_sparse_step": 2, "mlp_only_layers": [1, 5]}).experts
    assert every_second is not None
    assert every_second.layers == frozenset(range(3, 48, 2)) - {5}


def test_models_whose_kv_differs_have_other_fingerprints() -> None:
    mistral = {**LLAMA_3_1_8B, "architectures": ["MistralForCausalLM"], "sliding_window": 4096}
    variants = [
        LLAMA_3_1_8B,
        {**LLAMA_3_1_8B, "rope_theta": 10000.0},
        {**LLAMA_3_1_8B, "head_dim": 64},
        mistral,
        {**mistral, "sliding_window": 4095},
        GEMMA_3_1B,
        {**GEMMA_3_1B, "rope_local_base_freq": 20000},
        {**GEMMA_3_1B, "sliding_window_pattern": 5},
    ]
    said = [parse_config(variant).positions for variant in variants]
    assert len(set(said)) == len(variants)


def test_a_length_beyond_the_positions_is_refused() -> None:
    with pytest.raises(ModelError, match="131073 is more than the model's 131072 positions"):
        parse_config(LLAMA_3_1_8B).max_length(131073)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"architectures": ["BertModel"]},
            "BertModel is not supported; supported: LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, "
            "Qwen3ForCausalLM, Qwen3MoeForCausalLM, Gemma3ForCausalLM",
        ),
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
    ("published", "change", "said"),
    [
        (GEMMA_3_1B, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is not supported"),
        (GEMMA_3_1B, {"final_logit_softcapping": 30.0}, "final_logit_softcapping is not supported"),
        (GEMMA_3_1B, {"use_bidirectional_attention": True}, "use_bidirectional_attention is not supported"),
        (GEMMA_3_1B, {"attention_bias": True}, "attention_bias is not supported"),
        (GEMMA_3_1B, {"hidden_activation": "relu"}, "relu is not supported; supported: silu, gelu_pytorch_tanh"),
        (GEMMA_3_1B, {"sliding_window": 0}, "sliding_window must be a positive integer, not 0"),
        (GEMMA_3_1B, {"layer_types": ["full_attention"]}, "1 layer_types for 26 layers"),
        (
            GEMMA_3_1B,
            {"layer_types": ["linear_attention"] * 26},
            "linear_attention is not supported; supported: full",
        ),
        (
            GEMMA_3_1B,
            {"architectures": ["Gemma3ForConditionalGeneration"]},
            "Gemma3ForConditionalGeneration is not",
        ),
        (QWEN3_30B_A3B, {"num_experts_per_tok": 129}, "num_experts_per_tok 129 is more than the 128 experts"),
        (QWEN3_30B_A3B, {"num_experts": 0}, "num_experts must be a positive integer, not 0"),
        (QWEN3_30B_A3B, {"attention_bias": True}, "attention_bias is not supported"),
        (QWEN3_30B_A3B, {"use_sliding_window": True, "sliding_window": -1}, "positive integer, not -1"),
    ],
)
def test_what_an_architecture_may_have_but_we_have_not_is_refused_by_name(
    published: dict[str, Any], change: dict[str, Any], said: str
) -> None:
    with pytest.raises(ModelError) as error:
        parse_config({**published, **change})
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

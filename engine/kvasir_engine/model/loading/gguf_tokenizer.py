"""The tokenizer that a GGUF file describes, built with the `tokenizers` library from the file's metadata: no torch.

The keys are those of the GGUF specification (github.com/ggml-org/ggml, docs/gguf.md); which split of the text a
`tokenizer.ggml.pre` stands for is llama.cpp's (`llama-vocab.cpp`). The result is that of transformers' own reader
of GGUF files, which imports torch.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from kvasir_engine.errors import ModelError

CONTROL, USER_DEFINED = 3, 4

_NAMED = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _SPACES
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _SPACES
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _SPACES
)
SPLITS: dict[str, str | None] = {
    **dict.fromkeys(("default", "gpt-2", "gpt2", "smollm", "mpt", "olmo"), None),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "dbrx", "smaug-bpe"), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), _QWEN2),
    "tekken": _TEKKEN,
}
"""By `tokenizer.ggml.pre` how a byte-level tokenizer splits text; None: as GPT-2 does."""


@dataclass(frozen=True)
class GGUFTokenizer:
    """What goes into `tokenizer.json`, `tokenizer_config.json` and, where there is one, `chat_template.jinja`."""

    tokenizer: Tokenizer
    config: dict[str, Any]
    chat_template: str | None

    def write(self, folder: Path) -> None:
        self.tokenizer.save(str(folder / "tokenizer.json"))
        config = json.dumps(self.config, indent=2)
        (folder / "tokenizer_config.json").write_text(config + "\n")
        if self.chat_template is not None:
            (folder / "chat_template.jinja").write_text(self.chat_template)


def build_tokenizer(metadata: Callable[[str], Any]) -> GGUFTokenizer:
    """The tokenizer of a file whose metadata are asked for by key, None where it has none. Raises ModelError."""
    kind = metadata("tokenizer.ggml.model")
    if kind not in _BUILDERS:
        raise ModelError(f"tokenizer.ggml.model is {kind!r}; supported: {', '.join(map(repr, _BUILDERS))}")
    tokens = _list(metadata, "tokenizer.ggml.tokens", str)
    if not tokens:
        raise ModelError("tokenizer.ggml.tokens is missing or empty")
    types = _list(metadata, "tokenizer.ggml.token_type", int) or [1] * len(tokens)
    if len(types) != len(tokens):
        raise ModelError(f"tokenizer.ggml.token_type has {len(types)} entries for {len(tokens)} tokens")
    named = {name: _named(metadata, key, tokens) for name, key in _NAMED.items()}
    try:
        tokenizer = _BUILDERS[kind](metadata, tokens)
    except ModelError:
        raise
    except Exception as error:  # the library's errors have no class of their own
        raise ModelError(f"its tokens and merges make no tokenizer: {error}") from None
    _add_tokens(tokenizer, tokens, types, [token for token in named.values() if token is not None])
    adds_bos = _flag(metadata, "tokenizer.ggml.add_bos_token", kind == "llama")
    adds_eos = _flag(metadata, "tokenizer.ggml.add_eos_token", False)
    tokenizer.post_processor = _around(
        tokenizer, named["bos_token"] if adds_bos else None, named["eos_token"] if adds_eos else None
    )
    config: dict[str, Any] = {"backend": "tokenizers", "tokenizer_class": "TokenizersBackend"}
    config |= {name: token for name, token in named.items() if token is not None}
    template = metadata("tokenizer.chat_template")
    if template is not None and not isinstance(template, str):
        raise ModelError("tokenizer.chat_template is no text")
    return GGUFTokenizer(tokenizer, config, template)


def _byte_level(metadata: Callable[[str], Any], tokens: list[str]) -> Tokenizer:
    pre = metadata("tokenizer.ggml.pre") or "default"
    if pre not in SPLITS:
        raise ModelError(f"tokenizer.ggml.pre is {pre!r}, a split of text that is not known; known: {_known()}")
    alphabet = stand_ins()
    known = set(alphabet.values())
    vocab = {
        token if known.issuperset(token) else "".join(alphabet[byte] for byte in token.encode()): number
        for number, token in enumerate(tokens)
    }
    merges = _merges(metadata)
    if merges is None:
        raise ModelError("tokenizer.ggml.merges is missing")
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, continuing_subword_prefix="", end_of_word_suffix="", fuse_unk=False)
    )
    split = SPLITS[pre]
    tokenizer.pre_tokenizer = (
        pre_tokenizers.ByteLevel(add_prefix_space=False)
        if split is None
        else pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(split), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(metadata: Callable[[str], Any], tokens: list[str]) -> Tokenizer:
    vocab = {token: number for number, token in enumerate(tokens)}
    merges = _merges(metadata)
    if merges is None:
        scores = _list(metadata, "tokenizer.ggml.scores", float)
        if len(scores) != len(tokens):
            raise ModelError(f"tokenizer.ggml.scores has {len(scores)} entries for {len(tokens)} tokens")
        merges = merges_of_scores(vocab, scores)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    parts = [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(content=" ", left=1),
    ]
    tokenizer.decoder = decoders.Sequence(parts)
    return tokenizer


_BUILDERS: Mapping[str, Callable[[Callable[[str], Any], list[str]], Tokenizer]] = {
    "gpt2": _byte_level,
    "llama": _sentencepiece,
}


def merges_of_scores(vocab: Mapping[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """The pairs that make each token, those of the best score first, as SentencePiece joins them.

    Equal scores: the longer halves first; else in the order of the vocabulary and the halves' numbers.
    """
    found = []
    for token, number in vocab.items():
        halves = ((token[:at], token[at:]) for at in range(1, len(token)))
        pairs = [pair for pair in halves if pair[0] in vocab and pair[1] in vocab]
        pairs.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        found += [(scores[number], pair) for pair in pairs]
    found.sort(key=lambda entry: (entry[0], len(entry[1][0]), len(entry[1][1])), reverse=True)
    return [pair for _, pair in found]


def stand_ins() -> dict[int, str]:
    """By byte the printable character that stands for it in a byte-level vocabulary (OpenAI's GPT-2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + at) for at, byte in enumerate(others)}


def _add_tokens(tokenizer: Tokenizer, tokens: list[str], types: list[int], named: list[str]) -> None:
    """What is found in a text as a whole, before it is split."""
    vocab = tokenizer.get_vocab()
    # A control token that is no key of the vocabulary would be a new one, beyond what the model knows.
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL and token in vocab]
    own = [token for token, kind in zip(tokens, types, strict=True) if kind == USER_DEFINED and token in vocab]
    special = list(dict.fromkeys([*control, *(token for token in named if token in vocab)]))
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in own if token not in special])


def _around(tokenizer: Tokenizer, bos: str | None, eos: str | None) -> processors.TemplateProcessing:
    def text(name: str, number: int) -> str:
        parts = [f"{bos}:{number}" if bos else "", f"${name}:{number}", f"{eos}:{number}" if eos else ""]
        return " ".join(part for part in parts if part)

    ids = [(token, tokenizer.token_to_id(token)) for token in dict.fromkeys((bos, eos)) if token]
    return processors.TemplateProcessing(
        single=text("A", 0), pair=f"{text('A', 0)} {text('B', 1)}", special_tokens=ids
    )


def _merges(metadata: Callable[[str], Any]) -> list[tuple[str, str]] | None:
    if metadata("tokenizer.ggml.merges") is None:
        return None
    pairs = [merge.split(" ") for merge in _list(metadata, "tokenizer.ggml.merges", str)]
    for number, pair in enumerate(pairs):
        if len(pair) != 2 or not all(pair):
            raise ModelError(f"tokenizer.ggml.merges[{number}] is no pair of tokens: {' '.join(pair)!r}")
    return [(left, right) for left, right in pairs]


def _named(metadata: Callable[[str], Any], key: str, tokens: list[str]) -> str | None:
    field = f"tokenizer.ggml.{key}_token_id"
    if (number := metadata(field)) is None:
        return None
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < len(tokens):
        raise ModelError(f"{field} is {number!r}, which is none of {len(tokens)} tokens")
    return tokens[number]


def _flag(metadata: Callable[[str], Any], key: str, default: bool) -> bool:
    value = metadata(key)
    if value is not None and not isinstance(value, bool):
        raise ModelError(f"{key} is {value!r}, not true or false")
    return default if value is None else value


def _list(metadata: Callable[[str], Any], key: str, kind: type) -> list[Any]:
    value = metadata(key)
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(each, kind) for each in value):
        raise ModelError(f"{key} is no list of {kind.__name__}")
    return value


def _known() -> str:
    return ", ".join(sorted(SPLITS))

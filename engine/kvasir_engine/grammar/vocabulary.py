"""A model's tokens as grammars use them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass


class UnfitVocabulary(ValueError):
    """Grammars cannot use these tokens."""


@dataclass(frozen=True)
class Vocabulary:
    """`tokens[i]` are the bytes that token i adds to the text: none if it is special or unused.

    `special` are the special tokens by name, `eos` the tokens that end a sequence, `size` is the model's vocabulary
    size, which may exceed the tokenizer's. `encode` tokenizes a text that continues another: it adds no prefix, and
    names of special tokens are plain text.
    """

    tokens: tuple[bytes, ...]
    special: Mapping[str, int]
    eos: tuple[int, ...]
    size: int
    encode: Callable[[str], list[int]]

    def __post_init__(self) -> None:
        if not self.eos or not all(0 <= token < self.size for token in self.eos):
            raise UnfitVocabulary("it has no token that ends a text")
        if len(self.tokens) > self.size:
            raise UnfitVocabulary("its tokenizer has more tokens than the model")

"""The tokens of a model as a grammar sees them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass


class UnfitVocabulary(ValueError):
    """No grammar can be made of these tokens."""


@dataclass(frozen=True)
class Vocabulary:
    """`tokens[i]` is what token i adds to the text: nothing where it is special or unused.

    `special` are the special tokens by name, `eos` those that end a sequence, `size` is the model's own vocabulary,
    which may be larger than the tokenizer's. `encode` gives the tokens of a text that goes on from another: nothing
    is put before it, and no name in it is a special token.
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

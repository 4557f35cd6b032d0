"""What all grammars of a vocabulary share: llguidance's tokenizer, masks, and the certain tokens of a text."""

import numpy as np
from llguidance import LLTokenizer, TokenizerWrapper
from numpy.typing import NDArray

from kvasir_engine.grammar.forced import ForcedText
from kvasir_engine.grammar.known_places import KnownPlaces
from kvasir_engine.grammar.vocabulary import Vocabulary

_SPECIAL = b"\xff"
"""llguidance's prefix of tokens that are in no text."""


class _AsLibrary:
    """A vocabulary as llguidance's TokenizerWrapper takes it."""

    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.eos_token_id = vocabulary.eos[0]
        self.tokens = list(vocabulary.tokens)
        names = {token: name for name, token in vocabulary.special.items()}
        for token in vocabulary.eos:
            names.setdefault(token, f"<eos_{token}>")
        for token, name in names.items():
            if token < len(self.tokens):
                self.tokens[token] = _SPECIAL + name.encode()
        self.special_token_ids = sorted(token for token in names if token < len(self.tokens))
        self._encode = vocabulary.encode

    def __call__(self, text: str) -> list[int]:
        return self._encode(text)


class GrammarTokens:
    """The shared state of a vocabulary's grammars. Thread-safe."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.known = len(vocabulary.tokens)
        self.words = -(-vocabulary.size // 32)
        self.eos = frozenset(vocabulary.eos)
        self.special = dict(vocabulary.special)
        self.library = LLTokenizer(
            TokenizerWrapper(_AsLibrary(vocabulary)), n_vocab=vocabulary.size, eos_token=list(vocabulary.eos)
        )
        self.eos_mask = self._mask(vocabulary.eos)
        self.text_mask = self._mask(tuple(range(len(vocabulary.tokens)))) & ~self.eos_mask
        self.forced = ForcedText(vocabulary.tokens, vocabulary.encode)
        self.places = KnownPlaces()

    def spelled(self, text: bytes) -> list[int]:
        """Tokens that spell a text; not necessarily the tokenizer's."""
        return self.library.greedy_tokenize(text.decode()) if text.isascii() else self.library.tokenize_bytes(text)

    def _mask(self, tokens: tuple[int, ...]) -> NDArray[np.int32]:
        bits = np.zeros(self.words * 32, np.uint8)
        bits[list(tokens)] = 1
        return np.packbits(bits, bitorder="little").view(np.int32)

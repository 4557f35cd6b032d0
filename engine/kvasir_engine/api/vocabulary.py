"""A served model's tokens for grammars."""

from kvasir_engine.api.tokenizer import ServedModel
from kvasir_engine.grammar.vocabulary import Vocabulary


def vocabulary_of(model: ServedModel) -> Vocabulary:
    """The vocabulary; takes a fraction of a second. Raises UnfitVocabulary for a model without an end token."""
    tokenizer = model.tokenizer
    return Vocabulary(
        tokens=tuple(map(tokenizer.token_bytes, range(min(tokenizer.size, model.vocab_size)))),
        special={name: token for name, token in tokenizer.special_tokens.items() if token < model.vocab_size},
        eos=tuple(token for token in model.eos if 0 <= token < model.vocab_size),
        size=model.vocab_size,
        encode=tokenizer.continuation(),
    )

"""Makes the grammar service of a worker from its model's folder."""

import logging
from dataclasses import replace
from pathlib import Path

from kvasir_engine.core.grammar_service import GrammarService
from kvasir_engine.errors import UserError

log = logging.getLogger("worker")


def grammar_service(folder: Path, vocab: int, jump: bool) -> GrammarService | None:
    """The service for a model with so many columns of logits; None, and a log line, if its tokens are unfit."""
    from kvasir_engine.api.plain_tokenizer import load_plain_model
    from kvasir_engine.api.vocabulary import vocabulary_of
    from kvasir_engine.grammar.compiler import GuidanceCompiler

    try:
        model = replace(load_plain_model(folder), vocab_size=vocab)
        return GrammarService(GuidanceCompiler(vocabulary_of(model)), vocab, jump)
    except (UserError, ValueError) as error:
        log.warning("grammars off: requests with one are refused reason=%r", str(error))
        return None

"""Checks that a request's logits processors fit the model and leave a token to choose. Pure."""

from collections.abc import Sequence

from kvasir_engine.protocol import Sampling


def fault_of_processors(sampling: Sampling, vocab: int) -> tuple[str, str] | None:
    """The field of `sampling.processors` that does not fit a model of `vocab` tokens, and the reason; or None."""
    processors = sampling.processors
    if processors is None:
        return None
    allowed = processors.allowed_token_ids
    named: list[tuple[str, Sequence[int]]] = [
        ("logit_bias", [token for token, _ in processors.logit_bias]),
        ("bad_words", [token for word in processors.bad_words for token in word]),
        ("allowed_token_ids", allowed or []),
    ]
    for field, tokens in named:
        if tokens and not 0 <= min(tokens) <= max(tokens) < vocab:
            wrong = min(tokens) if min(tokens) < 0 else max(tokens)
            return field, f"{wrong} is no token: they are from 0 to {vocab - 1}"
    if len({token for token, _ in processors.logit_bias}) < len(processors.logit_bias):
        return "logit_bias", "a token is named twice"
    # Each may be impossible at one time or another; were all of them so at once, no token could be chosen.
    barred = {word[-1] for word in processors.bad_words}
    if sampling.min_tokens:
        barred.update(sampling.stop_token_ids)
    if allowed is not None and barred.issuperset(allowed):
        return "allowed_token_ids", "bad_words and min_tokens leave none of them"
    if processors.bad_words and len(barred) >= vocab:
        return "bad_words", "they leave no token"
    return None

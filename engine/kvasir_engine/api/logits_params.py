"""Penalties, biases, and allowed and banned words and tokens: from a request's body to the wire. Pure."""

import re

import msgspec

from kvasir_engine.api.errors import bad_request
from kvasir_engine.api.ranges import few, short, shown_number, within
from kvasir_engine.api.schemas import CommonRequest
from kvasir_engine.api.tokenizer import ServedModel, Tokenizer
from kvasir_engine.bounds import LEAST_REPETITION, MOST_BIAS, MOST_BIASES, MOST_PENALTY, MOST_REPETITION
from kvasir_engine.protocol import LogitsProcessors, Sampling
from kvasir_engine.sampling.processor_validation import fault_of_processors

MOST_BAD_WORDS = 128
MOST_BAD_WORD_CHARACTERS = 100
_TOKEN = re.compile(r"0|[1-9][0-9]{0,9}")


def with_processors(sampling: Sampling, request: CommonRequest, model: ServedModel) -> Sampling:
    """`sampling` with the logits processors of the request. Raises ApiError."""
    presence, frequency = request.presence_penalty or 0.0, request.frequency_penalty or 0.0
    repetition = 1.0 if request.repetition_penalty is None else request.repetition_penalty
    within("presence_penalty", presence, -MOST_PENALTY, MOST_PENALTY)
    within("frequency_penalty", frequency, -MOST_PENALTY, MOST_PENALTY)
    within("repetition_penalty", repetition, LEAST_REPETITION, MOST_REPETITION)
    allowed = request.allowed_token_ids
    if allowed is not None:
        few("allowed_token_ids", len(allowed), model.vocab_size)
        if not allowed:
            raise bad_request(
                "Invalid 'allowed_token_ids': it cannot be empty.", "allowed_token_ids", "empty_array"
            )
        for token in allowed:
            _known("allowed_token_ids", token, model)
    processors = LogitsProcessors(
        presence_penalty=presence,
        frequency_penalty=frequency,
        repetition_penalty=repetition,
        logit_bias=_biases(request.logit_bias or {}, model),
        bad_words=_bad_words(request.bad_words or [], model.tokenizer),
        allowed_token_ids=allowed if allowed is None else sorted(set(allowed)),
    )
    if processors == LogitsProcessors():
        return sampling
    sampling = msgspec.structs.replace(sampling, processors=processors)
    fault = fault_of_processors(sampling, model.vocab_size)
    if fault is not None:
        raise bad_request(f"Invalid '{fault[0]}': {fault[1]}.", fault[0])
    return sampling


def _known(field: str, token: int, model: ServedModel) -> None:
    if not 0 <= token < model.vocab_size:
        raise bad_request(f"Invalid '{field}': {shown_number(token)} is not a token of this model.", field)


def _biases(logit_bias: dict[str, float], model: ServedModel) -> list[tuple[int, float]]:
    few("logit_bias", len(logit_bias), MOST_BIASES)
    biases = []
    for key, bias in logit_bias.items():
        if not _TOKEN.fullmatch(key):
            shown = key if len(key) <= 40 else key[:40] + "..."
            raise bad_request(f"Invalid 'logit_bias': the key {shown!r} is not a token id.", "logit_bias")
        _known("logit_bias", int(key), model)
        within("logit_bias", bias, -MOST_BIAS, MOST_BIAS)
        biases.append((int(key), float(bias)))
    return [(token, bias) for token, bias in biases if bias]


def _bad_words(words: list[str], tokenizer: Tokenizer) -> list[list[int]]:
    """Token sequences of the words: of each as it is, and with a space before it, as in a sentence."""
    few("bad_words", len(words), MOST_BAD_WORDS)
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        short("bad_words", word, MOST_BAD_WORD_CHARACTERS)
        if not word.strip():
            raise bad_request("Invalid 'bad_words': a word cannot be empty.", "bad_words", "empty_string")
        special = tokenizer.special_token(word)
        if special is not None:
            found[(special,)] = None
            continue
        for text in (word.lstrip(), " " + word.lstrip()):
            found[tuple(tokenizer.bare(text))] = None
    return [list(word) for word in found if word]

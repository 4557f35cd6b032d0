"""How likely choices are, from the answers of an endpoint. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from kvasir.program.expressions import Normalize

T = TypeVar("T")


class Unscored(Exception):
    """The answer lacks the log-probabilities that were requested; the message says which."""


class PartlyScored(Unscored):
    """Some of the tokens that count have no log-probability."""

    def __init__(self) -> None:
        super().__init__("the prompt's tokens have no log-probabilities")


@dataclass(frozen=True)
class ScoredToken:
    """A token of a prompt: `key` identifies it; `logprob` is `None` for the first."""

    key: str
    logprob: float | None


@dataclass(frozen=True)
class ScoredChoice:
    """The tokens of a prompt that ends with a choice. `begin`: the first token that has text of the choice."""

    tokens: tuple[ScoredToken, ...]
    begin: int


class EchoLogprobs(msgspec.Struct, frozen=True):
    tokens: list[str]
    token_logprobs: list[float | None]
    text_offset: list[int]


class EchoChoice(msgspec.Struct, frozen=True):
    text: str
    index: int = 0
    logprobs: EchoLogprobs | None = None


class EchoAnswer(msgspec.Struct, frozen=True):
    choices: list[EchoChoice]


class PromptToken(msgspec.Struct, frozen=True):
    logprob: float
    decoded_token: str | None = None


PromptLogprobs = list[dict[str, PromptToken] | None]


class PromptLogprobsChoice(msgspec.Struct, frozen=True):
    prompt_logprobs: PromptLogprobs | None = None
    prompt_token_ids: list[int] | None = None


class PromptLogprobsAnswer(msgspec.Struct, frozen=True):
    choices: list[PromptLogprobsChoice]
    prompt_logprobs: PromptLogprobs | None = None
    prompt_token_ids: list[int] | None = None


class ChatTop(msgspec.Struct, frozen=True):
    token: str
    logprob: float


class ChatToken(msgspec.Struct, frozen=True):
    top_logprobs: list[ChatTop] = []


class NextLogprobs(msgspec.Struct, frozen=True):
    """Log-probabilities of an answer: completions have `top_logprobs`, chats `content`."""

    top_logprobs: list[dict[str, float] | None] | None = None
    content: list[ChatToken] | None = None


class NextChoice(msgspec.Struct, frozen=True):
    logprobs: NextLogprobs | None = None


class NextAnswer(msgspec.Struct, frozen=True):
    choices: list[NextChoice]


def scored_by_echo(body: bytes, prompt: str, choices: Sequence[str]) -> list[ScoredChoice]:
    """The scored choices in an answer with `echo` and `logprobs`, whose prompts end with one choice each. Raises
    Unscored."""
    answer = sorted(_decoded(body, EchoAnswer).choices, key=lambda each: each.index)
    if len(answer) != len(choices):
        raise Unscored(f"{len(answer)} answers to {len(choices)} prompts")
    return [_scored_echo(one, prompt, choice) for one, choice in zip(answer, choices, strict=True)]


def _scored_echo(answer: EchoChoice, prompt: str, choice: str) -> ScoredChoice:
    scores, whole = answer.logprobs, prompt + choice
    if scores is None or not answer.text.startswith(whole):
        raise Unscored("the prompt's log-probabilities are not in the answer")
    count = len(scores.tokens)
    if not count == len(scores.token_logprobs) == len(scores.text_offset):
        raise Unscored("the lists of tokens, log-probabilities and offsets differ in length")
    shift = 0
    text = "".join(scores.tokens)
    if count > 1 and not text.startswith(whole) and text[len(scores.tokens[0]) :].startswith(whole):
        shift = scores.text_offset[1]  # a token such as BOS at the start, which is not in the text
    offsets = [each - shift for each in scores.text_offset]
    last = next((place for place in range(count) if offsets[place] >= len(whole)), count)
    ends = [*offsets[1:last], len(whole)]
    begin = next((place for place in range(last) if ends[place] > len(prompt)), last)
    tokens = [ScoredToken(*each) for each in zip(scores.tokens[:last], scores.token_logprobs[:last], strict=True)]
    if begin == last or begin == 0 or any(each.logprob is None for each in tokens[max(begin, 1) :]):
        raise PartlyScored
    return ScoredChoice(tuple(tokens), begin)


def scored_by_prompt_logprobs(body: bytes, choice: str) -> ScoredChoice:
    """The scored choice in an answer with vLLM's `prompt_logprobs`, whose prompt ends with it. Raises Unscored."""
    answer = _decoded(body, PromptLogprobsAnswer)
    found = answer.prompt_logprobs or (answer.choices[0].prompt_logprobs if answer.choices else None)
    if not found or len(found) < 2 or not any(found):
        raise Unscored("prompt_logprobs are not in the answer")
    ids = answer.prompt_token_ids or (answer.choices[0].prompt_token_ids if answer.choices else None) or []
    if any(not each for each in found[1:]) and len(ids) != len(found):
        raise PartlyScored  # the other tokens cannot be compared
    tokens, texts = [], []
    for place, each in enumerate(found):
        key, token = next(iter(each.items())) if each else ("", None)  # the prompt's own token is the first
        tokens.append(ScoredToken(str(ids[place]) if ids else key, token.logprob if token else None))
        texts.append((token.decoded_token if token else None) or "")
    begin, tail = len(tokens), ""
    while begin > 1 and len(tail) < len(choice):
        begin -= 1
        tail = texts[begin] + tail
    if not tail.endswith(choice):
        begin = len(tokens)  # the texts do not match: compare the tokens that differ
    return ScoredChoice(tuple(tokens), begin)


def scores_of(scored: Sequence[ScoredChoice], normalize: Normalize) -> list[float]:
    """A score for each choice; the most likely choice has the highest.

    Tokens before the first one that differs are equally likely in all prompts; they count only if they have text of
    a choice. If one choice is a prefix of another, it has at least one token less. Raises Unscored if a token that
    counts has no log-probability.
    """
    alike = 0
    shortest = min(len(each.tokens) for each in scored)
    while alike < shortest and len({each.tokens[alike].key for each in scored}) == 1:
        alike += 1
    begin = max(1, min(alike, *(each.begin for each in scored)))
    found = []
    for each in scored:
        logprobs = [token.logprob for token in each.tokens[begin:] if token.logprob is not None]
        if len(logprobs) < len(each.tokens) - begin:
            raise PartlyScored
        total = sum(logprobs)
        found.append(total / len(logprobs) if normalize == "tokens" and logprobs else total)
    return found


def next_tokens(body: bytes) -> dict[str, float]:
    """The likeliest next tokens in an answer of one token: text to log-probability. Raises Unscored."""
    answer = _decoded(body, NextAnswer)
    scores = answer.choices[0].logprobs if answer.choices else None
    if scores is not None and scores.top_logprobs:
        return dict(scores.top_logprobs[0] or {})
    if scores is not None and scores.content:
        return {each.token: each.logprob for each in scores.content[0].top_logprobs}
    raise Unscored("the next token's log-probabilities are not in the answer")


def likeliest_continuation(left: Sequence[str], tokens: dict[str, float]) -> tuple[str, float] | None:
    """The likeliest token that is a prefix of a text of `left`, or begins with one of them; `None` if there is
    none.

    Returns the part of the token that belongs to that text, and the log-probability.
    """
    best: tuple[str, float] | None = None
    for token, logprob in tokens.items():
        taken = next((token for text in left if token and text.startswith(token)), None)
        taken = taken or next((text for text in left if text and token.startswith(text)), None)
        if taken and (best is None or logprob > best[1]):
            best = (taken, logprob)
    return best


def _decoded(body: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.DecodeError as error:
        raise Unscored(f"the answer is not as OpenAI's: {error}") from None

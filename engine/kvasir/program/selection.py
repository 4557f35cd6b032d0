"""The methods to find the most likely of some choices, and which of them an endpoint supports."""

import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from kvasir.program.errors import ProgramError
from kvasir.program.expressions import METHODS, Method, Select
from kvasir.program.likelihood import (
    PartlyScored,
    Unscored,
    likeliest_continuation,
    next_tokens,
    scored_by_echo,
    scored_by_prompt_logprobs,
    scores_of,
)
from kvasir.program.transcript import Transcript, constraint
from kvasir_engine.client.chunks import CallUsage
from kvasir_engine.client.connection import CallError

Ask = Callable[[str, dict[str, Any]], Awaitable[bytes]]
"""Sends a body without the model to a path; returns the body of the answer."""

REFUSALS = frozenset({400, 404, 405, 415, 422, 500, 501})
"""Statuses with which endpoints refuse a field that they do not know; some fail with 500."""
TOP_COMPLETIONS, TOP_CHAT = 5, 20
_HALF = math.log(0.5)
START = "logprob_start_len"
"""SGLang's field: the token of the prompt at which its log-probabilities start; negative counts from the end."""
MARGIN = 8
"""How many tokens before a choice are scored too: tokens at the end of the prompt may merge with the choice."""


@dataclass
class Selected:
    """The choice, and the method that found it. `scores` are the choices' log-likelihoods, if the method gives
    them."""

    choice: str
    method: Method
    scores: dict[str, float] = field(default_factory=dict)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    calls: int = 0


class Selector:
    """Chooses by the first method that the endpoint supports. A method that it does not support is not tried
    again."""

    def __init__(self) -> None:
        self._unknown: set[tuple[str, Method]] = set()
        self._whole: set[str] = set()  # the paths that score only whole prompts

    async def select(self, ask: Ask, transcript: Transcript, select: Select) -> Selected:
        """Find the most likely choice. Raises ProgramError if no method works, CallError if the endpoint fails."""
        path, counted = transcript.path, _CountingAsk(ask, self._whole)
        transcript.body()  # a faulty transcript is no reason to rule out a method
        methods = [select.method] if select.method != "auto" else [
            each for each in METHODS if (path, each) not in self._unknown
        ]  # fmt: skip
        reasons: list[str] = []
        refused: list[Method] = []
        for method in methods:
            try:
                choice, scores = await _METHODS[method](counted, transcript, select)
            except Unscored as error:
                reasons.append(f"{method}: {error}")
            except CallError as error:
                if error.status not in REFUSALS:
                    raise
                reasons.append(f"{method}: {error.kind}: {error}")
                refused.append(method)
            else:
                # only now: if all methods are refused, the body itself may be at fault
                self._unknown |= {(path, each) for each in refused}
                return Selected(choice, method, scores, **counted.usage)
        raise ProgramError(f"the endpoint can choose by no method ({'; '.join(reasons)})")


class _CountingAsk:
    """Sends requests and counts their tokens. `whole`: the paths that score only whole prompts."""

    def __init__(self, ask: Ask, whole: set[str]) -> None:
        self._ask = ask
        self.whole = whole
        self.usage = {"prompt_tokens": 0, "cached_tokens": 0, "completion_tokens": 0, "calls": 0}

    async def __call__(self, path: str, body: dict[str, Any]) -> bytes:
        answer = await self._ask(path, body)
        try:
            used = msgspec.json.decode(answer, type=_UsageOnly).usage or CallUsage()
        except msgspec.DecodeError:
            used = CallUsage()
        self.usage["calls"] += 1
        self.usage["prompt_tokens"] += used.prompt_tokens
        self.usage["cached_tokens"] += used.cached
        self.usage["completion_tokens"] += used.completion_tokens or 0
        return answer


class _UsageOnly(msgspec.Struct, frozen=True):
    usage: CallUsage | None = None


Found = tuple[str, dict[str, float]]


_Choose = Callable[[_CountingAsk, Transcript, Select], Awaitable[Found]]
_Scoring = Callable[[_CountingAsk, Transcript, Select, dict[str, Any]], Awaitable[Found]]


def _scoring_tail_first(scoring: _Scoring, field: str) -> _Choose:
    """A method that scores only the last tokens of the prompt, so that the ones before can come from the cache. It
    scores the whole prompt if the endpoint cannot do that, or if earlier tokens differ. `field` is what `scoring`
    sends."""

    async def way(ask: _CountingAsk, transcript: Transcript, select: Select) -> Found:
        refused = False
        if transcript.path not in ask.whole:
            tail = max(len(choice.encode()) for choice in select.choices) + MARGIN  # a token is a byte at least
            try:
                return await scoring(ask, transcript, select, {START: -tail})
            except PartlyScored:
                pass
            except CallError as error:
                known = error.status in REFUSALS and field not in str(error)
                if not known and START not in str(error):
                    raise
                refused = known
        found = await scoring(ask, transcript, select, {})
        if refused:
            ask.whole.add(transcript.path)
        return found

    return way


async def _by_echo(ask: _CountingAsk, transcript: Transcript, select: Select, start: dict[str, Any]) -> Found:
    """One request for all choices: completions echo each prompt with its log-probabilities."""
    if transcript.path != "completions":
        raise Unscored("only completions echo a prompt")
    prompts = [transcript.text + choice for choice in select.choices]
    body = {"prompt": prompts, "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1, **start}
    scored = scored_by_echo(await ask("completions", body), transcript.text, select.choices)
    return _most_likely(select, scores_of(scored, select.normalize))


async def _by_prompt_logprobs(
    ask: _CountingAsk, transcript: Transcript, select: Select, start: dict[str, Any]
) -> Found:
    """One request for each choice, with vLLM's `prompt_logprobs`. In a chat the choice is the end of the
    assistant's message."""
    scored, more = [], {**start, "return_token_ids": True} if start else {}
    for choice in select.choices:
        body = {**transcript.add(choice).body(), "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0, **more}
        scored.append(scored_by_prompt_logprobs(await ask(transcript.path, body), choice))
    return _most_likely(select, scores_of(scored, select.normalize))


async def _by_greedy(ask: _CountingAsk, transcript: Transcript, select: Select) -> Found:
    """Token by token: take the likeliest next token that fits a choice, until one choice is left."""
    chat = transcript.path != "completions"
    top: dict[str, Any] = {"logprobs": True, "top_logprobs": TOP_CHAT} if chat else {"logprobs": TOP_COMPLETIONS}
    taken, left = "", list(select.choices)
    while len(left) > 1:
        body = {**transcript.add(taken).body(), "max_tokens": 1, "temperature": 0, **top}
        tokens = next_tokens(await ask(transcript.path, body))
        rest = [each.removeprefix(taken) for each in left]
        found = likeliest_continuation(rest, tokens)
        if "" in rest and (found is None or found[1] < _HALF):
            return taken, {}  # the text more likely ends here than continues
        if found is None:
            raise Unscored(f"none of the {TOP_CHAT if chat else TOP_COMPLETIONS} likeliest tokens begins a choice")
        taken += found[0]
        left = [each for each in left if each.startswith(taken)]
    return left[0], {}


async def _by_grammar(ask: _CountingAsk, transcript: Transcript, select: Select) -> Found:
    """The endpoint's structured output with temperature 0."""
    body = {**transcript.body(), "temperature": 0, "max_tokens": max(map(len, select.choices)) + 8}
    answer = await ask(transcript.path, {**body, **constraint(transcript.path, choices=select.choices)})
    try:
        first = msgspec.json.decode(answer, type=_Answered).choices[0]
    except (msgspec.DecodeError, IndexError) as error:
        raise Unscored(f"the answer is not as OpenAI's: {error}") from None
    text = first.text if first.message is None else first.message.content
    if text not in select.choices:
        raise Unscored(f"the answer {text!r} is none of the choices")
    return text, {}


class _Message(msgspec.Struct, frozen=True):
    content: str | None = None


class _AnsweredChoice(msgspec.Struct, frozen=True):
    text: str | None = None
    message: _Message | None = None


class _Answered(msgspec.Struct, frozen=True):
    choices: list[_AnsweredChoice]


def _most_likely(select: Select, scores: list[float]) -> Found:
    by_choice = dict(zip(select.choices, scores, strict=True))
    return max(by_choice, key=by_choice.__getitem__), by_choice


_METHODS: dict[Method, _Choose] = {
    "echo": _scoring_tail_first(_by_echo, "echo"),
    "prompt_logprobs": _scoring_tail_first(_by_prompt_logprobs, "prompt_logprobs"),
    "greedy": _by_greedy,
    "structured": _by_grammar,
}

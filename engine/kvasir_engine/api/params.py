"""Converts a request's body to sampling parameters. Pure. Refuses what cannot be honoured."""

import dataclasses
import math
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b

import msgspec

from kvasir_engine.api.errors import bad_request, unsupported
from kvasir_engine.api.logits_params import with_processors
from kvasir_engine.api.ranges import few, short, shown_number, within
from kvasir_engine.api.schemas import ChatRequest, CommonRequest, CompletionRequest
from kvasir_engine.api.structured import grammar_of
from kvasir_engine.api.tokenizer import ServedModel
from kvasir_engine.bounds import INT32, MOST_PRIORITY, MOST_PROMPT_LOGPROBS
from kvasir_engine.protocol import Sampling

MOST_STOPS = 4
MOST_STOP_CHARACTERS = 1000
MOST_STOP_TOKENS = 1000
MOST_LABEL = 1000
MOST_METADATA = 16
MOST_CHOICES = 128
MOST_TOP_LOGPROBS = 20
MOST_COMPLETION_LOGPROBS = 5
MOST_PROMPT_SCORES = 1 << 17
"""Most log-probabilities of prompts in one answer, including those of alternatives."""
COMPLETION_MAX_TOKENS = 16
_SEEDS = 2**63
_INT64 = (-(2**63), 2**63 - 1)


@dataclass(frozen=True)
class Params:
    """What holds for every choice of one request. `max_tokens` is the caller's, `None` for all the room there is;
    `sampling.max_tokens` is set when the prompt's length is known. Of `candidates` for each prompt the `n` best are
    shown, with `logprobs` where they are asked for. `truncate`: how many of a prompt's last tokens count.
    `grammar_field`: the one that asked for the sampling's grammar. `prompt_logprobs`: how many alternatives of a
    prompt's tokens are shown, `echo_logprobs`: how many of the echoed ones; None: nothing is; `logprob_start`: from
    which place in the prompt on, from its end where it is negative. `silent`: nothing is generated but a token that
    nobody sees."""

    sampling: Sampling
    stop: tuple[str, ...]
    n: int
    max_tokens: int | None
    stream: bool
    include_usage: bool
    priority: int = 0
    continuous_usage: bool = False
    candidates: int = 1
    logprobs: int | None = None
    truncate: int | None = None
    token_ids: bool = False
    cache_salt: str = ""
    grammar_field: str = ""
    prompt_logprobs: int | None = None
    echo_logprobs: int | None = None
    logprob_start: int = 0
    silent: bool = False


def only(name: str, value: object, *neutral: object) -> None:
    """Accept null and the `neutral` values of an unsupported field, and refuse all others."""
    if value is not None and value not in neutral:
        raise unsupported(name)


def _stops(stop: str | list[str] | None) -> tuple[str, ...]:
    stops = [stop] if isinstance(stop, str) else stop or []
    few("stop", len(stops), MOST_STOPS)
    if "" in stops:
        raise bad_request("Invalid 'stop': a stop string cannot be empty.", "stop", "empty_string")
    for each in stops:
        short("stop", each, MOST_STOP_CHARACTERS)
    return tuple(stops)


def _params(
    request: CommonRequest,
    model: ServedModel,
    logprobs: int | None,
    max_tokens: int | None,
    silent: bool = False,
) -> Params:
    short("user", request.user, MOST_LABEL)
    temperature = 1.0 if request.temperature is None else request.temperature
    top_p = 1.0 if request.top_p is None else request.top_p
    top_k = 0 if request.top_k in (None, -1) else request.top_k or 0
    min_p = request.min_p or 0.0
    min_tokens = request.min_tokens or 0
    n = 1 if request.n is None else request.n
    within("temperature", temperature, 0, 2)
    within("top_p", top_p, 0, 1)
    within("top_k", top_k, 0, INT32)
    within("min_p", min_p, 0, 1)
    within("min_tokens", min_tokens, 0, INT32)
    within("priority", request.priority or 0, -MOST_PRIORITY - 1, MOST_PRIORITY)
    within("n", n, 1, MOST_CHOICES)
    if request.max_tokens is not None:
        within("max_tokens", request.max_tokens, 0 if silent else 1, INT32)
    if request.prompt_logprobs is not None:
        within("prompt_logprobs", request.prompt_logprobs, 0, min(MOST_PROMPT_LOGPROBS, model.vocab_size))
    if max_tokens is not None:
        within("min_tokens", min_tokens, 0, max_tokens)
    truncate = request.truncate_prompt_tokens
    if truncate is not None and truncate != -1:
        within("truncate_prompt_tokens", truncate, 1, math.inf)
    short("cache_salt", request.cache_salt, MOST_LABEL)
    if request.cache_salt == "":
        raise bad_request("Invalid 'cache_salt': it cannot be empty.", "cache_salt", "empty_string")
    if request.stream_options is not None and not request.stream:
        raise bad_request(
            "The 'stream_options' parameter is only allowed when 'stream' is enabled.", "stream_options"
        )
    if request.stream_options is not None:
        only("stream_options.include_obfuscation", request.stream_options.include_obfuscation, False)
        if request.stream_options.continuous_usage_stats and not request.stream_options.include_usage:
            name = "stream_options.continuous_usage_stats"
            raise bad_request(f"'{name}' is only allowed when 'stream_options.include_usage' is enabled.", name)
    stop_token_ids = request.stop_token_ids or []
    for token in stop_token_ids:
        if not 0 <= token < model.vocab_size:
            raise bad_request(
                f"Invalid 'stop_token_ids': {shown_number(token)} is not a token of this model.", "stop_token_ids"
            )
    stops = _stops(request.stop)
    # Their text is not shown, so it cannot be searched for.
    special = [token for token in map(model.tokenizer.special_token, stops) if token is not None]
    few("stop_token_ids", len(stop_token_ids), MOST_STOP_TOKENS)
    ends = [*([] if request.ignore_eos else model.eos), *stop_token_ids, *special]
    if request.seed is not None:
        within("seed", request.seed, *_INT64)
    seed = secrets.randbits(63) if request.seed is None else request.seed
    sampling = Sampling(
        max_tokens=0,
        # a nucleus of no mass holds the most likely token alone: that is greedy
        temperature=0.0 if top_p == 0 else temperature,
        top_p=1.0 if top_p == 0 else top_p,
        top_k=top_k,
        min_p=min_p,
        seed=seed,
        min_tokens=min_tokens,
        stop_token_ids=list(dict.fromkeys(ends)),
        logprobs=logprobs,
        prompt_logprobs=request.prompt_logprobs,
    )
    sampling = with_processors(sampling, request, model)
    requested = grammar_of(request, model.json_whitespace)
    if requested is not None:
        sampling = msgspec.structs.replace(sampling, grammar=requested[1])
    return Params(
        sampling=sampling,
        stop=stops,
        n=n,
        max_tokens=1 if silent else max_tokens,
        stream=bool(request.stream),
        include_usage=bool(request.stream_options and request.stream_options.include_usage),
        priority=request.priority or 0,
        continuous_usage=bool(request.stream_options and request.stream_options.continuous_usage_stats),
        candidates=n,
        logprobs=logprobs,
        truncate=truncate,
        token_ids=bool(request.return_token_ids),
        cache_salt=request.cache_salt or "",
        grammar_field="" if requested is None else requested[0],
        prompt_logprobs=request.prompt_logprobs,
        silent=silent,
    )


def check_metadata(metadata: dict[str, str] | None) -> None:
    """Raise ApiError where there are too many labels, or one is too long."""
    few("metadata", len(metadata or {}), MOST_METADATA)
    for key, value in (metadata or {}).items():
        short("metadata", key, MOST_LABEL)
        short("metadata", value, MOST_LABEL)


def chat_params(request: ChatRequest, model: ServedModel) -> Params:
    """The parameters of a chat. Raises ApiError for what is out of range or not supported."""
    short("safety_identifier", request.safety_identifier, MOST_LABEL)
    short("prompt_cache_key", request.prompt_cache_key, MOST_LABEL)
    check_metadata(request.metadata)
    if request.max_completion_tokens is not None:
        if request.max_tokens is not None:
            raise bad_request(
                "Setting 'max_tokens' and 'max_completion_tokens' at the same time is not supported.", "max_tokens"
            )
        within("max_completion_tokens", request.max_completion_tokens, 1, INT32)
    if request.top_logprobs is not None:
        if not request.logprobs:
            raise bad_request("'top_logprobs' is only allowed when 'logprobs' is enabled.", "top_logprobs")
        within("top_logprobs", request.top_logprobs, 0, MOST_TOP_LOGPROBS)
    only("store", request.store, False)
    only("service_tier", request.service_tier, "auto", "default")
    only("modalities", request.modalities, ["text"])
    only("verbosity", request.verbosity, "medium")
    only("functions", request.functions, [])
    only("function_call", request.function_call, "none", "auto")
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    max_tokens = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
    return _starting(_params(request, model, logprobs, max_tokens), request.logprob_start_len)


def completion_params(request: CompletionRequest, model: ServedModel) -> Params:
    """The parameters of a completion. Raises ApiError for what is out of range or not supported."""
    if request.logprobs is not None:
        within("logprobs", request.logprobs, 0, MOST_COMPLETION_LOGPROBS)
    only("suffix", request.suffix, "")
    max_tokens = COMPLETION_MAX_TOKENS if request.max_tokens is None else request.max_tokens
    params = _params(request, model, request.logprobs, max_tokens, silent=bool(request.echo) and max_tokens == 0)
    if request.echo and request.logprobs is not None:
        most = max(request.logprobs, params.prompt_logprobs or 0)
        sampling = msgspec.structs.replace(params.sampling, prompt_logprobs=most)
        params = dataclasses.replace(params, sampling=sampling, echo_logprobs=request.logprobs)
    params = _starting(params, request.logprob_start_len)
    return params if request.best_of is None else _best_of(params, request.best_of)


def _best_of(params: Params, candidates: int) -> Params:
    """`params` with so many candidates; their logprobs decide which are best."""
    within("best_of", candidates, params.n, MOST_CHOICES)
    if candidates == params.n:
        return params
    if params.stream:
        raise bad_request("'best_of' above 'n' is not allowed when 'stream' is enabled.", "best_of")
    sampling = msgspec.structs.replace(params.sampling, logprobs=params.logprobs or 0)
    return dataclasses.replace(params, candidates=candidates, sampling=sampling)


def _starting(params: Params, start: int | None) -> Params:
    """`params` with log-probabilities of the prompt's tokens from the place `start`."""
    if start is None:
        return params
    within("logprob_start_len", start, -INT32, INT32)
    if params.sampling.prompt_logprobs is None:
        message = "'logprob_start_len' is only allowed with 'prompt_logprobs', or with 'echo' and 'logprobs'."
        raise bad_request(message, "logprob_start_len")
    return dataclasses.replace(params, logprob_start=start)


def scored_from(params: Params, tokens: int) -> int:
    """The place in a prompt of so many `tokens` where its log-probabilities begin; at most `tokens`."""
    start = params.logprob_start
    return min(tokens, start) if start >= 0 else max(0, tokens + start)


def check_prompt_scores(params: Params, prompts: Iterable[int]) -> None:
    """Raise ApiError where prompts of these lengths have more log-probabilities than an answer may."""
    requested = params.sampling.prompt_logprobs
    tokens = sum(each - scored_from(params, each) for each in prompts)
    if requested is None or (scores := tokens * params.candidates * (1 + requested)) <= MOST_PROMPT_SCORES:
        return
    name = "echo" if params.prompt_logprobs is None else "prompt_logprobs"
    message = (
        f"Invalid '{name}': an answer has at most {MOST_PROMPT_SCORES} log-probabilities of prompts; "
        f"{tokens} tokens with {requested} alternatives each, {params.candidates} times, are {scores}."
    )
    raise bad_request(message, name, "integer_above_max_value")


def choice_seed(seed: int, choice: int) -> int:
    """The seed of one of `n` choices. The first has the request's own, so n=1 and n=2 agree on it."""
    if choice == 0:
        return seed
    digest = blake2b(f"{seed}/{choice}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % _SEEDS

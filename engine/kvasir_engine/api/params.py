"""From a request's body to what the engine is asked. Pure. Refuses what cannot be honoured."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

from kvasir_engine.api.errors import ApiError, bad_request, unsupported
from kvasir_engine.api.schemas import ChatRequest, CommonRequest, CompletionRequest, ContentPart
from kvasir_engine.bounds import INT32, MOST_PRIORITY, MOST_STOP_IDS
from kvasir_engine.protocol import Sampling

MOST_STOPS = 4
MOST_CHOICES = 128
MOST_TOP_LOGPROBS = 20
MOST_COMPLETION_LOGPROBS = 5
COMPLETION_MAX_TOKENS = 16
_SEEDS = 2**63


@dataclass(frozen=True)
class Params:
    """What holds for every choice of one request. `max_tokens` is the caller's, `None` for all the room there is;
    `sampling.max_tokens` is set when the prompt's length is known."""

    sampling: Sampling
    stop: tuple[str, ...]
    n: int
    max_tokens: int | None
    stream: bool
    include_usage: bool
    priority: int = 0


def _shown(value: float) -> str:
    """A number as a message has it; of one with hundreds of digits the first."""
    if isinstance(value, int):
        return str(value) if abs(value) < 10**30 else f"a number of about {value.bit_length() * 0.30103:.0f} digits"
    return f"{value:g}"


def _within(name: str, value: float, low: float, high: float) -> None:
    shown = _shown(value)
    if value != value or value < low:
        raise bad_request(
            f"Invalid value for '{name}': expected a value >= {_shown(low)}, but got {shown} instead.",
            name,
            "decimal_below_min_value" if isinstance(value, float) else "integer_below_min_value",
        )
    if value > high:
        raise bad_request(
            f"Invalid value for '{name}': expected a value <= {_shown(high)}, but got {shown} instead.",
            name,
            "decimal_above_max_value" if isinstance(value, float) else "integer_above_max_value",
        )


def _only(name: str, value: object, *neutral: object) -> None:
    """Accept an unsupported field's null and its `neutral` values, and refuse all others."""
    if value is not None and value not in neutral:
        raise unsupported(name)


def _stops(stop: str | list[str] | None) -> tuple[str, ...]:
    stops = [stop] if isinstance(stop, str) else stop or []
    if len(stops) > MOST_STOPS:
        raise bad_request(
            f"Invalid 'stop': array too long. Expected an array with maximum length {MOST_STOPS}, "
            f"but got an array with length {len(stops)} instead.",
            "stop",
            "array_above_max_length",
        )
    if "" in stops:
        raise bad_request("Invalid 'stop': a stop string cannot be empty.", "stop", "empty_string")
    return tuple(stops)


def _params(
    request: CommonRequest, eos: Sequence[int], vocab_size: int, logprobs: int | None, max_tokens: int | None
) -> Params:
    temperature = 1.0 if request.temperature is None else request.temperature
    top_p = 1.0 if request.top_p is None else request.top_p
    top_k = 0 if request.top_k in (None, -1) else request.top_k or 0
    min_p = request.min_p or 0.0
    min_tokens = request.min_tokens or 0
    n = 1 if request.n is None else request.n
    _within("temperature", temperature, 0, 2)
    _within("top_p", top_p, 0, 1)
    _within("top_k", top_k, 0, INT32)
    _within("min_p", min_p, 0, 1)
    _within("min_tokens", min_tokens, 0, INT32)
    _within("priority", request.priority or 0, -MOST_PRIORITY - 1, MOST_PRIORITY)
    _within("n", n, 1, MOST_CHOICES)
    if request.max_tokens is not None:
        _within("max_tokens", request.max_tokens, 1, INT32)
    if max_tokens is not None:
        _within("min_tokens", min_tokens, 0, max_tokens)
    for name in ("presence_penalty", "frequency_penalty"):
        _only(name, getattr(request, name), 0)
    _only("repetition_penalty", request.repetition_penalty, 1)
    _only("logit_bias", request.logit_bias, {})
    if request.stream_options is not None and not request.stream:
        raise bad_request(
            "The 'stream_options' parameter is only allowed when 'stream' is enabled.", "stream_options"
        )
    if request.stream_options is not None:
        _only("stream_options.include_obfuscation", request.stream_options.include_obfuscation, False)
    stop_token_ids = request.stop_token_ids or []
    if len(stop_token_ids) > MOST_STOP_IDS - len(eos):
        raise bad_request(
            f"Invalid 'stop_token_ids': array too long. Expected an array with maximum length "
            f"{MOST_STOP_IDS - len(eos)}, but got an array with length {len(stop_token_ids)} instead.",
            "stop_token_ids",
            "array_above_max_length",
        )
    for token in stop_token_ids:
        if not 0 <= token < vocab_size:
            raise bad_request(
                f"Invalid 'stop_token_ids': {_shown(token)} is not a token of this model.", "stop_token_ids"
            )
    ends = stop_token_ids if request.ignore_eos else [*eos, *stop_token_ids]
    seed = secrets.randbits(63) if request.seed is None else request.seed % _SEEDS
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
    )
    return Params(
        sampling=sampling,
        stop=_stops(request.stop),
        n=n,
        max_tokens=max_tokens,
        stream=bool(request.stream),
        include_usage=bool(request.stream_options and request.stream_options.include_usage),
        priority=request.priority or 0,
    )


def chat_params(request: ChatRequest, eos: Sequence[int], vocab_size: int) -> Params:
    """Raises ApiError for what is out of range or not supported."""
    if request.max_completion_tokens is not None:
        if request.max_tokens is not None:
            raise bad_request(
                "Setting 'max_tokens' and 'max_completion_tokens' at the same time is not supported.", "max_tokens"
            )
        _within("max_completion_tokens", request.max_completion_tokens, 1, INT32)
    if request.top_logprobs is not None:
        if not request.logprobs:
            raise bad_request("'top_logprobs' is only allowed when 'logprobs' is enabled.", "top_logprobs")
        _within("top_logprobs", request.top_logprobs, 0, MOST_TOP_LOGPROBS)
    _only("store", request.store, False)
    _only("service_tier", request.service_tier, "auto", "default")
    _only("modalities", request.modalities, ["text"])
    _only("reasoning_effort", request.reasoning_effort, "none")
    _only("verbosity", request.verbosity, "medium")
    _only("response_format", request.response_format and request.response_format.type, "text")
    _only("tools", request.tools, [])
    _only("functions", request.functions, [])
    _only("tool_choice", request.tool_choice, "none", "auto")
    _only("function_call", request.function_call, "none", "auto")
    logprobs = (request.top_logprobs or 0) if request.logprobs else None
    max_tokens = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
    return _params(request, eos, vocab_size, logprobs, max_tokens)


def completion_params(request: CompletionRequest, eos: Sequence[int], vocab_size: int) -> Params:
    """Raises ApiError for what is out of range or not supported."""
    if request.logprobs is not None:
        _within("logprobs", request.logprobs, 0, MOST_COMPLETION_LOGPROBS)
    _only("best_of", request.best_of, request.n or 1)
    _only("echo", request.echo, False)
    _only("suffix", request.suffix, "")
    max_tokens = COMPLETION_MAX_TOKENS if request.max_tokens is None else request.max_tokens
    return _params(request, eos, vocab_size, request.logprobs, max_tokens)


def _text(content: str | list[ContentPart] | None, param: str) -> str:
    if content is None:
        raise bad_request(f"Invalid value for '{param}': expected a string, got null.", param, "invalid_type")
    if isinstance(content, str):
        return content
    texts = []
    for place, part in enumerate(content):
        if part.type != "text" or part.text is None:
            raise unsupported(
                f"{param}[{place}]", f"Unsupported content type '{part.type}': only text is supported."
            )
        texts.append(part.text)
    return "\n".join(texts)


def chat_messages(request: ChatRequest) -> list[dict[str, str]]:
    """The messages as chat templates take them. OpenAI's `developer` is what templates call `system`."""
    if not request.messages:
        raise bad_request(
            "Invalid 'messages': empty array. Expected at least one message.", "messages", "empty_array"
        )
    messages = []
    for place, message in enumerate(request.messages):
        at = f"messages[{place}]"
        role = "system" if message.role == "developer" else message.role
        if role not in ("system", "user", "assistant"):
            raise unsupported(f"{at}.role", f"Unsupported value: '{at}.role' does not support '{role}'.")
        _only(f"{at}.tool_calls", message.tool_calls, [])
        _only(f"{at}.annotations", message.annotations, [])
        converted = {"role": role, "content": _text(message.content, f"{at}.content")}
        if message.name is not None:
            converted["name"] = message.name
        messages.append(converted)
    return messages


def completion_prompts(request: CompletionRequest, vocab_size: int) -> list[str | list[int]]:
    """The prompts, each a text or checked token ids: one, or each of a list."""
    prompt = request.prompt
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise bad_request("Invalid 'prompt': empty array.", "prompt", "empty_array")
    if all(isinstance(each, int) for each in prompt):
        prompts: list[str | list[int]] = [[each for each in prompt if isinstance(each, int)]]
    else:
        prompts = [each for each in prompt if isinstance(each, str)] or [
            each for each in prompt if isinstance(each, list)
        ]
        if len(prompts) != len(prompt):
            raise bad_request(
                "Invalid 'prompt': expected a string, or a list of strings, of tokens, or of lists of tokens.",
                "prompt",
                "invalid_type",
            )
    for ids in prompts:
        if isinstance(ids, list):
            for token in ids:
                if not 0 <= token < vocab_size:
                    raise bad_request(f"Invalid 'prompt': {_shown(token)} is not a token of this model.", "prompt")
    if len(prompts) * (request.n or 1) > MOST_CHOICES:
        raise bad_request(f"Too many choices: prompts times 'n' may be {MOST_CHOICES} at most.", "prompt")
    return prompts


def room(prompt_tokens: int, max_tokens: int | None, max_length: int, param: str) -> int:
    """How many tokens may be generated after the prompt. Raises ApiError when prompt and answer do not fit."""
    if prompt_tokens == 0:
        raise bad_request(
            f"Invalid '{param}': it has no tokens; a prompt needs one at least.", param, "empty_prompt"
        )
    over = _too_long(prompt_tokens, max_tokens, max_length, param)
    if over is not None:
        raise over
    return max_length - prompt_tokens if max_tokens is None else max_tokens


def _too_long(prompt_tokens: int, max_tokens: int | None, max_length: int, param: str) -> ApiError | None:
    limit = f"This model's maximum context length is {max_length} tokens. However, "
    what = "messages" if param == "messages" else "prompt"
    if prompt_tokens >= max_length:
        text = f"{limit}your {what} resulted in {prompt_tokens} tokens. Please reduce the length of the {what}."
    elif max_tokens is not None and prompt_tokens + max_tokens > max_length:
        text = (
            f"{limit}you requested {prompt_tokens + max_tokens} tokens ({prompt_tokens} in the {what}, "
            f"{max_tokens} in the completion). Please reduce the length of the {what} or completion."
        )
    else:
        return None
    return bad_request(text, param, "context_length_exceeded")


def choice_seed(seed: int, choice: int) -> int:
    """The seed of one of `n` choices. The first has the request's own, so that n=1 and n=2 agree on it."""
    if choice == 0:
        return seed
    digest = blake2b(f"{seed}/{choice}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % _SEEDS

"""The table of fields in docs/api.md: those of OpenAI, vLLM and SGLang, a value of each, and what comes of it."""

import re
from pathlib import Path
from typing import Any

from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params

DOCS = Path(__file__).parents[2] / "docs" / "api.md"
ENDPOINTS = ("chat", "completions", "responses")
PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions", "responses": "/v1/responses"}
BASES: dict[str, dict[str, Any]] = {
    "chat": {"model": "tiny", "messages": [{"role": "user", "content": "a"}]},
    "completions": {"model": "tiny", "prompt": "a"},
    "responses": {"model": "tiny", "input": "a"},
}


def _fields(module: Any, *kinds: str) -> set[str]:
    return set().union(*(getattr(module, kind).__annotations__ for kind in kinds)) | {"stream"}


OPENAI: dict[str, set[str]] = {
    "chat": _fields(chat_create_params, "CompletionCreateParamsBase"),
    "completions": _fields(completion_create_params, "CompletionCreateParamsBase"),
    "responses": _fields(response_create_params, "ResponseCreateParamsBase"),
}

# vLLM's own, of chats and of completions (docs.vllm.ai, "OpenAI-Compatible Server").
_SAMPLING = {
    "use_beam_search",
    "top_k",
    "min_p",
    "repetition_penalty",
    "length_penalty",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "min_tokens",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "truncate_prompt_tokens",
    "allowed_token_ids",
    "prompt_logprobs",
    "bad_words",
    "add_special_tokens",
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "priority",
    "request_id",
    "logits_processors",
    "return_tokens_as_token_ids",
    "return_token_ids",
    "cache_salt",
    "kv_transfer_params",
    "vllm_xargs",
}
VLLM: dict[str, set[str]] = {
    "chat": _SAMPLING
    | {
        "echo",
        "add_generation_prompt",
        "continue_final_message",
        "documents",
        "chat_template",
        "chat_template_kwargs",
        "mm_processor_kwargs",
        "include_reasoning",
    },
    "completions": _SAMPLING | {"prompt_embeds"},
    "responses": {"priority", "seed", "top_k", "min_p", "repetition_penalty", "cache_salt", "chat_template_kwargs"},
}

# SGLang's own: a field of its engine's, which its OpenAI endpoints set by themselves.
SGLANG = {"logprob_start_len"}

TOOLS = [{"type": "function", "function": {"name": "f"}}]
FLAT_TOOLS = [{"type": "function", "name": "f"}]

# A value that is sensible where the field is supported, and changes something.
VALUES: dict[str, Any] = {
    "messages": BASES["chat"]["messages"],
    "prompt": "b",
    "input": "b",
    "model": "tiny",
    "stream": True,
    "stream_options": {"include_usage": True},
    "stop": ["x"],
    "max_tokens": 5,
    "max_completion_tokens": 5,
    "max_output_tokens": 5,
    "temperature": 0.5,
    "top_p": 0.5,
    "seed": 1,
    "n": 2,
    "best_of": 2,
    "echo": True,
    "logprobs": True,
    "top_logprobs": 2,
    "logit_bias": {"5": 1.5},
    "metadata": {"a": "b"},
    "user": "u",
    "safety_identifier": "u",
    "prompt_cache_key": "k",
    "presence_penalty": 1,
    "frequency_penalty": 1,
    "top_k": 5,
    "min_p": 0.1,
    "repetition_penalty": 1.1,
    "stop_token_ids": [5],
    "ignore_eos": True,
    "min_tokens": 2,
    "truncate_prompt_tokens": 2,
    "allowed_token_ids": [5, 6],
    "bad_words": ["x"],
    "priority": 1,
    "return_token_ids": True,
    "prompt_logprobs": 2,
    "logprob_start_len": -1,
    "cache_salt": "s",
    "add_generation_prompt": False,
    "continue_final_message": True,
    "chat_template_kwargs": {},
    "instructions": "i",
    "include": ["message.output_text.logprobs"],
    "reasoning_effort": "none",
    "text": {"format": {"type": "text"}},
    "reasoning": {"effort": "none"},
    "tools": TOOLS,
    "tool_choice": "required",
    "parallel_tool_calls": False,
    "include_reasoning": False,
    "response_format": {"type": "json_object"},
    "structured_outputs": {"regex": "a"},
    "guided_choice": ["a"],
    "guided_grammar": 'root ::= "a"',
    "guided_json": {"type": "object"},
    "guided_regex": "a",
}
BESIDE: dict[str, dict[str, Any]] = {
    "chat.tool_choice": {"tools": TOOLS},
    "chat.parallel_tool_calls": {"tools": TOOLS},
    "responses.tool_choice": {"tools": FLAT_TOOLS},
    "responses.parallel_tool_calls": {"tools": FLAT_TOOLS},
    "chat.logprob_start_len": {"prompt_logprobs": 1},
    "completions.logprob_start_len": {"prompt_logprobs": 1},
    "chat.stream_options": {"stream": True},
    "completions.stream_options": {"stream": True},
    "responses.stream_options": {"stream": True},
    "chat.top_logprobs": {"logprobs": True},
    "responses.top_logprobs": {"include": ["message.output_text.logprobs"]},
    "chat.continue_final_message": {"messages": [{"role": "assistant", "content": "a"}]},
}
OTHERWISE: dict[str, Any] = {
    "completions.logprobs": 2,
    "responses.stream_options": {"include_obfuscation": False},
    "responses.tools": FLAT_TOOLS,
}


def value_of(endpoint: str, field: str) -> Any:
    return OTHERWISE.get(f"{endpoint}.{field}", VALUES.get(field, "some value"))


def rows() -> dict[str, dict[str, str]]:
    """The cells of each row by endpoint."""
    found = {}
    for line in DOCS.read_text().splitlines():
        match = re.fullmatch(r"\| `(\w+)` \| (.+) \| (.+) \| (.+) \|", line)
        if match:
            found[match[1]] = dict(zip(ENDPOINTS, (cell.strip() for cell in match.groups()[1:]), strict=True))
    return found


def fields_of(endpoint: str) -> set[str]:
    return OPENAI[endpoint] | VLLM[endpoint] | (SGLANG if endpoint != "responses" else set())

"""The limits of `params.py` and `prompts.py` for each field of a body, as JSON Schema, for /openapi.json.

msgspec's own schemas have only types and names: ranges are checked later, with OpenAI's error messages.
"""

import math
from collections.abc import Mapping
from typing import Any

from kvasir_engine.api.logits_params import MOST_BAD_WORD_CHARACTERS, MOST_BAD_WORDS
from kvasir_engine.api.messages import LEAST_BUDGET
from kvasir_engine.api.params import (
    MOST_CHOICES,
    MOST_COMPLETION_LOGPROBS,
    MOST_LABEL,
    MOST_METADATA,
    MOST_STOP_CHARACTERS,
    MOST_STOP_TOKENS,
    MOST_STOPS,
    MOST_TOP_LOGPROBS,
)
from kvasir_engine.bounds import (
    INT32,
    INT64,
    LEAST_REPETITION,
    MOST_BIAS,
    MOST_BIASES,
    MOST_PENALTY,
    MOST_PRIORITY,
    MOST_PROMPT_LOGPROBS,
    MOST_REPETITION,
)

Schema = dict[str, Any]


def _number(low: float, high: float) -> Schema:
    limits = {"minimum": low} | ({} if high == math.inf else {"maximum": high})
    return {"integer": limits, "number": limits}


_COUNT = _number(1, INT32)
_PENALTY = _number(-MOST_PENALTY, MOST_PENALTY)
_LABEL = {"string": {"maxLength": MOST_LABEL}}
_STOP = {"minLength": 1, "maxLength": MOST_STOP_CHARACTERS}
_METADATA = {
    "object": {
        "maxProperties": MOST_METADATA,
        "additionalProperties": {"type": "string", "maxLength": MOST_LABEL},
        "propertyNames": {"maxLength": MOST_LABEL},
    }
}


def limits(model: str, vocab_size: int) -> Mapping[str, Mapping[str, Schema]]:
    """By field, or by struct and field: the constraints on its values of each JSON type."""
    token = {"type": "integer", "minimum": 0, "maximum": vocab_size - 1}
    return {
        "model": {"string": {"enum": [model]}},
        "temperature": _number(0, 2),
        "top_p": _number(0, 1),
        "top_k": _number(-1, INT32),
        "min_p": _number(0, 1),
        "min_tokens": _number(0, INT32),
        "priority": _number(-MOST_PRIORITY - 1, MOST_PRIORITY),
        "n": _number(1, MOST_CHOICES),
        "best_of": _number(1, MOST_CHOICES),
        "max_tokens": _COUNT,
        "CompletionRequest.max_tokens": _number(0, INT32),
        "max_completion_tokens": _COUNT,
        "max_output_tokens": _COUNT,
        "budget_tokens": _number(LEAST_BUDGET, INT32),
        "truncate_prompt_tokens": {"integer": {"minimum": -1, "not": {"const": 0}}},
        "seed": _number(-INT64 - 1, INT64),
        "presence_penalty": _PENALTY,
        "frequency_penalty": _PENALTY,
        "repetition_penalty": _number(LEAST_REPETITION, MOST_REPETITION),
        "top_logprobs": _number(0, MOST_TOP_LOGPROBS),
        "logprobs": _number(0, MOST_COMPLETION_LOGPROBS),
        "prompt_logprobs": _number(0, min(MOST_PROMPT_LOGPROBS, vocab_size)),
        "logprob_start_len": _number(-INT32, INT32),
        "user": _LABEL,
        "safety_identifier": _LABEL,
        "prompt_cache_key": _LABEL,
        "cache_salt": {"string": {"minLength": 1, "maxLength": MOST_LABEL}},
        "metadata": _METADATA,
        "stop": {"string": _STOP, "array": {"maxItems": MOST_STOPS, "items": {"type": "string", **_STOP}}},
        "stop_token_ids": {"array": {"maxItems": MOST_STOP_TOKENS, "items": token}},
        "allowed_token_ids": {"array": {"minItems": 1, "maxItems": vocab_size, "items": token}},
        "bad_words": {
            "array": {
                "maxItems": MOST_BAD_WORDS,
                "items": {"type": "string", "maxLength": MOST_BAD_WORD_CHARACTERS, "pattern": r"\S"},
            }
        },
        "logit_bias": {
            "object": {
                "maxProperties": MOST_BIASES,
                "propertyNames": {"pattern": "^(0|[1-9][0-9]{0,9})$"},
                "additionalProperties": {"type": "number", "minimum": -MOST_BIAS, "maximum": MOST_BIAS},
            }
        },
        "stop_sequences": {"array": {"maxItems": MOST_STOPS, "items": {"type": "string", **_STOP}}},
        "messages": {"array": {"minItems": 1}},
        "input": {"array": {"minItems": 1}},
        "prompt": {"array": {"minItems": 1}},
        "tokens": {"array": {"items": token}},
    }


WITHIN: Mapping[str, Schema] = {
    "CompletionRequest": {
        "if": {"properties": {"echo": {"const": True}}, "required": ["echo"]},
        "else": {"properties": {"max_tokens": {"minimum": 1}}},
    },
}
"""By struct: the constraints between its fields."""

_CONVERSATION: Mapping[str, list[Any]] = {"speed": [None, "standard"]}

ONLY: Mapping[str, Mapping[str, list[Any]]] = {
    "StreamOptions": {"include_obfuscation": [None, False]},
    "ChatRequest": {
        "store": [None, False],
        "service_tier": [None, "auto", "default"],
        "modalities": [None, ["text"]],
        "verbosity": [None, "medium"],
        "functions": [None, []],
        "function_call": [None, "none", "auto"],
        "audio": [None],
        "prediction": [None],
        "web_search_options": [None],
    },
    "ChatMessage": {
        "role": ["system", "developer", "user", "assistant", "tool"],
        "annotations": [None, []],
    },
    "ResponsesRequest": {
        "store": [None, False],
        "background": [None, False],
        "service_tier": [None, "auto", "default"],
        "truncation": [None, "disabled"],
        "include": [None, [], ["message.output_text.logprobs"]],
        "max_tool_calls": [None],
        "previous_response_id": [None],
        "conversation": [None],
        "prompt": [None],
    },
    "ResponseStreamOptions": {"include_obfuscation": [None, False]},
    "FlatTool": {"type": ["function"], "defer_loading": [None, False], "allowed_callers": [None, ["direct"]]},
    "FlatToolChoice": {"type": ["function", "allowed_tools"], "mode": [None, "auto", "required"]},
    "FlatAllowedTool": {"type": ["function"]},
    "TextFormat": {"type": ["text", "json_object", "json_schema"]},
    "TextOptions": {"verbosity": [None, "medium"]},
    "ReasoningOptions": {"summary": [None]},
    "InputItem": {
        "type": ["message", "reasoning", "function_call", "function_call_output"],
        "role": [None, "user", "assistant", "system", "developer"],
        "encrypted_content": [None],
    },
    "MessagesRequest": {
        **_CONVERSATION,
        "service_tier": [None, "auto", "standard_only"],
        "mcp_servers": [None, []],
        "container": [None],
        "inference_geo": [None],
    },
    "CountTokensRequest": _CONVERSATION,
    "ThinkingOptions": {"type": ["enabled", "disabled", "adaptive"], "display": [None, "summarized", "omitted"]},
    "InputTool": {
        "type": [None, "custom"],
        "eager_input_streaming": [None, True],
        "defer_loading": [None, False],
        "allowed_callers": [None, ["direct"]],
        "input_examples": [None, []],
    },
    "InputToolChoice": {"type": ["auto", "any", "tool", "none"]},
    "AnswerFormat": {"type": ["json_schema"]},
    "ContentBlock": {"type": ["text", "thinking", "tool_use", "tool_result"], "citations": [None, []]},
    "TextBlock": {"type": ["text"], "citations": [None, []]},
    "BatchRequest": {
        "endpoint": ["/v1/chat/completions", "/v1/completions", "/v1/responses"],
        "completion_window": ["24h"],
    },
    "Tool": {"type": ["function"], "custom": [None]},
    "NamedToolChoice": {"type": ["function", "allowed_tools"], "custom": [None]},
    "AllowedTools": {"mode": ["auto", "required"]},
    "AllowedTool": {"type": ["function"], "custom": [None]},
    "MessageToolCall": {"type": ["function"]},
    "TurnMessage": {"role": ["user", "assistant"]},
    "CacheControl": {"type": ["ephemeral"], "ttl": [None, "5m", "1h"]},
    "CompletionRequest": {"suffix": [None, ""]},
}
"""Fields that have these values only: those that change nothing, or all that are known."""

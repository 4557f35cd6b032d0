"""Passes a chat's tools to the chat template, and chooses the parser of its answers. Pure."""

import dataclasses
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from kvasir_engine.api.detokenizer import ShownTokens
from kvasir_engine.api.errors import ApiError, bad_request, unsupported
from kvasir_engine.api.params import Params
from kvasir_engine.api.rendering import Rendering
from kvasir_engine.api.schemas import ChatRequest
from kvasir_engine.api.tokenizer import ServedModel, TokenBytes
from kvasir_engine.api.tool_params import ToolUse
from kvasir_engine.api.tools.call_grammar import (
    CallSchema,
    calls_or,
    expressible,
    forced_calls,
    grammar_after_reasoning,
    triggered_calls,
)
from kvasir_engine.api.tools.choice import CallLimits, ChoiceParser, begun_by, new_call_id
from kvasir_engine.api.tools.formats import OutputFormat
from kvasir_engine.api.tools.preamble import with_tools
from kvasir_engine.api.tools.thinking import PlainText
from kvasir_engine.api.tools.value_types import Schema
from kvasir_engine.bounds import MOST_GRAMMAR_CHARACTERS
from kvasir_engine.protocol import Grammar

TAIL = 32
"""The number of last tokens of a prompt that are searched: a marker and the whitespace after it are shorter."""
_MISTRAL_ID = re.compile(r"[a-zA-Z0-9]{9}")
_ALPHABET = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class AnswerReading:
    """How the answers of one chat are parsed. `names` are the callable tools'; None: calls stay text.

    `schemas` are those of their arguments.
    `begun`: whether the prompt ends within the reasoning (True) or behind it (False); None: neither.
    """

    format: OutputFormat
    vocabulary: TokenBytes
    names: frozenset[str] | None
    begun: bool | None
    limits: CallLimits
    shows_reasoning: bool
    schemas: Mapping[str, Schema]

    def parser(self) -> ChoiceParser | None:
        """A parser for one choice; None where all text is content."""
        parser = self.format.parser(new_call_id, self.names, self.begun, self.schemas)
        if isinstance(parser, PlainText):
            return None
        return ChoiceParser(parser, self.limits, self.shows_reasoning)


def answer_reading(
    request: ChatRequest, params: Params, model: ServedModel, tools: ToolUse | None, tokens: Sequence[int]
) -> AnswerReading:
    """How the answers to a prompt of these `tokens` are parsed. Raises ApiError."""
    format, tokenizer = model.output, model.tokenizer
    thinking = format.thinking
    begun = begun_by(tokenizer.decode(tokens[-TAIL:]), thinking)
    if request.continue_final_message and thinking is not None:
        content = request.messages[-1].content
        said = content if isinstance(content, str) else ""
        opened, closed = said.rfind(thinking.open), said.rfind(thinking.close)
        begun = begun if opened == closed else opened > closed
    if tools is not None and not expressible(_call_schemas(tools), format):
        format = _of_json(format, params, tools)
    shown = {
        token: marker.encode()
        for marker in format.markers(tools is not None)
        if (token := tokenizer.special_token(marker)) is not None
    }
    vocabulary: TokenBytes = tokenizer
    if shown:
        vocabulary = ShownTokens(tokenizer, shown)
    return AnswerReading(
        format=format,
        vocabulary=vocabulary,
        names=None if tools is None else frozenset(tool.name for tool in tools.callable),
        begun=begun,
        limits=CallLimits() if tools is None else CallLimits(not tools.parallel, tools.choice == "named"),
        shows_reasoning=request.include_reasoning is not False,
        schemas={} if tools is None else {tool.name: tool.schema for tool in tools.callable},
    )


def _of_json(format: OutputFormat, params: Params, tools: ToolUse) -> OutputFormat:
    """The format with JSON calls in place of its own, which these schemas cannot constrain."""
    if format.tools != "pythonic":
        constrained = tools.forced or tools.strict or params.sampling.grammar is not None
        return dataclasses.replace(format, tools="hermes") if constrained else format
    if tools.forced or params.sampling.grammar is not None:
        return dataclasses.replace(format, tools="json")
    if tools.strict:
        message = (
            "Unsupported value: 'strict', or some of the tools allowed, with this model's form of calls, "
            "unless a call is required."
        )
        raise unsupported("tools", message)
    return format


def constrained(params: Params, tools: ToolUse | None, reading: AnswerReading) -> Params:
    """The parameters with a grammar for tool calls, where a call is required or a tool is strict.

    Any other grammar begins after the reasoning; calls may take its place. Raises ApiError.
    """
    requested = params.sampling.grammar
    grammar = requested
    if tools is not None and (requested is not None or tools.forced or tools.strict):
        grammar = _calls_grammar(requested, tools, reading)
    elif requested is not None:
        grammar = grammar_after_reasoning(requested, reading.format, reading.begun)
    if grammar is None and requested is not None:
        name = params.grammar_field
        raise unsupported(name, f"Unsupported value: '{name}' with reasoning, or with tools that may be called.")
    if grammar is requested:
        return params
    field = params.grammar_field if requested is not None and not (tools is not None and tools.forced) else "tools"
    sampling = msgspec.structs.replace(params.sampling, grammar=grammar)
    return dataclasses.replace(params, sampling=sampling, grammar_field=field)


def _call_schemas(tools: ToolUse) -> list[CallSchema]:
    """What a grammar enforces of each function that may be called."""
    return [
        CallSchema(tool.name, tool.schema if tools.forced or tool.strict else {"type": "object"})
        for tool in tools.callable
    ]


def _calls_grammar(requested: Grammar | None, tools: ToolUse, reading: AnswerReading) -> Grammar | None:
    calls = _call_schemas(tools)
    many, begun = tools.parallel and tools.choice != "named", reading.begun
    if tools.forced:
        grammar: Grammar | None = forced_calls(calls, reading.format, many, begun)
    elif requested is not None:
        grammar = calls_or(requested, calls, reading.format, many, begun)
    else:
        grammar = triggered_calls(calls, reading.format, many, begun)
    if grammar is not None and len(grammar.source) > MOST_GRAMMAR_CHARACTERS:
        raise bad_request("Invalid 'tools': their schemas are too long to constrain an answer.", "tools")
    return grammar


def for_template(
    messages: list[dict[str, Any]], how: Rendering, tools: ToolUse | None, format: OutputFormat
) -> tuple[list[dict[str, Any]], Rendering]:
    """The messages and the tools as the model's chat template takes them."""
    described = () if tools is None else tuple(tool.described() for tool in tools.tools)
    if format.tools_in_system_message:
        return with_tools(messages, described), how
    if format.tools == "mistral":
        messages = [_with_short_ids(message) for message in messages]
    return messages, dataclasses.replace(how, tools=described or None)


def _with_short_ids(message: dict[str, Any]) -> dict[str, Any]:
    """The messages with call ids of nine letters and digits, as Mistral's templates require."""
    if "tool_call_id" in message:
        message = {**message, "tool_call_id": _short(message["tool_call_id"])}
    if "tool_calls" in message:
        calls = [{**call, "id": _short(call["id"])} for call in message["tool_calls"]]
        message = {**message, "tool_calls": calls}
    return message


def _short(id: str) -> str:
    if _MISTRAL_ID.fullmatch(id):
        return id
    return "".join(
        _ALPHABET[byte % len(_ALPHABET)] for byte in hashlib.blake2b(id.encode(), digest_size=9).digest()
    )


def no_tools(model: str) -> ApiError:
    """The refusal: this model's calls cannot be parsed."""
    return unsupported(
        "tools",
        f"Unsupported parameter: 'tools'. The server reads no tool calls of the model '{model[:200]}': "
        "its --tool-call-parser is none, or its chat template tells of none in the form that it names, "
        "or writes them in a form that is not known.",
    )

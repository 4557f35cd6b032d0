"""Grammars for answers with tool calls: structural tags, in the form that the parsers read. Pure."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvasir_engine.api.tools import deepseek, harmony, hermes, mistral
from kvasir_engine.api.tools.formats import XML_FORMS, OutputFormat
from kvasir_engine.api.tools.tags import Tag, const, either, sequence, several, tag
from kvasir_engine.api.tools.xml_calls import OPEN
from kvasir_engine.api.tools.xml_grammar import call_tag
from kvasir_engine.protocol import Grammar

WHITESPACE = " ?"
"""White space between the parts of JSON: as models learned it, and bounded, so that a model cannot
go on with it.
"""


@dataclass(frozen=True)
class CallSchema:
    """A function that may be called, and the JSON schema of its arguments."""

    name: str
    schema: dict[str, Any]


def forced_calls(calls: Sequence[CallSchema], format: OutputFormat, many: bool, begun: bool | None) -> Grammar:
    """A grammar of one call, after any reasoning; with `many` of one or more."""
    return _grammar(_after_reasoning(_calls(calls, format, many), format, begun))


def triggered_calls(calls: Sequence[CallSchema], format: OutputFormat, many: bool, begun: bool | None) -> Grammar:
    """A grammar of any answer in which every beginning of a call becomes a call."""
    if format.tools == "openai":
        final = sequence(const(f"{harmony.CHANNEL}final{harmony.MESSAGE}"), {"type": "any_text"})
        return _grammar(_after_reasoning(either(_calls(calls, format, many), final), format, begun))
    tags, triggers = _triggered(calls, format, many)
    free = {"type": "triggered_tags", "triggers": triggers, "tags": tags, "stop_after_first": not many}
    return _grammar(_after_reasoning(free, format, begun))


def calls_or(
    grammar: Grammar, calls: Sequence[CallSchema], format: OutputFormat, many: bool, begun: bool | None
) -> Grammar | None:
    """A grammar of this grammar's answer, or calls; None if this kind cannot be combined."""
    answer = _answer(grammar, format)
    if answer is None:
        return None
    one_of = either(_calls(calls, format, many), answer)
    return _grammar(_after_reasoning(one_of, format, begun), grammar.whitespace)


def grammar_after_reasoning(grammar: Grammar, format: OutputFormat, begun: bool | None) -> Grammar | None:
    """The grammar with reasoning allowed before it; None if this kind cannot be combined."""
    if format.reasoning != "openai" and (format.thinking is None or begun is False):
        return grammar
    answer = _answer(grammar, format)
    return None if answer is None else _grammar(_after_reasoning(answer, format, begun), grammar.whitespace)


def _answer(grammar: Grammar, format: OutputFormat) -> Tag | None:
    """The grammar as a part of structural tags, in the format's channel for answers."""
    answer = _as_tag(grammar)
    if answer is None or "openai" not in (format.tools, format.reasoning):
        return answer
    return sequence(const(f"{harmony.CHANNEL}final{harmony.MESSAGE}"), answer)


def _as_tag(grammar: Grammar) -> Tag | None:
    match grammar.kind:
        case "json_schema":
            return {"type": "json_schema", "json_schema": json.loads(grammar.source)}
        case "json_object":
            return {"type": "json_schema", "json_schema": {"type": "object"}}
        case "regex":
            return {"type": "regex", "pattern": grammar.source}
        case "choice":
            return either(*map(const, json.loads(grammar.source)))
        case "structural_tag":
            asked = json.loads(grammar.source)
            return asked.get("format") if isinstance(asked, dict) else None
        case "lark" | "ebnf":
            return None


def _grammar(format: Tag, whitespace: str | None = WHITESPACE) -> Grammar:
    source = json.dumps({"type": "structural_tag", "format": format}, ensure_ascii=False)
    return Grammar("structural_tag", source, whitespace)


def _json(calls: Sequence[CallSchema], arguments: str, begin: str = "", end: str = "") -> list[Tag]:
    return [
        tag(f'{begin}{{"name": {json.dumps(each.name)}, "{arguments}": ', each.schema, "}" + end) for each in calls
    ]


def _calls(calls: Sequence[CallSchema], format: OutputFormat, many: bool) -> Tag:
    match format.tools:
        case "hermes":
            return several(_hermes(calls), "\n", many)
        case "llama3_json":
            return several(_json(calls, "parameters"), "; ", many)
        case "mistral" if format.newer:
            return several(_mistral(calls), "", many)
        case "mistral":
            return sequence(const(mistral.OPEN), _array(calls, many))
        case "deepseek_v3":
            inner = _deepseek(calls, format, many)
            return sequence(const(deepseek.CALLS), inner, const(deepseek.CALLS_END))
        case "glm45" | "qwen3_coder":
            return several(_xml(calls, format), "\n", many)
        case "openai":  # the answer ends with each call
            begin = f"{harmony.CHANNEL}commentary to={harmony.FUNCTIONS}"
            middle = f" {harmony.CONSTRAIN}json{harmony.MESSAGE}"
            return several([tag(begin + each.name + middle, each.schema, "") for each in calls], "", False)
        case _:
            return _array(calls, many) if many else several(_json(calls, "arguments"), "", False)


def _array(calls: Sequence[CallSchema], many: bool) -> Tag:
    return sequence(const("["), several(_json(calls, "arguments"), ", ", many), const("]"))


def _hermes(calls: Sequence[CallSchema]) -> list[Tag]:
    return _json(calls, "arguments", hermes.OPEN + "\n", "\n" + hermes.CLOSE)


def _xml(calls: Sequence[CallSchema], format: OutputFormat) -> list[Tag]:
    tags = [call_tag(each.name, each.schema, XML_FORMS[format.tools]) for each in calls]
    return [each for each in tags if each is not None]


def expressible(calls: Sequence[CallSchema], format: OutputFormat) -> bool:
    """Whether the format's own form can be constrained to these calls."""
    if format.tools == "pythonic":
        return False
    return format.tools not in XML_FORMS or len(_xml(calls, format)) == len(calls)


def _mistral(calls: Sequence[CallSchema]) -> list[Tag]:
    return [tag(f"{mistral.OPEN}{each.name}{mistral.ARGS}", each.schema, "") for each in calls]


def _deepseek(calls: Sequence[CallSchema], format: OutputFormat, many: bool) -> Tag:
    before, after = ("", "") if format.newer else ("function" + deepseek.SEPARATOR, "\n```")
    between = deepseek.SEPARATOR if format.newer else "\n```json\n"
    tags = [
        tag(f"{deepseek.CALL}{before}{each.name}{between}", each.schema, after + deepseek.CALL_END)
        for each in calls
    ]
    return several(tags, "" if format.newer else "\n", many)


def _triggered(calls: Sequence[CallSchema], format: OutputFormat, many: bool) -> tuple[list[Tag], list[str]]:
    """Tags, and their triggers."""
    match format.tools:
        case "hermes":
            return _hermes(calls), [hermes.OPEN]
        case "llama3_json":
            return _json(calls, "parameters"), ['{"name": ']
        case "glm45" | "qwen3_coder":
            return _xml(calls, format), [OPEN]
        case "mistral" if format.newer:
            return _mistral(calls), [mistral.OPEN]
        case "mistral":
            content = _array(calls, many)
            return [{"type": "tag", "begin": mistral.OPEN, "content": content, "end": ""}], [mistral.OPEN]
        case "deepseek_v3":
            content = _deepseek(calls, format, many)
            whole = {"type": "tag", "begin": deepseek.CALLS, "content": content, "end": deepseek.CALLS_END}
            return [whole], [deepseek.CALLS]
        case _:
            return _json(calls, "arguments"), ['{"name": ']


def _after_reasoning(answer: Tag, format: OutputFormat, begun: bool | None) -> Tag:
    """The answer with allowed or required reasoning before it."""
    free: Tag = {"type": "any_text"}
    if format.reasoning == "openai":
        begin, end = f"{harmony.CHANNEL}analysis{harmony.MESSAGE}", f"{harmony.ENDS[0]}{harmony.START}assistant"
        thought: Tag = {"type": "tag", "begin": begin, "content": free, "end": end}
        return either(answer, sequence(thought, answer))
    thinking = format.thinking
    if thinking is None or begun is False:
        return answer
    within = begun is True or format.reasoning == "deepseek_r1"
    thought = {"type": "tag", "begin": "" if within else thinking.open, "content": free, "end": thinking.close}
    reasoned = sequence(thought, {"type": "regex", "pattern": r"\n{0,2}"}, answer)
    return reasoned if within else either(answer, reasoned)

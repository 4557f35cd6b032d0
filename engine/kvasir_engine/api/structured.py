"""Turns the fields of OpenAI's API and vLLM's that constrain the text into one grammar. Pure."""

import json
from collections.abc import Iterator

import msgspec

from kvasir_engine.api.errors import ApiError, bad_request, missing, unsupported
from kvasir_engine.api.json_whitespace import COMPACT
from kvasir_engine.api.ranges import short
from kvasir_engine.api.schemas import CommonRequest, Json, ResponseFormat, StructuredOutputs, given
from kvasir_engine.bounds import MOST_GRAMMAR_CHARACTERS, MOST_WHITESPACE_CHARACTERS
from kvasir_engine.grammar.base import GrammarError
from kvasir_engine.protocol import Grammar

BACKENDS = ("auto", "guidance", "llguidance")
_OF_JSON = ("json_schema", "json_object", "structural_tag")


def grammar_of(request: CommonRequest, whitespace: str | None = None) -> tuple[str, Grammar] | None:
    """The field that constrains the text, and its grammar; `whitespace` is JSON's where the request does not set
    it.

    Raises ApiError, also where two fields constrain the text.
    """
    backend = request.guided_decoding_backend
    if backend is not None and backend not in BACKENDS:
        raise unsupported("guided_decoding_backend")
    found = list(_grammars(request))
    if len(found) > 1:
        (first, _), (second, _) = found[:2]
        raise bad_request(f"Only one of '{first}' and '{second}' may constrain the text.", second)
    if not found:
        if request.guided_whitespace_pattern is not None:
            name = "guided_whitespace_pattern"
            raise bad_request(f"'{name}' is only allowed with 'guided_json' or 'guided_json_object'.", name)
        return None
    field, grammar = found[0]
    short(field, grammar.source, MOST_GRAMMAR_CHARACTERS)
    options = request.structured_outputs
    says = options is not None and options.disable_any_whitespace is not None
    if grammar.whitespace is None and grammar.kind in _OF_JSON and not says:
        grammar = msgspec.structs.replace(grammar, whitespace=whitespace)
    return field, grammar


def refused(field: str, error: GrammarError) -> ApiError:
    """The error for a grammar that cannot be served; `field` is the request's."""
    where = field
    if error.part == "whitespace":
        prefix = "guided_" if field.startswith("guided_") else "structured_outputs."
        where = f"{prefix}whitespace_pattern"
    inside = f" at '{error.part}'" if error.part and error.part != "whitespace" else ""
    return bad_request(f"Invalid '{where}'{inside}: {error.reason}.", where, "invalid_grammar")


def _grammars(request: CommonRequest) -> Iterator[tuple[str, Grammar]]:
    """Each field of the request that has a grammar, and the grammar."""
    if request.response_format is not None:
        formatted = _response_format(request.response_format)
        if formatted is not None:
            yield formatted
    if request.structured_outputs is not None:
        yield _structured_outputs(request.structured_outputs)
    guided = StructuredOutputs(
        json=request.guided_json,
        regex=request.guided_regex,
        choice=request.guided_choice,
        grammar=request.guided_grammar,
        json_object=request.guided_json_object,
    )
    for field, grammar in _fields(guided, _pattern("guided_", request.guided_whitespace_pattern)):
        if grammar.whitespace is None and request.guided_whitespace_pattern is not None:
            name = "guided_whitespace_pattern"
            raise bad_request(f"'{name}' is only allowed with 'guided_json' or 'guided_json_object'.", name)
        yield f"guided_{field}", grammar


def _response_format(format: ResponseFormat) -> tuple[str, Grammar] | None:
    name = "response_format"
    tags = {
        key: getattr(format, key) for key in ("structures", "triggers", "format") if given(getattr(format, key))
    }
    for key in [*tags, *(["json_schema"] if format.json_schema is not None else [])]:
        kind = "json_schema" if key == "json_schema" else "structural_tag"
        if format.type != kind:
            raise bad_request(f"'{name}.{key}' is only allowed where the type is '{kind}'.", f"{name}.{key}")
    match format.type:
        case "text":
            return None
        case "json_object":
            return name, Grammar("json_object")
        case "json_schema":
            if format.json_schema is None:
                raise missing(f"{name}.json_schema")
            if not given(format.json_schema.schema):
                raise missing(f"{name}.json_schema.schema")
            return f"{name}.json_schema.schema", Grammar("json_schema", _json(format.json_schema.schema))
        case "structural_tag":
            return name, Grammar("structural_tag", _json(msgspec.json.encode({"type": format.type, **tags})))
    raise unsupported(f"{name}.type")


def _structured_outputs(options: StructuredOutputs) -> tuple[str, Grammar]:
    name = "structured_outputs"
    if options.disable_additional_properties:
        raise unsupported(f"{name}.disable_additional_properties")
    whitespace = _pattern(f"{name}.", options.whitespace_pattern)
    if options.disable_any_whitespace:
        if whitespace is not None:
            field = f"{name}.whitespace_pattern"
            raise bad_request(f"'{field}' is not allowed with 'disable_any_whitespace'.", field)
        whitespace = COMPACT
    found = list(_fields(options, whitespace))
    if len(found) != 1:
        fields = "json, regex, choice, grammar, json_object, structural_tag"
        raise bad_request(f"'{name}' needs exactly one of {fields}.", name)
    field, grammar = found[0]
    if whitespace is not None and grammar.whitespace is None:
        field = "whitespace_pattern" if options.whitespace_pattern is not None else "disable_any_whitespace"
        raise bad_request(f"'{name}.{field}' is only allowed with JSON.", f"{name}.{field}")
    return f"{name}.{field}", grammar


def _pattern(prefix: str, pattern: str | None) -> str | None:
    short(f"{prefix}whitespace_pattern", pattern, MOST_WHITESPACE_CHARACTERS)
    return pattern


def _fields(options: StructuredOutputs, whitespace: str | None) -> Iterator[tuple[str, Grammar]]:
    if given(options.json):
        yield "json", Grammar("json_schema", _schema(options.json), whitespace)
    if options.regex is not None:
        yield "regex", Grammar("regex", options.regex)
    if options.choice is not None:
        yield "choice", Grammar("choice", json.dumps(options.choice, ensure_ascii=False))
    if options.grammar is not None:
        yield "grammar", Grammar("ebnf", options.grammar)
    if options.json_object:
        yield "json_object", Grammar("json_object", "", whitespace)
    if given(options.structural_tag):
        yield "structural_tag", Grammar("structural_tag", _schema(options.structural_tag), whitespace)


def _schema(value: Json) -> str:
    """A schema, given as JSON or as a string of JSON."""
    text = _json(value)
    if text.lstrip().startswith('"'):
        inner: str = msgspec.json.decode(text, type=str)
        return inner
    return text


def _json(value: Json | bytes) -> str:
    return bytes(value).decode()

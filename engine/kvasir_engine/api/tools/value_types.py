"""The types that a JSON schema lets a value have, and a text as JSON by them: forms of XML have no quotes."""

import json
from collections.abc import Mapping
from typing import Any

from kvasir_engine.grammar.pointers import at

Schema = Mapping[str, Any]
ANY = frozenset({"null", "boolean", "integer", "number", "string", "array", "object"})
STRING = frozenset({"string"})
MOST_REFERENCES = 16
_PYTHON = {"True": "true", "False": "false", "None": "null"}


def resolved(schema: Any, root: Schema) -> Any:
    """The schema that a chain of `$ref` within `root` leads to; True, which allows all, where it leads nowhere."""
    for _ in range(MOST_REFERENCES):
        if not isinstance(schema, dict) or "$ref" not in schema:
            return schema
        reference = schema["$ref"]
        if len(schema) > 1 or not isinstance(reference, str) or not reference.startswith("#"):
            return True
        try:
            schema = at(root, reference[1:])
        except KeyError:
            return True
    return True


def types_of(schema: Any, root: Schema, depth: int = 0) -> frozenset[str]:
    """The types that values of `schema` may have, at most; integers are numbers too."""
    schema = resolved(schema, root)
    if not isinstance(schema, dict) or depth > MOST_REFERENCES:
        return ANY
    found = ANY
    named = schema.get("type")
    if isinstance(named, str):
        found &= {named}
    elif isinstance(named, list):
        found &= {each for each in named if isinstance(each, str)}
    if "number" in found:
        found |= {"integer"}
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if isinstance(values, list):
        found &= {type_of(each) for each in values}
    for key in ("anyOf", "oneOf"):
        if isinstance(schema.get(key), list):
            found &= frozenset[str]().union(*(types_of(each, root, depth + 1) for each in schema[key]))
    for each in schema["allOf"] if isinstance(schema.get("allOf"), list) else ():
        found &= types_of(each, root, depth + 1)
    return found


def type_of(value: Any) -> str:
    """The name of a JSON value's type."""
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case int():
            return "integer"
        case float():
            return "integer" if value.is_integer() else "number"
        case str():
            return "string"
        case list():
            return "array"
    return "object"


def as_json(text: str, types: frozenset[str]) -> str:
    """The JSON of a value that a model wrote as `text`: what that is as JSON, or as a constant of Python, where the
    value may have that type; else a string.
    """
    bare = text.strip(" \t\r\n")
    bare = _PYTHON.get(bare, bare)
    string = json.dumps(text, ensure_ascii=False)
    try:
        value = json.loads(bare, parse_constant=_no_constant, strict=False)
        if "string" in types and (isinstance(value, str) or type_of(value) not in types):
            return string
        # Line breaks in strings, which models write as they are, have to be escaped.
        return bare if _is_json(bare) else json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (ValueError, RecursionError):
        return string


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _no_constant(name: str) -> None:
    raise ValueError(name)
